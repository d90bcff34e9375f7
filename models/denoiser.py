"""What samplers call: a network behind the interface that they know."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adaptation import PLAIN, Adaptation, open_blocks
from .cache import KVCache
from .compiling import compiled, compiling
from .masks import AttentionMask, CausalClean, Full


@dataclass(frozen=True)
class Denoiser:
    """p(x0 | visible tokens) at chosen positions; of ar: p(token i + 1) at position i."""

    backbone: torch.nn.Module
    mask_id: int
    block_size: int
    attention_mask: AttentionMask
    adapt: Adaptation = PLAIN
    recordable = True  # as a CUDA graph: no shape depends on values, and the host is not asked

    @property
    def shifted(self) -> bool:
        """Whether it answers for a token at the one before: the first of a text has none."""
        return self.adapt.shifted

    @property
    def compiled(self) -> bool:
        return self.backbone.compiled

    def in_blocks(self, size: int) -> "Denoiser":
        """The same network, asked in blocks of `size`; of one that has blocks."""
        if size == self.block_size:
            return self
        return replace(self, block_size=size, attention_mask=self.adapt.sampling_mask(size))

    def seen(self, tokens: Tensor, cache: KVCache | None = None) -> dict:
        """Who sees whom among tokens [B, T]: arguments of `Network.hidden`."""
        mask = self.attention_mask if cache is None else cache.attention_mask
        if not isinstance(mask, CausalClean):
            return {"attention_mask": mask}
        first = None if cache is None else cache.committed
        opened = open_blocks(tokens, self.mask_id, mask.block_size, first)
        return {"attention_mask": mask, "open_blocks": opened}

    def __call__(self, tokens: Tensor, read: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T], read [B, R] positions in 0..T-1 -> normalised log-probabilities float32
        [B, R, V]. With a cache the tokens stand behind its committed ones."""
        on_gpu = self.compiled and tokens.device.type == "cuda"
        begin, finish = _rows_read, _log_probs
        if on_gpu:
            begin, finish = compiled(begin), compiled(finish)
        with compiling(on_gpu):
            rows = begin(read, tokens.shape[1], self.adapt.shifted)
        seen = self.seen(tokens, cache)
        hidden = self.backbone.hidden(tokens, cache=cache, read=rows, **seen)
        with compiling(on_gpu):
            return finish(self.backbone, hidden, self.mask_id).unflatten(0, read.shape)

    def new_cache(self, batch: int, window: int) -> KVCache:
        return self.backbone.new_cache(batch, window, self.block_size, adapt=self.adapt)


def _rows_read(read: Tensor, length: int, shifted: bool) -> Tensor:
    """Positions read [B, R] of B texts of `length` as rows of them all [B * R]."""
    if shifted:
        read = (read - 1).clamp(min=0)  # what reads at 0 concerns nobody
    first = torch.arange(len(read), device=read.device)[:, None] * length
    return (first + read).flatten()


def _log_probs(backbone, hidden: Tensor, mask_id: int) -> Tensor:
    """hidden [M, E] -> normalised log-probabilities float32 [M, V], the mask's -inf."""
    logits = backbone.logits(hidden).float()
    logits[:, mask_id] = -torch.inf
    return logits.log_softmax(-1)


@dataclass(frozen=True)
class Score:
    """log score(y) at every position: the ratios p_t(y) / p_t(x_t) of changing one masked token."""

    backbone: torch.nn.Module
    mask_id: int
    time_conditioning: bool = True
    recordable = False  # sigma changes from step to step: little is gained

    def __call__(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """tokens [B, L], sigma [B] -> log-score float32 [B, L, V], 0 at the token seen. Only masked
        positions mean something: a visible token never changes."""
        seen = sigma if self.time_conditioning else None
        hidden = self.backbone.hidden(tokens, seen, attention_mask=Full())
        logits = self.backbone.logits(hidden, seen).float()
        shift = torch.expm1(sigma).log() + math.log(logits.shape[-1] - 1)
        log_score = logits - shift[:, None, None]
        return log_score.scatter(-1, tokens[..., None], 0.0)
