"""Score entropy of the absorbing process: SEDD (arXiv:2310.16834).

The network's output, shifted, is the log of the ratios p_t(y) / p_t(x_t) for changing one masked
token to y.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.denoiser import Score
from models.document_ids import positions
from models.layers import wide_dtype
from models.masks import Full
from noise_schedule import Schedule

from .algorithms import Algorithm
from .head import LossKernel, RowSums
from .loss import LossInputs, MaskingObjective


def score_entropy(
    logits: Tensor, target: Tensor, gradient: bool, expm1: Tensor, *, mask_id: int
) -> Tensor:
    """sum_y score(y) - ratio log score(x0) + ratio (ln ratio - 1), where ratio = 1 / (e^sigma - 1);
    >= 0, and 0 at the true score of a known token."""
    ratio = 1 / expm1
    logits[:, mask_id] = -torch.inf
    shift = _shift(expm1, logits.shape[1])[:, None]
    in_place = logits if logits.dtype == wide_dtype(logits) else None
    score = torch.sub(logits, shift, out=in_place)
    picked = score.gather(1, target[:, None])[:, 0]
    entropy = score.exp_().sum(-1) - ratio * picked + ratio * (ratio.log() - 1)
    if gradient:
        if in_place is None:
            logits.copy_(score)
        logits.scatter_(1, target[:, None], (picked.exp() - ratio)[:, None].to(logits.dtype))
    return entropy


def score_entropy_of_sums(sums: RowSums, expm1: Tensor, *, vocab_size: int) -> Tensor:
    """`score_entropy`, from what it needs of a row of logits."""
    ratio, shift = 1 / expm1, _shift(expm1, vocab_size)
    return (sums.norm - shift).exp() - ratio * (sums.picked - shift) + ratio * (ratio.log() - 1)


def _shift(expm1: Tensor, vocab_size: int) -> Tensor:
    """What a logit is above the log of its score."""
    return expm1.log() + math.log(vocab_size - 1)


@dataclass(frozen=True)
class ScoreEntropy(MaskingObjective):
    """One time per row."""

    mask_id: int
    schedule: Schedule
    ignore_bos: bool = True
    time_conditioning: bool = True

    def loss_inputs_at(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        loss_mask: Tensor,
        *,
        interval: object = None,
        document_ids: Tensor | None = None,
    ) -> LossInputs:
        """Of a given corruption, t [B, 1]; the interval does not matter."""
        level = self.schedule(t)
        expm1 = torch.expm1(level.sigma)  # [B, 1]
        weight = level.weight * expm1  # d sigma / d t
        return LossInputs(
            **self.targets(x0, x_t, weight, loss_mask),
            tokens=x_t,
            attention_mask=Full(),
            sigma=level.sigma[:, 0] if self.time_conditioning else None,
            expm1=expm1[:, 0],
            document_ids=document_ids,
            positions=None if document_ids is None else positions(document_ids),
        )

    def kernel(self, backbone) -> LossKernel:
        of_logits = partial(score_entropy, mask_id=self.mask_id)
        of_sums = partial(score_entropy_of_sums, vocab_size=backbone.vocab_size)
        return LossKernel(of_logits, of_sums, self.mask_id)

    def denoiser(self, backbone) -> Score:
        return Score(backbone, self.mask_id, self.time_conditioning)


ALGORITHMS = {
    "sedd": Algorithm(
        lambda s: ScoreEntropy(s.mask_id, s.schedule, s.ignore_bos, s.time_conditioning),
        parameterization="sedd",
        sampler="analytic",
        writes="sedd",
        likelihood="nelbo",
        time_conditioning=True,
    )
}
