"""Next-token prediction: the baseline, and what a block size of one amounts to."""

from dataclasses import dataclass

from torch import Tensor

from models.denoiser import Denoiser
from models.masks import Causal

from .question import Objective, Question
from .segments import begins, positions


@dataclass(frozen=True)
class Autoregressive(Objective):
    """-log p(x[i + 1] | x[..i]), the mask id excluded."""

    mask_id: int
    ignore_bos: bool = False

    def question(
        self,
        x0: Tensor,
        attention_mask: Tensor,
        *,
        training: bool,
        segments: Tensor | None = None,
    ) -> Question:
        """x0, attention_mask, segments [B, L]; it is [B, L - 1], about tokens 1 .. L - 1. A text's
        first token is not predicted: before it stands another text."""
        first = begins(x0, segments)
        counted = attention_mask[:, 1:].float().masked_fill(first[:, 1:], 0)
        if self.ignore_bos and not training:
            counted = counted.masked_fill(first[:, :-1], 0)
        seen = None if segments is None else segments[:, :-1]
        # padding may carry the mask's id, whose probability is 0: ask for any other token there
        targets = x0[:, 1:].masked_fill(counted == 0, int(self.mask_id == 0))
        return Question(
            tokens=x0[:, :-1],
            rule=Causal(),
            counted=counted,
            read=None,
            targets=targets.flatten(),
            weights=counted.flatten(),
            segments=seen,
            positions=None if seen is None else positions(seen),
        )

    def denoiser(self, backbone) -> Denoiser:
        """Row i of the answer is about token i + 1."""
        return Denoiser(backbone, self.mask_id, 1, Causal())
