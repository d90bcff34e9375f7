"""Next-token prediction: the baseline, and what a block size of one amounts to."""

from dataclasses import dataclass

from torch import Tensor

from models.denoiser import Denoiser
from models.masks import Causal

from .head import cross_entropy_kernel, head_loss
from .loss import TokenLoss
from .segments import begins, positions


@dataclass(frozen=True)
class Autoregressive:
    """-log p(x[i + 1] | x[..i]), the mask id excluded."""

    mask_id: int
    ignore_bos: bool = False

    def loss(
        self,
        backbone,
        x0: Tensor,
        attention_mask: Tensor,
        *,
        training: bool,
        segments: Tensor | None = None,
    ) -> TokenLoss:
        """x0, attention_mask, segments [B, L]; the result is [B, L - 1], about tokens 1 .. L - 1.
        A text's first token is not predicted: before it stands another text."""
        first = begins(x0, segments)
        counted = attention_mask[:, 1:].float().masked_fill(first[:, 1:], 0)
        if self.ignore_bos and not training:
            counted = counted.masked_fill(first[:, :-1], 0)
        seen = None if segments is None else segments[:, :-1]
        hidden = backbone.hidden(
            x0[:, :-1],
            rule=Causal(),
            segments=seen,
            positions=None if seen is None else positions(seen),
        ).flatten(0, 1)
        factors = (counted / counted.sum()).flatten()
        kernel = cross_entropy_kernel(backbone, self.mask_id)
        # padding may carry the mask's id, whose probability is 0: ask for any other token there
        targets = x0[:, 1:].masked_fill(counted == 0, int(self.mask_id == 0))
        head = head_loss(backbone, hidden, targets.flatten(), factors, kernel)
        nats = head.nats.view(counted.shape) * counted
        return TokenLoss(nats=nats, counted=counted, mean=head.total)

    def denoiser(self, backbone) -> Denoiser:
        """Row i of the answer is about token i + 1."""
        return Denoiser(backbone, self.mask_id, 1, Causal())
