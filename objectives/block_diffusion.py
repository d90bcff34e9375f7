"""Masked diffusion inside blocks: BAM-DLM, and MDLM as the case of one block.

The NELBO of arXiv:2503.09573 (L_BD), Rao-Blackwellised as in MDLM (arXiv:2406.07524): weight(t)
times the cross-entropy at the hidden tokens. x_t is noised block by block; a block sees itself
noised and the earlier ones clean, all blocks in one pass over [x_t ; x0].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.masks import BlockCausal, BlockDiffusion, Full
from noise_schedule import EPS, Noise, Schedule

from .corruption import (
    EXACT,
    Draws,
    Interval,
    hidden_independently,
    hidden_within_bounds,
    hide,
    per_token,
    times,
)
from .loss import without_first
from .question import Objective, Question
from .segments import positions


@dataclass(frozen=True)
class MaskedDiffusion(Objective):
    """bamdlm where block_size < L, mdlm where they are equal. `block_size` tokens share one time.

    `full_from`: where the full interval begins (training.sampling_eps). There `resample` has no
    lower bound, as published: forcing a mask on blocks at t near 0, with weight 1/t, would bias the
    NELBO.
    """

    mask_id: int
    block_size: int
    schedule: Schedule
    ignore_bos: bool = True
    resample: bool = False
    full_from: float = EPS

    def noise(self, t: Tensor, interval: Interval) -> Noise:
        """The schedule; at the exact interval (1, 1) everything is hidden with weight 1."""
        if interval == EXACT:
            return Noise(p=torch.ones_like(t), weight=torch.ones_like(t))
        return self.schedule(t)

    def corrupt(
        self, x0: Tensor, draws: Draws, interval: Interval, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t [B, L] and the times t [B, N] of its blocks."""
        t = times(draws.time, interval)
        p = self.noise(t, interval).p
        if self.resample:
            lo, hi = interval
            bounds = (0.0 if lo <= self.full_from + 1e-6 else lo, hi)
            hidden = hidden_within_bounds(draws.token, draws.count, p, bounds)
        else:
            hidden = hidden_independently(draws.token, p)
        return hide(x0, hidden, self.mask_id, self.ignore_bos, segments), t

    def counted(
        self, attention_mask: Tensor, training: bool, segments: Tensor | None = None
    ) -> Tensor:
        """Which tokens enter the mean. A text's position 0 stays in the training mean (as
        published), not in evaluation."""
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
        """x0, attention_mask, segments [B, L]. Only the full interval bounds the likelihood."""
        x_t, t = self.corrupt(x0, draws, interval, segments)
        counted = self.counted(attention_mask, training, segments)
        return self.question_at(x0, x_t, t, counted, interval=interval, segments=segments)

    def question_at(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        counted: Tensor,
        *,
        interval: Interval,
        segments: Tensor | None = None,
    ) -> Question:
        """About a given corruption: nothing random is left (but dropout). With one block nobody
        would read the clean half: it is not built."""
        places = None if segments is None else positions(segments)
        tokens, rule = x_t, Full()
        if self.block_size < x_t.shape[1]:
            tokens, rule = torch.cat([x_t, x0], 1), BlockDiffusion(self.block_size)
            if segments is not None:
                segments, places = torch.cat([segments] * 2, 1), torch.cat([places] * 2, 1)
        weight = per_token(self.noise(t, interval).weight, x0.shape[1])
        # padding may carry the mask's id (GPT-2): what is not counted is not asked about
        read = ((x_t == self.mask_id) & (counted > 0)).flatten().nonzero()[:, 0]  # [M]
        return Question(
            tokens=tokens,
            rule=rule,
            counted=counted,
            read=read,
            targets=x0.flatten()[read],
            weights=(weight * counted).flatten()[read],
            segments=segments,
            positions=places,
        )

    def denoiser(self, backbone, *, whole_window: bool) -> Denoiser:
        """The questions samplers ask. whole_window: mdlm, the visible window is one block."""
        rule = Full() if whole_window else BlockCausal(self.block_size)
        return Denoiser(backbone, self.mask_id, self.block_size, rule)
