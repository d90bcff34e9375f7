"""Keys and values of the tokens already generated, so that a step costs what its block costs.

Keys are stored rotated at their absolute position (rotary attention depends on differences only),
in a ring of window + block_size slots: position p lives in slot p % slots. A pass of up to window +
block_size tokens, or two blocks behind a full window, is written behind the committed ones; unless
it is committed the next pass overwrites it. When the window slides nothing is moved or recomputed.

Deep keys carry what they saw when they were made: beyond the window this is one long pass under
BlockCausal(block_size, window), not the same as computing the last `window` tokens from scratch.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .attention import attention
from .compiling import compiled
from .kernels.decode import can_decode, decode
from .masks import BlockCausal, CausalClean

REACH_STEP = 128


@dataclass(frozen=True)
class KVCache:
    """`committed` [B]: tokens kept per row. `uniform`: the same as one number while all rows agree,
    else None (known without asking the device). `reach`: slots that a pass may need, None: all.
    decodes: whether the network's blocks take `Decode`. Made by `Network.new_cache`."""

    keys: list[Tensor]  # per layer [B, slots, K, D], rotated; K heads
    values: list[Tensor]  # per layer [B, slots, K, D]
    committed: Tensor  # int64 [B]
    uniform: int | None
    attention_mask: BlockCausal | CausalClean
    reach: int | None = None
    decodes: bool = True

    @property
    def slots(self) -> int:
        return self.keys[0].shape[1]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.keys + self.values)

    def commit(self, tokens: int | Tensor) -> "KVCache":
        """Keep `tokens` more of what the last pass wrote: one number, or one per row [B]."""
        uniform = None
        if self.uniform is not None and not isinstance(tokens, Tensor):
            uniform = self.uniform + tokens
        return replace(self, committed=self.committed + tokens, uniform=uniform)

    def select(self, rows: Tensor) -> "KVCache":
        """Only these rows, in this order. `rows`: indices [B'] or booleans [B]."""
        return replace(
            self,
            keys=[x[rows] for x in self.keys],
            values=[x[rows] for x in self.values],
            committed=self.committed[rows],
        )

    def reset(self, rows: Tensor) -> "KVCache":
        """Forget the rows where `rows` (boolean [B]) is true."""
        return replace(self, committed=self.committed.masked_fill(rows, 0), uniform=None)

    def restarted(self) -> "KVCache":
        """Forget everything."""
        return replace(self, committed=torch.zeros_like(self.committed), uniform=0)

    def at(self, committed: Tensor, reach: int) -> "KVCache":
        """The same keys and values with nothing known to the host but `reach`: passes of one shape
        are then the same kernels over the same memory, wherever the rows stand."""
        return replace(self, committed=committed, uniform=None, reach=reach)

    def reach_of(self, committed: int, tokens: int) -> int:
        """For `at`: slots that a pass of `tokens` behind at most `committed` ones needs, in steps
        of REACH_STEP, so that few shapes occur."""
        if self.decodes and can_decode(self.keys[0], tokens):  # which sees for itself
            return self.slots
        return min(self.slots, -(-(committed + tokens) // REACH_STEP) * REACH_STEP)

    def begin(self, tokens: int, by_compiler: bool = False) -> tuple[list, Tensor]:
        """For a pass of `tokens` new tokens per row behind the committed ones: the attention of
        each layer, and the positions int64 [B or 1, T].

        attend(q, k, v), each [B, ., T, D], writes k and v to the layer's slots and attends to all
        that is seen; `Decode` takes them before they are rotated.
        """
        size, window = self.attention_mask.block_size, self.attention_mask.window
        same = self.uniform is not None
        room = self.slots
        if tokens > 2 * size:  # two blocks fit always
            committed = self.uniform if same else int(self.committed.max())
            room -= min(committed, window - size)
        if tokens > room:
            raise ValueError(
                f"KVCache has room for {room} of its {self.slots} slots, cannot take {tokens}"
                " tokens in one pass; feed them in pieces (two blocks fit always)"
            )
        committed = self.committed[:1] if same else self.committed
        layers = list(zip(self.keys, self.values, strict=True))
        if self.decodes and can_decode(self.keys[0], tokens):
            attends = [Decode(*ring, self.committed, self.attention_mask) for ring in layers]
            positions = compiled(_positions) if by_compiler else _positions
            return attends, positions(committed, tokens)
        one_block = same and tokens == size and self.uniform % size == 0
        alike = isinstance(self.attention_mask, BlockCausal)  # all queries of a block
        sees_all = one_block and alike and self.uniform + tokens <= window  # none has left it yet
        reach = 0 if sees_all else self.reach or self.slots
        places = compiled(_places) if by_compiler else _places
        positions, slots, rows, visible = places(
            committed,
            tokens,
            self.slots,
            reach,
            self.attention_mask if alike else replace(self.attention_mask, open=None),
            self.keys[0].dtype,
            None if alike else self.attention_mask.open,
        )
        seen = self.uniform + tokens if sees_all else reach
        if same:
            rows = None  # all write to the same slots
        attends = [
            partial(_attend, keys[:, :seen], values[:, :seen], rows, slots, visible)
            for keys, values in layers
        ]
        return attends, positions


def _positions(committed: Tensor, tokens: int) -> Tensor:
    return committed[:, None] + torch.arange(tokens, device=committed.device)


def _places(committed, tokens: int, slots: int, reach: int, mask, dtype, open=None) -> tuple:
    """Positions and slots of `tokens` new tokens [B, T], the numbers of the rows [B, 1], and which
    of the first `reach` slots each query may read, added to its score: 0 or -inf [B, 1, T, reach];
    None where reach is 0. open: as in CausalClean."""
    device = committed.device
    rows = torch.arange(len(committed), device=device)[:, None]
    positions = _positions(committed, tokens)
    if reach == 0:
        return positions, positions % slots, rows, None
    last = positions[:, -1:]
    slot = torch.arange(reach, device=device)
    held = last - (last - slot) % slots  # the position each slot holds, < 0: none yet
    of_rows = () if open is None else (open[:, :, None],)
    seen = mask.allowed(positions[:, :, None], held[:, None, :], slots, *of_rows)
    seen = (seen & (held >= 0)[:, None, :])[:, None]
    nothing = torch.zeros((), dtype=dtype, device=device)
    return positions, positions % slots, rows, torch.where(seen, nothing, -torch.inf)


@dataclass(frozen=True)
class Decode:
    """attend(qkv, cos, sin): the same as one kernel, see kernels/decode.py."""

    keys: Tensor
    values: Tensor
    committed: Tensor
    attention_mask: BlockCausal

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mask = self.attention_mask
        ring = self.keys, self.values, self.committed
        return decode(qkv, cos, sin, *ring, mask.block_size, mask.window)


def _attend(keys, values, rows, slots, visible, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for store, new in ((keys, k), (values, v)):
        new = new.transpose(1, 2).to(store.dtype)
        if rows is None:
            store.index_copy_(1, slots[0], new)
        else:
            store.index_put_((rows, slots), new)
    k, v = (store.transpose(1, 2).to(q.dtype) for store in (keys, values))
    visible = None if visible is None else visible.to(q.dtype)
    return attention(q, k, v, visible)
