"""What an objective returns about a batch."""

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from models.document_ids import begins


@dataclass(frozen=True)
class TokenLoss:
    """nll [B, L]: nats per token, or their bound; 0 where nothing was predicted or outside the loss
    mask. loss_mask [B, L]: 1 or 0. Both without a graph.

    per_place: sum of nll / (B L), with a graph. Training minimises this, as it can be averaged over
    micro-batches and ranks; training/health.py then divides by the share of tokens that count.
    """

    nll: Tensor
    loss_mask: Tensor
    per_place: Tensor

    @property
    def mean(self) -> Tensor:
        """Sum of nll / sum of loss_mask, with a graph; 0 where no token counts."""
        return self.per_place * (self.loss_mask.numel() / self.loss_mask.sum().clamp(min=1))

    def block_means(self, block_size: int, real: Tensor | None = None) -> Tensor:
        """Mean nats of each block, [B, N]: what the clipped-schedule search compares. real [B, L]:
        1 where a token is no padding; the means are over these, and nan where there are none."""
        sums = reduce(self.nll, "b (n k) -> b n", "sum", k=block_size)
        if real is None:
            return sums / block_size
        return sums / reduce(real, "b (n k) -> b n", "sum", k=block_size)


def scattered(nll: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    """nll [M] at the flat indices `positions`, 0 elsewhere, in the shape of `like` [B, L]."""
    out = torch.zeros(like.numel(), dtype=nll.dtype, device=nll.device)
    return out.index_copy_(0, positions, nll).view(like.shape)


def without_first(valid: Tensor, drop: bool, document_ids: Tensor | None = None) -> Tensor:
    """The loss mask [B, L], float32, in a tensor of its own: the valid tokens; with `drop` without
    the first of each text."""
    loss_mask = valid.to(torch.float32, copy=True)
    if drop:
        loss_mask.masked_fill_(begins(valid, document_ids), 0)
    return loss_mask
