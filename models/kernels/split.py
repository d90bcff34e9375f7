"""decode.py where only a few programs would run: those of one text are as many as it has heads.

The keys of a row and head are shared out: every program takes one tile of them, asks for it before
it waits for the kernel before it ("programmatic dependent launch", from Hopper on), and writes what
it sums up, without division. A second kernel joins the parts, in a fixed order.
"""

import functools

import torch
from torch import Tensor

try:  # see decode.py
    import triton
    import triton.language as tl
    import triton.language.extra.cuda as cuda
except ImportError:
    triton = None

TILE_BYTES = 16 << 10  # of keys, and as many of values, that a program holds
MOST_SPLIT = 32  # tokens of a pass
TOGETHER, JOINING = 1, 1  # tokens that a program joins, and its warps
COUNTS = ["tokens", "slots", "block_size", "window_blocks", "angle_rows", "parts"]


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it still runs, and wait for it inside."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def early_launch(early: bool) -> dict:
    """Options of a kernel that waits by itself."""
    return {"launch_pdl": True} if early else {}


def decode_split(qkv, cos, sin, keys, values, committed, block_size: int, window: int) -> Tensor:
    """See `decode`; all contiguous."""
    rows, tokens, _ = qkv.shape
    _, slots, heads, width = keys.shape
    tile = TILE_BYTES // (width * keys.element_size())
    parts, padded = triton.cdiv(slots, tile), max(16, triton.next_power_of_2(tokens))
    wide = torch.float32
    means = torch.empty(rows * heads, parts, padded, width, dtype=wide, device=qkv.device)
    sums = torch.empty(2, rows * heads, parts, padded, dtype=wide, device=qkv.device)
    out = qkv.new_empty(rows, tokens, heads * width)
    early = can_start_early(qkv.device)
    shared = {
        "PADDED": padded,
        "HEADS": heads,
        "TILE": tile,
        "EARLY": early,
        **early_launch(early),
    }
    numbers = tokens, slots, block_size, window // block_size
    ring = keys, values, committed
    with torch.cuda.device_of(qkv):
        _part[(rows * heads, parts)](
            qkv,
            cos,
            sin,
            *ring,
            means,
            *sums,
            *numbers,
            0 if cos.shape[0] == 1 else tokens,
            parts,
            width**-0.5,
            HALF=width // 2,
            PRECISION="ieee" if qkv.dtype == wide else "tf32",
            num_warps=4,
            num_stages=1,
            **shared,
        )
        _join[(rows * heads, triton.cdiv(tokens, TOGETHER))](
            committed,
            means,
            *sums,
            out,
            *numbers,
            parts,
            WIDTH=width,
            TOGETHER=TOGETHER,
            PARTS=min(16, triton.next_power_of_2(parts)),
            num_warps=JOINING,
            **shared,
        )
    return out


if triton is not None:

    @triton.jit
    def _rotated(x, at, cos, sin, HALF: tl.constexpr, mask):
        """Both halves of x at the places `at`, turned, in float32 and back in their own type."""
        a = tl.load(x + at, mask=mask, other=0)
        b = tl.load(x + at + HALF, mask=mask, other=0)
        a32, b32 = a.to(tl.float32), b.to(tl.float32)
        return (a32 * cos - b32 * sin).to(a.dtype), (b32 * cos + a32 * sin).to(b.dtype)

    @triton.jit
    def _scores(qa, qb, ka, kb, PRECISION: tl.constexpr):
        scores = tl.dot(qa, tl.trans(ka), input_precision=PRECISION)
        return tl.dot(qb, tl.trans(kb), scores, input_precision=PRECISION)

    @triton.jit
    def _first_seen(start, tokens, slots, block_size, window_blocks):
        """The first committed one that a new token sees and that is not written over."""
        first = tl.maximum((start // block_size - window_blocks + 1) * block_size, 0)
        return tl.maximum(first, start + tokens - slots)

    @triton.jit(do_not_specialize=COUNTS)
    def _part(
        qkv,
        cos,
        sin,
        keys,
        values,
        committed,
        means,
        bests,
        totals,
        tokens,
        slots,
        block_size,
        window_blocks,
        angle_rows,
        parts,
        scale,
        PADDED: tl.constexpr,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            cuda.gdc_launch_dependents()
        row = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        part = tl.program_id(1)
        width: tl.constexpr = HEADS * 2 * HALF
        t = tl.arange(0, PADDED)
        half, whole = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
        start = tl.load(committed + row).to(tl.int32)
        first = _first_seen(start, tokens, slots, block_size, window_blocks)
        if (part > 0) & (first + part * TILE >= start):
            return
        ring = row * slots * width + head * 2 * HALF
        p = first + part * TILE + tl.arange(0, TILE)
        old = p < start
        slot = first % slots + part * TILE + tl.arange(0, TILE)
        slot = tl.where(slot < slots, slot, slot - slots)
        held = ring + slot[:, None] * width
        oa = tl.load(keys + held + half[None, :], mask=old[:, None], other=0)
        ob = tl.load(keys + held + HALF + half[None, :], mask=old[:, None], other=0)
        ov = tl.load(values + held + whole[None, :], mask=old[:, None], other=0)

        if EARLY:  # what is committed was there before this pass
            cuda.gdc_wait()
        new = t < tokens
        written = new[:, None]
        position = start + t
        block = position // block_size
        angle = (row * angle_rows + t)[:, None] * HALF + half[None, :]
        c = tl.load(cos + angle, mask=written, other=0)
        s = tl.load(sin + angle, mask=written, other=0)
        token = (row * tokens + t)[:, None] * (3 * width) + head * 2 * HALF
        qa, qb = _rotated(qkv, token + half[None, :], c, s, HALF, written)
        scale = scale * 1.4426950408889634  # exp2 is the faster one
        since = (block - window_blocks + 1) * block_size  # the first that a token sees
        scores = _scores(qa, qb, oa.to(qa.dtype), ob.to(qb.dtype), PRECISION) * scale
        scores = tl.where(old[None, :] & (p[None, :] >= since[:, None]), scores, -float("inf"))
        best = tl.maximum(tl.max(scores, 1), -1e30)  # not -inf: nothing may be seen
        chances = tl.exp2(scores - best[:, None])
        total = tl.sum(chances, 1)
        mean = tl.dot(chances.to(qa.dtype), ov.to(qa.dtype), input_precision=PRECISION)

        if part == 0:  # the new tokens: write them to the ring, and let them see each other
            ka, kb = _rotated(qkv, token + width + half[None, :], c, s, HALF, written)
            v = tl.load(qkv + token + 2 * width + whole[None, :], mask=written, other=0)
            ka, kb = ka.to(keys.dtype.element_ty), kb.to(keys.dtype.element_ty)
            v = v.to(values.dtype.element_ty)
            place = ring + (position % slots)[:, None] * width
            tl.store(keys + place + half[None, :], ka, mask=written)
            tl.store(keys + place + HALF + half[None, :], kb, mask=written)
            tl.store(values + place + whole[None, :], v, mask=written)
            seen = new[None, :] & (block[:, None] >= block[None, :])
            seen = seen & (position[None, :] >= since[:, None])
            among = _scores(qa, qb, ka.to(qa.dtype), kb.to(qb.dtype), PRECISION) * scale
            among = tl.where(seen, among, -float("inf"))
            better = tl.maximum(best, tl.max(among, 1))
            more = tl.exp2(among - better[:, None])
            shrunk = tl.exp2(best - better)
            total = total * shrunk + tl.sum(more, 1)
            mean = mean * shrunk[:, None]
            mean = tl.dot(more.to(qa.dtype), v.to(qa.dtype), mean, input_precision=PRECISION)
            best = better

        at = (tl.program_id(0) * parts + part) * PADDED + t
        tl.store(bests + at, best)
        tl.store(totals + at, total)
        tl.store(means + at[:, None] * (2 * HALF) + whole[None, :], mean)

    @triton.jit(do_not_specialize=COUNTS)
    def _join(
        committed,
        means,
        bests,
        totals,
        out,
        tokens,
        slots,
        block_size,
        window_blocks,
        parts,
        WIDTH: tl.constexpr,
        TOGETHER: tl.constexpr,
        PARTS: tl.constexpr,
        PADDED: tl.constexpr,
        HEADS: tl.constexpr,
        TILE: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            cuda.gdc_launch_dependents()
        row = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        start = tl.load(committed + row).to(tl.int32)
        first = _first_seen(start, tokens, slots, block_size, window_blocks)
        count = tl.maximum(tl.cdiv(start - first, TILE), 1)
        t = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
        d = tl.arange(0, WIDTH)
        best = tl.full((TOGETHER,), -1e30, tl.float32)
        total = tl.zeros((TOGETHER,), tl.float32)
        mean = tl.zeros((TOGETHER, WIDTH), tl.float32)
        if EARLY:
            cuda.gdc_wait()
        for begin in range(0, count, PARTS):
            part = begin + tl.arange(0, PARTS)
            there = (part < count)[:, None]
            at = (tl.program_id(0) * parts + part)[:, None] * PADDED + t[None, :]
            b = tl.load(bests + at, mask=there, other=-float("inf"))
            n = tl.load(totals + at, mask=there, other=0)
            m = tl.load(
                means + at[:, :, None] * WIDTH + d[None, None, :], mask=there[:, :, None], other=0
            )
            better = tl.maximum(best, tl.max(b, 0))
            share, shrunk = tl.exp2(b - better[None, :]), tl.exp2(best - better)
            total = total * shrunk + tl.sum(n * share, 0)
            mean = mean * shrunk[:, None] + tl.sum(m * share[:, :, None], 0)
            best = better
        at = (row * tokens + t)[:, None] * (HEADS * WIDTH) + head * WIDTH + d[None, :]
        answer = (mean / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + at, answer, mask=(t < tokens)[:, None])
