"""Attention under the mask of block diffusion by its own kernels (kernels/block_diffusion.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.block_diffusion import block_diffusion, can_attend, rotated_block_diffusion
from .kernels.heads import can_split


@dataclass(frozen=True)
class ByKernel:
    """What attention.py calls `attend`, on a GPU where kernels can start; `otherwise`: the same for
    what they do not take."""

    length: int  # of the text; the other fields are those of BlockDiffusion
    views: int
    block_size: int
    causal: bool
    otherwise: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self._able(q.dtype, q.shape[1], q.shape[-1]):
            return self.otherwise(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return block_diffusion(q, k, v, *self._mask())[0].transpose(1, 2)

    def takes(self, qkv: Tensor, heads: int) -> bool:
        """Whether `rotated` can take them, and is worth it: gradients are wanted."""
        able = self._able(qkv.dtype, heads, qkv.shape[-1] // 3 // heads)
        return able and can_split(qkv, heads)

    def rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """qkv [B, T, 3 H D] of all parts, not rotated yet -> [B, T, H D]; cos, sin as for
        `rotated_heads`. The backward pass writes the gradient of qkv once."""
        return rotated_block_diffusion(qkv, cos, sin, heads, *self._mask())[0].flatten(2)

    def _able(self, dtype: torch.dtype, heads: int, head_width: int) -> bool:
        return can_attend(dtype, heads, head_width, (self.views + 1) * self.length)

    def _mask(self) -> tuple[int, int, int, bool]:
        return self.length, self.views, self.block_size, self.causal
