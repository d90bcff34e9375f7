"""Keys and values of a clean text, made once: then any number of noised versions of it are asked
about at the price of their own tokens.

Under BlockDiffusion the clean half of [x_t ; x0] does not look at x_t. Its keys and values stand
behind room for those of the noised half, which every pass overwrites.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .adaptation import PLAIN, Adaptation
from .attention import Attend
from .document_ids import positions as place_in_document
from .masks import BlockCausal, BlockDiffusion


@dataclass(frozen=True)
class CleanHalf:
    """What `Network.hidden` takes as a cache: its tokens are then x_t [B, L]. `clean_half` makes
    it."""

    keys: list[Tensor]  # per layer [B, K, 2L, D], rotated; the clean half comes second
    values: list[Tensor]
    positions: Tensor  # int64 [L] or [B, L]
    attention_mask: BlockCausal | BlockDiffusion
    attends: list[Attend | None]  # per layer; None: nobody reads what the layer answers
    # [B * N, E]: the last hidden state of each clean block, where the first token of the next is
    # predicted there (Adaptation.shifted)
    ends: Tensor | None = None

    def begin(self, tokens: int, by_compiler: bool = False) -> tuple[list[Attend], Tensor]:
        """For a pass of `tokens` tokens, which must be those of the text: the attention of each
        layer, which writes k and v [B, K, L, D] to their half, and the positions."""
        length = self.positions.shape[-1]
        if tokens != length:
            raise ValueError(f"the clean text has {length} tokens, not {tokens}")
        clean = isinstance(self.attention_mask, BlockCausal)
        half = slice(length, None) if clean else slice(0, length)
        layers = zip(self.keys, self.values, self.attends, strict=True)
        return [partial(_attend, k, v, half, attend) for k, v, attend in layers], self.positions


def _attend(keys, values, half: slice, attend: Attend | None, q, k, v) -> Tensor:
    keys[:, :, half], values[:, :, half] = k, v
    if attend is None:
        return q
    return attend(q, k, v) if half.start else attend(q, keys.to(q.dtype), values.to(q.dtype))


def clean_half(
    backbone,
    x0: Tensor,
    block_size: int,
    dtype: torch.dtype,
    document_ids: Tensor | None = None,
    adapt: Adaptation = PLAIN,
) -> CleanHalf:
    """One pass over x0 [B, L] under BlockCausal(block_size), or as `adapt` says. document_ids [B,
    L]: as for `Network.hidden`. dtype: of the keys and values."""
    length, layers = x0.shape[1], len(backbone.blocks)
    positions = torch.arange(length, device=x0.device)
    both = None
    if document_ids is not None:
        positions, both = place_in_document(document_ids), torch.cat([document_ids] * 2, 1)
    shape = (len(x0), backbone.kv_heads, 2 * length, backbone.head_width)
    keys, values = (
        [torch.zeros(shape, dtype=dtype, device=x0.device) for _ in range(layers)] for _ in range(2)
    )
    clean, noised = adapt.clean_mask(block_size), BlockDiffusion(block_size)
    fill = backbone.prepare_attention(clean, length, length, document_ids, x0.device)
    last = fill if adapt.shifted else None
    filling = CleanHalf(keys, values, positions, clean, [fill] * (layers - 1) + [last])
    read = torch.zeros(0, dtype=torch.int64, device=x0.device)
    if adapt.shifted:
        read = torch.arange(block_size - 1, x0.numel(), block_size, device=x0.device)
    ends = backbone.hidden(x0, attention_mask=clean, cache=filling, read=read)
    ask = backbone.prepare_attention(noised, length, 2 * length, both, x0.device)
    asking = CleanHalf(keys, values, positions, noised, [ask] * layers)
    return replace(asking, ends=ends) if adapt.shifted else asking
