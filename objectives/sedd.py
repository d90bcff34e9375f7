"""Score entropy of the absorbing process: SEDD (arXiv:2310.16834).

The network's output, shifted, is the log of the ratios p_t(y) / p_t(x_t) for changing one masked
token to y.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.denoiser import Score
from models.masks import Full
from noise_schedule import Schedule

from .algorithms import Algorithm
from .corruption import Interval, Noise, mask_tokens, masked_independently, times
from .document_ids import positions
from .head import LossKernel, wide_dtype
from .loss import without_first
from .loss_inputs import LossInputs, Objective


def score_entropy(
    logits: Tensor, target: Tensor, gradient: bool, expm1: Tensor, *, mask_id: int
) -> Tensor:
    """sum_y score(y) - ratio log score(x0) + ratio (ln ratio - 1), where ratio = 1 / (e^sigma - 1);
    >= 0, and 0 at the true score of a known token."""
    ratio = 1 / expm1
    logits[:, mask_id] = -torch.inf
    shift = (expm1.log() + math.log(logits.shape[1] - 1))[:, None]
    in_place = logits if logits.dtype == wide_dtype(logits) else None
    score = torch.sub(logits, shift, out=in_place)
    picked = score.gather(1, target[:, None])[:, 0]
    entropy = score.exp_().sum(-1) - ratio * picked + ratio * (ratio.log() - 1)
    if gradient:
        if in_place is None:
            logits.copy_(score)
        logits.scatter_(1, target[:, None], (picked.exp() - ratio)[:, None].to(logits.dtype))
    return entropy


@dataclass(frozen=True)
class ScoreEntropy(Objective):
    mask_id: int
    schedule: Schedule
    ignore_bos: bool = True
    time_conditioning: bool = True

    def corrupt(
        self, x0: Tensor, noise: Noise, interval: Interval, document_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t [B, L] and the times t [B, 1]."""
        t = times(noise.time, interval)
        masked = masked_independently(noise.token, self.schedule(t).p)
        return mask_tokens(x0, masked, self.mask_id, self.ignore_bos, document_ids), t

    def loss_mask(
        self, valid: Tensor, training: bool, document_ids: Tensor | None = None
    ) -> Tensor:
        return without_first(valid, self.ignore_bos and not training, document_ids)

    def loss_inputs(
        self,
        x0: Tensor,
        valid: Tensor,
        noise: Noise,
        *,
        interval: Interval,
        training: bool,
        document_ids: Tensor | None = None,
    ) -> LossInputs:
        """x0, valid, document_ids [B, L]; one time per row. valid: 1 where a token may enter the
        loss."""
        x_t, t = self.corrupt(x0, noise, interval, document_ids)
        loss_mask = self.loss_mask(valid, training, document_ids)
        return self.loss_inputs_at(x0, x_t, t, loss_mask, document_ids=document_ids)

    def loss_inputs_at(
        self, x0: Tensor, x_t: Tensor, t: Tensor, loss_mask: Tensor, *, document_ids=None
    ) -> LossInputs:
        """Of a given corruption, t [B, 1]."""
        level = self.schedule(t)
        expm1 = torch.expm1(level.sigma)  # [B, 1]
        weight = level.weight * expm1  # d sigma / d t
        masked = (x_t == self.mask_id) & (loss_mask > 0)
        loss_positions = masked.flatten().nonzero()[:, 0]  # [M]
        return LossInputs(
            tokens=x_t,
            attention_mask=Full(),
            loss_mask=loss_mask,
            loss_positions=loss_positions,
            targets=x0.flatten()[loss_positions],
            weights=(weight * loss_mask).flatten()[loss_positions],
            sigma=level.sigma[:, 0] if self.time_conditioning else None,
            expm1=expm1[:, 0],
            document_ids=document_ids,
            positions=None if document_ids is None else positions(document_ids),
        )

    def kernel(self, backbone) -> LossKernel:
        return functools.partial(score_entropy, mask_id=self.mask_id)

    def denoiser(self, backbone) -> Score:
        return Score(backbone, self.mask_id, self.time_conditioning)


ALGORITHMS = {
    "sedd": Algorithm(
        lambda s: ScoreEntropy(s.mask_id, s.schedule, s.ignore_bos, s.time_conditioning),
        parameterization="sedd",
        sampler="analytic",
        writes="sedd",
        time_conditioning=True,
    )
}
