"""Next-token prediction: the baseline, and what a block size of one amounts to."""

from dataclasses import dataclass

from torch import Tensor

from models.denoiser import Denoiser
from models.document_ids import begins, positions
from models.masks import Causal

from .algorithms import Algorithm
from .loss import LossInputs, Objective


@dataclass(frozen=True)
class Autoregressive(Objective):
    """-log p(x[i + 1] | x[..i]), the mask id excluded."""

    mask_id: int
    ignore_bos: bool = False
    draws_noise = False

    def loss_inputs(
        self,
        x0: Tensor,
        valid: Tensor,
        noise: None = None,
        *,
        interval: object = None,
        training: bool,
        document_ids: Tensor | None = None,
    ) -> LossInputs:
        """x0, valid, document_ids [B, L] -> inputs [B, L - 1] that predict tokens 1 .. L - 1.
        valid: 1 where a token may enter the loss. A text's first token is not predicted: before it
        stands another text. There is no noise, and so no interval."""
        first = begins(x0, document_ids)
        loss_mask = valid[:, 1:].float().masked_fill(first[:, 1:], 0)
        if self.ignore_bos and not training:
            loss_mask = loss_mask.masked_fill(first[:, :-1], 0)
        seen = None if document_ids is None else document_ids[:, :-1]
        # padding may carry the mask's id, whose probability is 0: ask for any other token there
        targets = x0[:, 1:].masked_fill(loss_mask == 0, int(self.mask_id == 0))
        return LossInputs(
            tokens=x0[:, :-1],
            attention_mask=Causal(),
            loss_mask=loss_mask,
            loss_positions=None,
            targets=targets.flatten(),
            weights=loss_mask.flatten(),
            document_ids=seen,
            positions=None if seen is None else positions(seen),
        )

    def denoiser(self, backbone) -> Denoiser:
        """Row i of its output is about token i + 1."""
        return Denoiser(backbone, self.mask_id, 1, Causal())


ALGORITHMS = {
    "ar": Algorithm(
        lambda s: Autoregressive(s.mask_id, s.ignore_bos),
        parameterization="ar",
        sampler="ar",
        writes="ar",
        noise=False,
        causal=True,
        likelihood="exact",
    )
}
