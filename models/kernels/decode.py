"""Attention of a few new tokens to a cache of keys and values, in one kernel for CUDA.

Around torch's own attention a pass needs five more kernels: q and k are rotated, k and v written to
the cache, a mask of all its slots made, laid out as the library wants it, the answer laid out as
the next layer wants it; and slots that hold nothing yet are read. Here every program takes one row
and one head, reads what that row has committed and no more, and no tensor is made on the way. What
is read follows from a number on the device, so one recorded CUDA graph serves a text of any length.

The softmax is summed up while the keys come in, as in FlashAttention (arXiv:2205.14135).
"""

import torch
from torch import Tensor

from . import split
from .starting import can_start, operator, processors

try:  # comes with torch where there are GPUs; an export must load without it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_TOKENS = 64  # of one pass; they stay in registers
TILE_BYTES = 8 << 10  # of keys, and as many of values, on their way at a time
COUNTS = ["tokens", "slots", "block_size", "window_blocks", "angle_rows"]  # any values: one kernel
HEAD_WIDTHS = (32, 64, 128)  # powers of two; tensor cores take sixteen of half a head


def can_decode(keys: Tensor, tokens: int) -> bool:
    """Whether `decode` can take a pass of `tokens`; keys as there."""
    return (
        keys.dtype.itemsize <= 4
        and keys.shape[-1] in HEAD_WIDTHS
        and tokens <= MOST_TOKENS
        and not torch.is_grad_enabled()  # it has none
        and can_start(keys.device)
    )


@operator(__name__, "decode", mutates_args=("keys", "values"))
def decode(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    committed: Tensor,
    block_size: int,
    window: int,
) -> Tensor:
    """qkv [B, T, 3 H D] of T new tokens, not rotated -> what each of them sees, [B, T, H D].

    cos, sin [B or 1, 1, T, D/2]: of their positions. keys, values [B, slots, H, D]: the ring of one
    layer (models/cache.py), to which the new ones are written behind the `committed` [B] ones.
    A token sees its own block and the window - block_size tokens before it. To the compiler this is
    one operator, which it neither looks into nor copies the cache for.
    """
    qkv, cos, sin = (x.contiguous() for x in (qkv, cos, sin))
    rows, tokens, _ = qkv.shape
    _, slots, heads, width = keys.shape
    few = rows * heads < 2 * processors(qkv.device)  # each waits for the memory alone
    if few and tokens <= split.MOST_SPLIT:
        numbers = block_size, window
        return split.decode_split(qkv, cos, sin, keys, values, committed, *numbers)
    out = qkv.new_empty(rows, tokens, heads * width)
    with torch.cuda.device_of(qkv):  # Triton starts on the current device
        _decode[(rows * heads,)](
            qkv,
            cos,
            sin,
            keys,
            values,
            committed,
            out,
            tokens,
            slots,
            block_size,
            window // block_size,
            0 if cos.shape[0] == 1 else tokens,
            width**-0.5,
            PADDED=max(16, triton.next_power_of_2(tokens)),
            HEADS=heads,
            HALF=width // 2,
            TILE=TILE_BYTES // (width * keys.element_size()),
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=3,
        )
    return out


@decode.register_fake
def _(qkv, cos, sin, keys, values, committed, block_size, window):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], keys.shape[2] * keys.shape[3])


if triton is not None:

    @triton.jit(do_not_specialize=COUNTS)
    def _decode(
        qkv,
        cos,
        sin,
        keys,
        values,
        committed,
        out,
        tokens,
        slots,
        block_size,
        window_blocks,
        angle_rows,
        scale,
        PADDED: tl.constexpr,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        width: tl.constexpr = HEADS * 2 * HALF
        t = tl.arange(0, PADDED)
        half, whole = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
        new = t < tokens
        written = new[:, None]
        start = tl.load(committed + row).to(tl.int32)
        position = start + t

        # the new tokens: rotate, write to the ring, and let them see each other
        angle = (row * angle_rows + t)[:, None] * HALF + half[None, :]
        c = tl.load(cos + angle, mask=written, other=0)
        s = tl.load(sin + angle, mask=written, other=0)
        token = (row * tokens + t)[:, None] * (3 * width) + head * 2 * HALF
        qa, qb = split._rotated(qkv, token + half[None, :], c, s, HALF, written)
        ka, kb = split._rotated(qkv, token + width + half[None, :], c, s, HALF, written)
        v = tl.load(qkv + token + 2 * width + whole[None, :], mask=written, other=0)
        ring = row * slots * width + head * 2 * HALF
        slot = ring + (position % slots)[:, None] * width
        ka, kb, v = (
            ka.to(keys.dtype.element_ty),
            kb.to(keys.dtype.element_ty),
            v.to(values.dtype.element_ty),
        )
        tl.store(keys + slot + half[None, :], ka, mask=written)
        tl.store(keys + slot + HALF + half[None, :], kb, mask=written)
        tl.store(values + slot + whole[None, :], v, mask=written)

        scale = scale * 1.4426950408889634  # exp2 is the faster one
        block = position // block_size
        behind = block[:, None] - block[None, :]
        seen = new[None, :] & (behind >= 0) & (behind < window_blocks)
        scores = split._scores(qa, qb, ka.to(qa.dtype), kb.to(qb.dtype), PRECISION) * scale
        scores = tl.where(seen, scores, -float("inf"))
        best = tl.maximum(tl.max(scores, 1), -1e30)  # not -inf: a padded token may see nothing
        chances = tl.exp2(scores - best[:, None])
        total = tl.sum(chances, 1)
        mean = tl.dot(chances.to(qa.dtype), v.to(qa.dtype), input_precision=PRECISION)

        # the committed ones that the first new token sees, and that are not written over
        first = tl.maximum((start // block_size - window_blocks + 1) * block_size, 0)
        first = tl.maximum(first, start + tokens - slots)
        for at in range(first, start, TILE):
            p = at + tl.arange(0, TILE)
            old = p < start
            held = ring + (p % slots)[:, None] * width
            oa = tl.load(keys + held + half[None, :], mask=old[:, None], other=0)
            ob = tl.load(keys + held + HALF + half[None, :], mask=old[:, None], other=0)
            ov = tl.load(values + held + whole[None, :], mask=old[:, None], other=0)
            near = block[:, None] - (p // block_size)[None, :] < window_blocks
            more = split._scores(qa, qb, oa.to(qa.dtype), ob.to(qa.dtype), PRECISION) * scale
            more = tl.where(old[None, :] & near, more, -float("inf"))
            better = tl.maximum(best, tl.max(more, 1))
            more = tl.exp2(more - better[:, None])
            shrunk = tl.exp2(best - better)
            total = total * shrunk + tl.sum(more, 1)
            mean = mean * shrunk[:, None]
            mean = tl.dot(more.to(qa.dtype), ov.to(qa.dtype), mean, input_precision=PRECISION)
            best = better

        answer = (row * tokens + t)[:, None] * width + head * 2 * HALF + whole[None, :]
        tl.store(out + answer, (mean / total[:, None]).to(out.dtype.element_ty), mask=written)
