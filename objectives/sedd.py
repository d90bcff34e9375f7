"""Score entropy of the absorbing process: SEDD (arXiv:2310.16834).

The network's output, shifted, is the log of the ratios p_t(y) / p_t(x_t) for changing one hidden
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

from .corruption import Draws, Interval, hidden_independently, hide, times
from .head import LossKernel, wide_dtype
from .loss import without_first
from .question import Objective, Question
from .segments import positions


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
    nats = score.exp_().sum(-1) - ratio * picked + ratio * (ratio.log() - 1)
    if gradient:
        if in_place is None:
            logits.copy_(score)
        logits.scatter_(1, target[:, None], (picked.exp() - ratio)[:, None].to(logits.dtype))
    return nats


@dataclass(frozen=True)
class ScoreEntropy(Objective):
    mask_id: int
    schedule: Schedule
    ignore_bos: bool = True
    time_conditioning: bool = True

    def corrupt(
        self, x0: Tensor, draws: Draws, interval: Interval, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t [B, L] and the times t [B, 1]."""
        t = times(draws.time, interval)
        hidden = hidden_independently(draws.token, self.schedule(t).p)
        return hide(x0, hidden, self.mask_id, self.ignore_bos, segments), t

    def counted(
        self, attention_mask: Tensor, training: bool, segments: Tensor | None = None
    ) -> Tensor:
        return without_first(attention_mask, self.ignore_bos and not training, segments)

    def question(
        self,
        x0: Tensor,
        attention_mask: Tensor,
        draws: Draws,
        *,
        interval: Interval,
        training: bool,
        segments: Tensor | None = None,
    ) -> Question:
        """x0, attention_mask, segments [B, L]; one time per row."""
        x_t, t = self.corrupt(x0, draws, interval, segments)
        counted = self.counted(attention_mask, training, segments)
        return self.question_at(x0, x_t, t, counted, segments=segments)

    def question_at(
        self, x0: Tensor, x_t: Tensor, t: Tensor, counted: Tensor, *, segments=None
    ) -> Question:
        """About a given corruption, t [B, 1]."""
        noise = self.schedule(t)
        expm1 = torch.expm1(noise.sigma)  # [B, 1]
        weight = noise.weight * expm1  # d sigma / d t
        read = ((x_t == self.mask_id) & (counted > 0)).flatten().nonzero()[:, 0]
        return Question(
            tokens=x_t,
            rule=Full(),
            counted=counted,
            read=read,
            targets=x0.flatten()[read],
            weights=(weight * counted).flatten()[read],
            sigma=noise.sigma[:, 0] if self.time_conditioning else None,
            expm1=expm1[:, 0],
            segments=segments,
            positions=None if segments is None else positions(segments),
        )

    def kernel(self, backbone) -> LossKernel:
        return functools.partial(score_entropy, mask_id=self.mask_id)

    def denoiser(self, backbone) -> Score:
        return Score(backbone, self.mask_id, self.time_conditioning)
