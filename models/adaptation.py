"""How a block diffusion model keeps what an AR network has learnt: what its clean tokens see, and
where the prediction of a token is read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import BlockCausal, BlockDiffusion, CausalClean


@dataclass(frozen=True)
class Adaptation:
    """causal: a clean token sees itself and the clean tokens before it, as in an AR network, in
    place of its whole block (adapt.clean). shifted: the prediction of token i is read at token i -
    1, for the first token of a block at the clean token before it (adapt.label)."""

    causal: bool = False
    shifted: bool = False

    @classmethod
    def named(cls, clean: str = "block", label: str = "same", **others) -> "Adaptation":
        """By the settings adapt.*."""
        return cls(clean == "causal", label == "next")

    def clean_mask(self, block_size: int) -> BlockCausal:
        """Over a text that is clean."""
        return BlockCausal(1 if self.causal else block_size)

    def training_mask(self, block_size: int, views: int = 1) -> BlockDiffusion:
        """Over [x_t ; x0]."""
        return BlockDiffusion(block_size, views, causal=self.causal, both=self.shifted)

    def sampling_mask(self, block_size: int, window: int | None = None):
        """Over clean blocks and one that is being written."""
        return (CausalClean if self.causal else BlockCausal)(block_size, window)


PLAIN = Adaptation()


def open_blocks(tokens: Tensor, mask_id: int, block_size: int, first: Tensor | None) -> Tensor:
    """Which of tokens [B, T] are in a block of which a mask is among them, boolean [B, T]: that
    block is being written. first int64 [B]: the position of each row's first token, None: 0."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if first is not None:
        place = place + first[:, None] % block_size
    block = place // block_size
    held = tokens.new_zeros(len(tokens), tokens.shape[1] // block_size + 2)
    held.scatter_add_(1, block, (tokens == mask_id).to(held.dtype))
    return held.gather(1, block) > 0
