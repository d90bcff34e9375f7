"""Masked diffusion inside blocks: BAM-DLM, and MDLM as the case of one block.

The NELBO of arXiv:2503.09573 (L_BD), Rao-Blackwellised as in MDLM (arXiv:2406.07524): weight(t)
times the cross-entropy at the masked tokens. x_t is noised block by block; a block sees itself
noised and the earlier ones clean, all blocks in one pass over [x_t ; x0].
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.adaptation import PLAIN, Adaptation
from models.denoiser import Denoiser
from models.document_ids import begins, positions
from models.masks import Full
from noise_schedule import EPS, NoiseLevel, Schedule

from .adapting import with_ar_loss, with_rows_before
from .algorithms import Algorithm, ObjectiveSettings
from .corruption import EXACT, Interval, Noise, masked_within_bounds, per_token
from .counts import CountLaw, complementary, masked_by_counts, masked_in_sizes
from .loss import LossInputs, MaskingObjective
from .sizes import SizeLaw


@dataclass(frozen=True)
class MaskedDiffusion(MaskingObjective):
    """bamdlm where block_size < L, mdlm where they are equal. `block_size` tokens share one time.

    `full_from`: where the full interval begins (training.sampling_eps). There `resample` has no
    lower bound, as published: forcing a mask on blocks at t near 0, with weight 1/t, would bias the
    NELBO. `whole_window`: samplers see their window as one block (mdlm). `sizes`: by which law each
    row draws its block size in training; else all have `block_size`, as in evaluation. `adapt`:
    what a network that began as AR keeps; shifted with `ignore_bos` only. `ar_loss`: how often the
    AR loss on the clean half counts in training.
    """

    mask_id: int
    block_size: int
    schedule: Schedule
    ignore_bos: bool = True
    resample: bool = False
    full_from: float = EPS
    whole_window: bool = False
    sizes: SizeLaw | None = None
    adapt: Adaptation = PLAIN
    ar_loss: float = 0.0

    def noise_block(self, length: int) -> int:
        return self.block_size

    def noise_level(self, t: Tensor, interval: Interval) -> NoiseLevel:
        """The schedule; at the exact interval (1, 1) everything is masked with weight 1."""
        if interval == EXACT:
            return NoiseLevel(p=torch.ones_like(t), weight=torch.ones_like(t))
        return self.schedule(t)

    def bounds(self, interval: Interval) -> Interval:
        """Of the masked share of a block."""
        lo, hi = interval if self.resample else (0.0, 1.0)
        return (0.0 if lo <= self.full_from + 1e-6 else lo, hi)

    def drawn_masks(self, noise: Noise, p: Tensor, interval: Interval) -> Tensor:
        if self.resample:
            return masked_within_bounds(noise.token, noise.count, p, self.bounds(interval))
        return super().drawn_masks(noise, p, interval)

    def inputs_by_counts(
        self,
        x0: Tensor,
        valid: Tensor,
        noise: Noise,
        *,
        law: CountLaw,
        document_ids: Tensor | None = None,
    ) -> LossInputs:
        """For training: of each block a drawn number of tokens is masked (objectives/counts.py),
        which noise.time draws. With `ignore_bos` the first token of a text is none of the block's
        scored tokens; arguments as for `loss_inputs`."""
        loss_mask = self.loss_mask(valid, True, document_ids)
        drawn = law, noise.time, noise.token, self._scored(x0, loss_mask, document_ids)
        if noise.sizes is None:
            masked, weight = masked_by_counts(*drawn)
        else:
            masked, weight = masked_in_sizes(*drawn, noise.sizes)
        x_t = torch.where(masked, self.mask_id, x0)
        return self.weighted_inputs(x0, x_t, weight.float(), loss_mask, document_ids, noise.sizes)

    def inputs_by_views(
        self, x0: Tensor, valid: Tensor, noise: Noise, *, document_ids: Tensor | None = None
    ) -> LossInputs:
        """For training: two noised versions of a text, whose masks are complementary, share its
        clean half. With blocks only; arguments as for `inputs_by_counts`."""
        loss_mask = self.loss_mask(valid, True, document_ids)
        scored = self._scored(x0, loss_mask, document_ids)
        masked, weight = complementary(noise.time, noise.token, scored)
        x_t = torch.where(masked, self.mask_id, x0[:, None])  # [B, 2, L]
        read = masked.flatten().nonzero()[:, 0]
        places = None if document_ids is None else positions(document_ids)
        inputs = LossInputs(
            tokens=torch.cat([x_t.flatten(1), x0], 1),
            attention_mask=self.adapt.training_mask(self.block_size, views=2),
            loss_mask=loss_mask,
            loss_positions=read,
            targets=x0[:, None].expand_as(x_t).flatten()[read],
            weights=weight.float().flatten()[read],
            document_ids=None if document_ids is None else torch.cat([document_ids] * 3, 1),
            positions=None if places is None else torch.cat([places] * 3, 1),
        )
        return with_rows_before(inputs, self.block_size) if self.adapt.shifted else inputs

    def with_ar_loss(
        self, inputs: LossInputs, x0: Tensor, document_ids: Tensor | None = None
    ) -> LossInputs:
        """Inputs of training with the AR loss of the clean half, where it counts."""
        if not self.ar_loss:
            return inputs
        return with_ar_loss(inputs, x0, document_ids, self.ar_loss)

    def _scored(self, x0: Tensor, loss_mask: Tensor, document_ids: Tensor | None) -> Tensor:
        """The tokens that noise by counts may mask, boolean [B, L]."""
        scored = loss_mask > 0
        return scored & ~begins(x0, document_ids) if self.ignore_bos else scored

    def loss_inputs_at(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        loss_mask: Tensor,
        *,
        interval: Interval,
        document_ids: Tensor | None = None,
        block_sizes: Tensor | None = None,
    ) -> LossInputs:
        """Of a given corruption: nothing random is left (but dropout). t [B, N], or with
        block_sizes [B] that of each token, [B, L]."""
        weight = per_token(self.noise_level(t, interval).weight, x0.shape[1])
        return self.weighted_inputs(x0, x_t, weight, loss_mask, document_ids, block_sizes)

    def weighted_inputs(
        self,
        x0: Tensor,
        x_t: Tensor,
        weight: Tensor,
        loss_mask: Tensor,
        document_ids: Tensor | None = None,
        block_sizes: Tensor | None = None,
    ) -> LossInputs:
        """weight float32 [B, L]: of each masked token. With one block nobody would attend to the
        clean half: it is not built. block_sizes [B]: where rows differ in them, in place of
        block_size."""
        places = None if document_ids is None else positions(document_ids)
        tokens, attention_mask = x_t, Full()
        size = self.block_size if block_sizes is None else self.sizes.common
        if block_sizes is not None or size < x_t.shape[1]:
            tokens = torch.cat([x_t, x0], 1)
            attention_mask = self.adapt.training_mask(size)
            if document_ids is not None:
                document_ids, places = torch.cat([document_ids] * 2, 1), torch.cat([places] * 2, 1)
        inputs = LossInputs(
            **self.targets(x0, x_t, weight, loss_mask),
            tokens=tokens,
            attention_mask=attention_mask,
            document_ids=document_ids,
            positions=places,
            block_sizes=block_sizes,
        )
        return with_rows_before(inputs, self.block_size) if self.adapt.shifted else inputs

    def denoiser(self, backbone) -> Denoiser:
        """What samplers call."""
        size = self.block_size
        attention_mask = Full() if self.whole_window else self.adapt.sampling_mask(size)
        return Denoiser(backbone, self.mask_id, size, attention_mask, self.adapt)


def _in_blocks(s: ObjectiveSettings) -> MaskedDiffusion:
    return MaskedDiffusion(
        s.mask_id,
        s.block_size,
        s.schedule,
        s.ignore_bos,
        s.resample,
        s.full_from,
        sizes=s.sizes,
        adapt=s.adapt,
        ar_loss=s.ar_loss,
    )


def _whole(s: ObjectiveSettings) -> MaskedDiffusion:
    """mdlm's block_size is the window of its sampler; it is trained on whole sequences."""
    return replace(_in_blocks(s), block_size=s.length, whole_window=True)


ALGORITHMS = {
    "bamdlm": Algorithm(
        _in_blocks,
        parameterization="subs",
        sampler="semi_ar",
        writes="bamdlm",
        blocks=True,
        counts=True,
    ),
    "mdlm": Algorithm(
        _whole, parameterization="subs", sampler="semi_ar", writes="mdlm", counts=True
    ),
}
