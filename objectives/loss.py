"""The loss of a batch: what the network computes it from, and what comes out.

The inputs are made where the batch lies, on the host: which tokens are masked is drawn there, so
the number of loss positions is known and the host never waits for the device.
"""

from dataclasses import dataclass, replace

import torch
from einops import reduce
from torch import Tensor

from models.document_ids import begins
from models.masks import AttentionMask, BlockDiffusion
from noise_schedule import NoiseLevel

from .corruption import Interval, Noise, mask_tokens, masked_independently, times
from .head import LossKernel, cross_entropy_kernel, head_loss
from .sizes import SizeLaw


@dataclass(frozen=True)
class TokenLoss:
    """nll [B, L]: nats per token, or their bound; 0 where nothing was predicted or outside the loss
    mask. loss_mask [B, L]: 1 or 0. Both without a graph.

    per_place: sum of nll / (B L), with a graph. Training minimises this, as it can be averaged over
    micro-batches and ranks; training/health.py then divides by the share of tokens that count.
    Where there is an AR loss, per_place has it too, times its factor; ar: itself, the sum of its
    nll / (B L), without a graph.
    """

    nll: Tensor
    loss_mask: Tensor
    per_place: Tensor
    ar: Tensor | None = None

    @property
    def parts(self) -> Tensor:
        """per_place, or [2] with `ar`: what a step of training reports."""
        return self.per_place if self.ar is None else torch.stack([self.per_place, self.ar])

    @property
    def mean(self) -> Tensor:
        """Sum of nll / sum of loss_mask, with a graph; 0 where no token counts."""
        return self.per_place * (self.loss_mask.numel() / self.loss_mask.sum().clamp(min=1))

    def block_means(self, block_size: int, real: Tensor | None = None) -> Tensor:
        """Mean nats of each block, [B, N]: what the clipped-schedule search compares. real [B, L]:
        1 where a token is no padding; the means are over these, nan where there are none."""
        sums = reduce(self.nll, "b (n k) -> b n", "sum", k=block_size)
        if real is None:
            return sums / block_size
        return sums / reduce(real, "b (n k) -> b n", "sum", k=block_size)


@dataclass(frozen=True)
class LossInputs:
    """`loss_positions`: which rows of the network's output, flattened, predict a token that enters
    the loss; None: all. M is their number; the training loss is sum(weights * nll) / (B L). With
    two views the output of a row is that of one and then of the other.

    `places`: where these tokens are among all [B, L], or with two views [B, 2, L], flattened; B L
    and more: nowhere. None: at loss_positions. `ar_weights`: 1 where the row enters the AR loss on
    the clean half, which counts `ar_loss` times; its `weights` are those of diffusion alone."""

    tokens: Tensor  # int64 [B, T], what the network sees
    attention_mask: AttentionMask
    loss_mask: Tensor  # float32 [B, L], see TokenLoss
    loss_positions: Tensor | None  # int64 [M]
    targets: Tensor  # int64 [M]
    weights: Tensor  # float32 [M]
    sigma: Tensor | None = None  # [B], the noise level where the network is told
    expm1: Tensor | None = None  # [B], e^sigma - 1 where the loss needs it
    document_ids: Tensor | None = None  # int64 [B, T]
    positions: Tensor | None = None  # int64 [B, T]
    block_sizes: Tensor | None = None  # int64 [B], where rows differ in them
    places: Tensor | None = None  # int64 [M]
    ar_weights: Tensor | None = None  # float32 [M]
    ar_loss: float = 0.0

    @property
    def predicted(self) -> Tensor | None:
        """Where the tokens are that enter the loss, int64 [M]; None: all."""
        return self.loss_positions if self.places is None else self.places

    @property
    def masked(self) -> float | None:
        """How many tokens diffusion predicts, in a view; None: all."""
        if self.loss_positions is None:
            return None
        read = self.loss_positions if self.ar_weights is None else self.weights.nonzero()
        return len(read) / self.views

    @property
    def outputs(self) -> int:
        """Rows of the network's output."""
        rows, tokens = self.tokens.shape
        if isinstance(self.attention_mask, BlockDiffusion):
            tokens = self.attention_mask.answered(tokens)
        return rows * tokens

    @property
    def views(self) -> int:
        """Of each text that the network's output has."""
        return getattr(self.attention_mask, "views", 1)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, pinned: bool = True) -> "LossInputs":
        """On the device; by way of pinned memory without waiting for it."""
        if self.tokens.device == device:
            return self
        pinned = pinned and device.type != "cpu" and self.tokens.device.type == "cpu"

        def sent(x: Tensor) -> Tensor:
            # a part of a tensor would be copied on the way, to memory that is not pinned
            return (x.contiguous().pin_memory() if pinned else x).to(device, non_blocking=pinned)

        return replace(self, **{name: sent(x) for name, x in self.tensors().items()})

    def padded(self, rows: int) -> "LossInputs":
        """With `rows` loss positions (at most all); those added have weight 0."""
        positions = self.loss_positions
        if positions is None or len(positions) >= rows:
            return self
        free = torch.ones(self.outputs, dtype=torch.bool, device=positions.device)
        free[positions] = False
        more = free.nonzero()[: rows - len(positions), 0]
        # their target is that of a row that counts: never the mask, whose probability is 0
        target = self.targets[:1] if len(self.targets) else self.targets.new_zeros(1)
        made = {
            "loss_positions": torch.cat([positions, more]),
            "targets": torch.cat([self.targets, target.expand(len(more))]),
        }
        nowhere = self.views * self.loss_mask.numel()
        for name, value in {"weights": 0, "places": nowhere, "ar_weights": 0}.items():
            if (held := getattr(self, name)) is not None:
                made[name] = torch.cat([held, held.new_full((len(more),), value)])
        return replace(self, **made)


class Objective:
    """An objective defines `loss_inputs` of a batch and `kernel`, the loss on the logits; one that
    draws noise also `loss_inputs_at` of a given corruption. The rest follows."""

    draws_noise = True
    sizes: SizeLaw | None = None  # by which rows draw the size of their blocks in training
    ar_loss = 0.0  # how often an AR loss on the clean half counts

    def noise_block(self, length: int) -> int:
        """How many tokens of a row of `length` share one time: all, unless there are blocks."""
        return length

    def kernel(self, backbone) -> LossKernel:
        return cross_entropy_kernel(backbone, self.mask_id)

    def compute_loss(self, backbone, inputs: LossInputs) -> TokenLoss:
        """The loss of what the network predicts."""
        hidden = backbone.hidden(
            inputs.tokens,
            inputs.sigma,
            attention_mask=inputs.attention_mask,
            positions=inputs.positions,
            document_ids=inputs.document_ids,
            block_sizes=inputs.block_sizes,
            read=inputs.loss_positions,
        )
        loss_mask, positions, places = inputs.loss_mask, inputs.loss_positions, inputs.predicted
        row = None if inputs.expm1 is None else positions // inputs.tokens.shape[1]
        # a tensor: by a number, a GPU would multiply by its rounded inverse
        number = loss_mask.new_full((), loss_mask.numel())
        weights = inputs.weights
        if inputs.ar_weights is not None:
            weights = weights + inputs.ar_loss * inputs.ar_weights
        head = head_loss(
            backbone,
            hidden.flatten(0, -2),
            inputs.targets,
            weights / number,
            self.kernel(backbone),
            *(() if inputs.expm1 is None else (inputs.expm1[row],)),
            sigma=inputs.sigma,
            row=row,
        )
        nll = head.losses * inputs.weights
        if places is not None:
            # one more, for rows that predict nothing of the loss mask
            outputs = nll.new_zeros(inputs.views * loss_mask.numel() + 1)
            nll = outputs.index_copy_(0, places, nll)[:-1]
        if inputs.views > 1:
            nll = nll.view(len(loss_mask), inputs.views, -1).sum(1)
        nll = nll.view_as(loss_mask)
        ar = None
        if inputs.ar_weights is not None:
            ar = (head.losses * inputs.ar_weights).sum() / number
        return TokenLoss(nll=nll, loss_mask=loss_mask, per_place=head.total, ar=ar)

    def loss(self, backbone, *batch, **settings) -> TokenLoss:
        """The loss of a batch; arguments as for `loss_inputs`."""
        return self.compute_loss(backbone, self.loss_inputs(*batch, **settings))


class MaskingObjective(Objective):
    """One whose noise masks tokens. It has a `schedule` and defines `loss_inputs_at`; x0, valid,
    document_ids and x_t are [B, L]."""

    def noise_level(self, t: Tensor, interval: Interval) -> NoiseLevel:
        """At times t of any shape, drawn from the interval."""
        return self.schedule(t)

    def drawn_masks(self, noise: Noise, p: Tensor, interval: Interval) -> Tensor:
        """Which tokens are masked, boolean [B, L]; p [B, N]: how likely."""
        return masked_independently(noise.token, p)

    def corrupt(
        self, x0: Tensor, noise: Noise, interval: Interval, document_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t [B, L] and the times t [B, N] of its blocks."""
        t = times(noise.time, interval)
        masked = self.drawn_masks(noise, self.noise_level(t, interval).p, interval)
        return mask_tokens(x0, masked, self.mask_id, self.ignore_bos, document_ids), t

    def loss_mask(
        self, valid: Tensor, training: bool, document_ids: Tensor | None = None
    ) -> Tensor:
        """Which tokens enter the mean, float32 in a tensor of its own. A text's position 0 stays in
        the training mean (as published), not in evaluation."""
        loss_mask = valid.to(torch.float32, copy=True)
        if self.ignore_bos and not training:
            loss_mask.masked_fill_(begins(valid, document_ids), 0)
        return loss_mask

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
        """valid: 1 where a token may enter the loss; the others stay visible. Only the full
        interval gives a bound."""
        x_t, t = self.corrupt(x0, noise, interval, document_ids)
        x_t = torch.where(valid > 0, x_t, x0)
        mask = self.loss_mask(valid, training, document_ids)
        settings = {"interval": interval, "document_ids": document_ids}
        if noise.sizes is not None:  # of an objective that has blocks
            settings["block_sizes"] = noise.sizes
        return self.loss_inputs_at(x0, x_t, t, mask, **settings)

    def targets(self, x0: Tensor, x_t: Tensor, weight: Tensor, loss_mask: Tensor) -> dict:
        """Fields of LossInputs: the masked tokens are predicted. weight [B, L] or [B, 1]."""
        # padding may carry the mask's id (GPT-2): what is outside the loss mask is not predicted
        masked = (x_t == self.mask_id) & (loss_mask > 0)
        loss_positions = masked.flatten().nonzero()[:, 0]  # [M]
        return {
            "loss_mask": loss_mask,
            "loss_positions": loss_positions,
            "targets": x0.flatten()[loss_positions],
            "weights": (weight * loss_mask).flatten()[loss_positions],
        }
