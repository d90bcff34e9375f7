"""Attention under the mask of block diffusion by its own kernels (kernels/block_diffusion.py)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .kernels.block_diffusion import block_diffusion, can_attend, rotated_block_diffusion
from .kernels.heads import can_split


@dataclass(frozen=True)
class ByKernel:
    """What attention.py calls `attend`; `otherwise`: the same where the kernels cannot start."""

    length: int  # of the text; the other fields are those of BlockDiffusion
    views: int
    block_size: int
    causal: bool
    otherwise: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not can_attend(q, self.length, self.block_size):
            return self.otherwise(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return block_diffusion(q, k, v, *self._mask())[0].transpose(1, 2)

    def takes(self, qkv: Tensor, heads: int) -> bool:
        """Whether `rotated` can take them, and is worth it: gradients are wanted."""
        q = qkv.chunk(3, -1)[0].unflatten(-1, (heads, -1))
        return can_split(qkv, heads) and can_attend(q, self.length, self.block_size)

    def rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """qkv [B, T, 3 H D] of all parts, not rotated yet -> [B, T, H D]; cos, sin as for
        `rotated_heads`. The backward pass writes the gradient of qkv once."""
        return rotated_block_diffusion(qkv, cos, sin, heads, *self._mask())[0].flatten(2)

    def _mask(self) -> tuple[int, int, int, bool]:
        return self.length, self.views, self.block_size, self.causal
