"""What an objective returns about a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .segments import begins


@dataclass(frozen=True)
class TokenLoss:
    """nats [B, L] per token (0 where nothing was predicted or not counted), counted [B, L] 1 or 0,
    both without a graph; mean: the training loss, sum of counted nats / number counted."""

    nats: Tensor
    counted: Tensor
    mean: Tensor

    def block_means(self, block_size: int, real: Tensor | None = None) -> Tensor:
        """Mean nats of each block, [B, N]: what the clipped-schedule search compares. real [B, L]:
        1 where a token is no padding; the means are over these, and nan where there are none."""
        sums = self.nats.unflatten(1, (-1, block_size)).sum(-1)
        if real is None:
            return sums / block_size
        return sums / real.unflatten(1, (-1, block_size)).sum(-1)


def scattered(nats: Tensor, read: Tensor, like: Tensor) -> Tensor:
    """nats [M] at the flat indices `read`, 0 elsewhere, in the shape of `like` [B, L]."""
    out = torch.zeros(like.numel(), dtype=nats.dtype, device=nats.device)
    return out.index_copy_(0, read, nats).view(like.shape)


def without_first(attention_mask: Tensor, drop: bool, segments: Tensor | None = None) -> Tensor:
    """The counted tokens as float32, in a tensor of their own; the first of each text left out with
    `drop`."""
    counted = attention_mask.to(torch.float32, copy=True)
    if drop:
        counted.masked_fill_(begins(attention_mask, segments), 0)
    return counted
