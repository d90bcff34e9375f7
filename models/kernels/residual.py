"""What stands between the products of a block in training, in one kernel each way for CUDA: gate,
dropout and residual stream behind a product, norm and modulation before the next one.

These steps compute little; their time is that of reading and writing. So every number is read once
and written once, also in the backward pass, which makes the sums for gate, shift, scale and norm on
its way. Nothing is kept of the dropout: which numbers it drops is a hash of their place and of a
seed, and the backward pass asks again.
"""

import torch
from torch import Tensor

from .starting import can_start, differentiated_by

try:  # see decode.py
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_WIDTH = 2048  # a program holds whole rows
EPS = 1e-5  # that of torch's layer_norm
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LIVE = ["tokens", "limit"]  # one kernel for all


class Tiles:
    """How a kernel is cut up, chosen by measurement on an H200: rows of a program, rows of it at a
    time, warps."""

    FORWARD = 4, 4, 4
    BACKWARD = 32, 2, 2
    BACKWARD_WITHOUT_NORM = 16, 2, 4


def can_fuse(x: Tensor) -> bool:
    """Whether `residual` can take x [B, T, E], and is worth it: gradients are wanted."""
    return (
        triton is not None
        and x.device.type == "cuda"
        and torch.is_grad_enabled()
        and x.shape[-1] <= MOST_WIDTH
        and x.dtype in FLOATS
        and can_start(x.device)
    )


def new_seed(device: torch.device) -> Tensor:
    """For the dropout of one call: int64 [1], from the device's own generator, so that a resumed
    run, a recorded graph and a repeated layer draw what they should."""
    return torch.randint(1 << 62, (1,), device=device)


def _keep(ctx, inputs, output) -> None:
    _, branch, gate, seed, dropout, weight, shift, scale, _ = inputs
    total, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    normed, gated = weight is not None, gate is not None
    branch = branch if branch is None else branch.contiguous()
    ctx.save_for_backward(
        total if normed else None, stats, branch, gate, seed, weight, shift, scale
    )
    ctx.has, ctx.dropout = (branch is not None, gated, normed, shift is not None), dropout


def _gradients(ctx, d_total, d_y, _):
    total, stats, branch, gate, seed, weight, shift, scale = ctx.saved_tensors
    added, gated, normed, modulated = ctx.has
    if d_total is None:
        d_total = torch.zeros_like(total)
    if normed and d_y is None:
        d_y = torch.zeros_like(total)
    given = d_y if normed else None
    kept = d_total if total is None else total
    d_x, d_branch, sums = residual_backward(
        d_total, given, kept, stats, branch, gate, seed, ctx.dropout, weight, scale
    )

    def of(part: int, like: Tensor) -> Tensor:
        found = sums[:, part, None]
        if like.shape[0] == 1:
            found = found.sum(0, keepdim=True)
        return found.to(like.dtype)

    return (
        d_x if normed else d_total,
        d_branch if added else None,
        of(0, gate) if gated else None,
        None,
        None,
        sums[:, 3].sum(0).to(weight.dtype) if normed else None,
        of(1, shift) if modulated else None,
        of(2, scale) if modulated else None,
        None,
    )


@differentiated_by(_gradients, _keep)
@torch.library.custom_op("bamdlm::residual", mutates_args=())
def residual(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """total = x + gate * dropout(branch) and modulate(layer_norm(total) * weight, shift, scale).

    x, branch [B, T, E]; gate, shift, scale [B or 1, 1, E]; weight [E]. Without a branch total is a
    copy of x, so that one kernel of the backward pass adds up both gradients of x. Without a gate,
    a shift and scale, or a seed that step is left out. Without a weight there is no norm. Sums are
    made in float32. Returns total, of the type of x; what is normed, in `dtype`; mean and 1 /
    deviation of the rows, float32 [2, B, T], for the backward pass.
    """
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    batch, tokens, width = x.shape
    total = torch.empty_like(x)
    normed = weight is not None
    y = torch.empty_like(x, dtype=dtype) if normed else x.new_empty(0, dtype=dtype)
    stats = x.new_empty((2, batch, tokens) if normed else 0, dtype=torch.float32)
    rows, tile, warps = _tiles(Tiles.FORWARD, width)
    with torch.cuda.device_of(x):
        _forward[(batch * triton.cdiv(tokens, rows),)](
            x,
            branch,
            *_strided(gate),
            seed,
            weight,
            *_strided(shift),
            *_strided(scale),
            total,
            y,
            stats,
            batch * tokens,
            tokens,
            *_chances(dropout, seed),
            WIDTH=width,
            LANES=triton.next_power_of_2(width),
            EPS=EPS,
            ROWS=rows,
            TILE=tile,
            num_warps=warps,
        )
    return total, y, stats


@residual.register_fake
def _(x, branch, gate, seed, dropout, weight, shift, scale, dtype):
    x = x.contiguous()
    if weight is None:
        return torch.empty_like(x), x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)
    stats = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), stats


@torch.library.custom_op("bamdlm::residual_backward", mutates_args=())
def residual_backward(
    d_total: Tensor,
    d_y: Tensor | None,
    total: Tensor,
    stats: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    weight: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, E] (nothing without a norm: it is d_total), of branch [B, T, E]
    (nothing where there is none), and float32 [B, 4, E] those of gate, shift, scale, and of weight
    by sample."""
    d_total = d_total.contiguous()
    d_y = None if d_y is None else d_y.contiguous()
    batch, tokens, width = d_total.shape
    tiles = Tiles.BACKWARD_WITHOUT_NORM if weight is None else Tiles.BACKWARD
    rows, tile, warps = _tiles(tiles, width)
    parts = triton.cdiv(tokens, rows)
    d_x = d_total.new_empty(0) if weight is None else torch.empty_like(d_total)
    d_branch = d_total.new_empty(0) if branch is None else torch.empty_like(branch)
    sums = d_total.new_empty(batch, parts, 4, width, dtype=torch.float32)
    with torch.cuda.device_of(d_total):
        _backward[(batch * parts,)](
            d_total,
            d_y,
            total,
            stats,
            branch,
            *_strided(gate),
            seed,
            weight,
            *_strided(scale),
            d_x,
            d_branch,
            sums,
            batch * tokens,
            tokens,
            *_chances(dropout, seed),
            WIDTH=width,
            LANES=triton.next_power_of_2(width),
            ROWS=rows,
            TILE=tile,
            num_warps=warps,
        )
    return d_x, d_branch, sums.sum(1)


@residual_backward.register_fake
def _(d_total, d_y, total, stats, branch, gate, seed, dropout, weight, scale):
    d_total = d_total.contiguous()
    d_branch = d_total.new_empty(0) if branch is None else torch.empty_like(branch)
    batch, _, width = d_total.shape
    sums = d_total.new_empty(batch, 4, width, dtype=torch.float32)
    d_x = d_total.new_empty(0) if weight is None else torch.empty_like(d_total)
    return d_x, d_branch, sums


def _tiles(chosen: tuple[int, int, int], width: int) -> tuple[int, int, int]:
    """As many numbers at a time where rows are wider than those of the measurement."""
    rows, tile, warps = chosen
    return rows, max(1, tile * 1024 // max(1024, triton.next_power_of_2(width))), warps


def _strided(part: Tensor | None) -> tuple[Tensor | None, int]:
    """A modulation [B or 1, 1, E], and how far its rows lie apart: 0 where all samples share it."""
    if part is None:
        return None, 0
    part = part if part.stride(-1) == 1 else part.contiguous()
    return part, 0 if part.shape[0] == 1 else part.stride(0)


def _chances(dropout: float, seed: Tensor | None) -> tuple[int, float]:
    """Hashes below the first are dropped; what is kept is multiplied with the second."""
    return (0, 1.0) if seed is None else (min(round(dropout * 2**32), 2**32 - 1), 1 / (1 - dropout))


if triton is not None:

    @triton.jit
    def _mixed(h):
        """A bijection of 32 bits in which every bit depends on every other."""
        h ^= h >> 16
        h *= 0x7FEB352D
        h ^= h >> 15
        h *= 0x846CA68B
        return h ^ (h >> 16)

    @triton.jit
    def _dropped(branch, at, first, second, limit, factor):
        """branch after dropout: what its places, hashed with both halves of the seed, decide."""
        h = _mixed(_mixed(at.to(tl.uint32) ^ first) + second)
        return tl.where(h < limit, 0.0, branch * factor)

    @triton.jit(do_not_specialize=LIVE)
    def _forward(
        x,
        branch,
        gate,
        gate_row,
        seed,
        weight,
        shift,
        shift_row,
        scale,
        scale_row,
        total,
        y,
        stats,
        all_rows,
        tokens,
        limit,
        factor,
        WIDTH: tl.constexpr,
        LANES: tl.constexpr,
        EPS: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        parts = tl.cdiv(tokens, ROWS)
        sample = (tl.program_id(0) // parts).to(tl.int64)
        start = tl.program_id(0) % parts * ROWS
        lane = tl.arange(0, LANES)
        inside = lane < WIDTH
        if gate is not None:
            g = tl.load(gate + sample * gate_row + lane, mask=inside, other=0).to(tl.float32)
        if seed is not None:
            drawn = tl.load(seed)
            first, second = drawn.to(tl.uint32), (drawn >> 32).to(tl.uint32)
            limit = limit.to(tl.uint32)
        if weight is not None:
            w = tl.load(weight + lane, mask=inside, other=0).to(tl.float32)
        if shift is not None:
            a = tl.load(shift + sample * shift_row + lane, mask=inside, other=0).to(tl.float32)
            m = 1 + tl.load(scale + sample * scale_row + lane, mask=inside, other=0).to(tl.float32)
        for i in range(0, ROWS, TILE):
            row = start + i + tl.arange(0, TILE)
            live = row < tokens
            mask = live[:, None] & inside[None, :]
            place = sample * tokens + row
            at = place[:, None] * WIDTH + lane[None, :]
            v = tl.load(x + at, mask=mask, other=0).to(tl.float32)
            if branch is not None:
                b = tl.load(branch + at, mask=mask, other=0).to(tl.float32)
                if seed is not None:
                    b = _dropped(b, at, first, second, limit, factor)
                if gate is not None:
                    b *= g[None, :]
                v += b
            kept = v.to(total.dtype.element_ty)
            tl.store(total + at, kept, mask=mask)
            if weight is not None:
                v = kept.to(tl.float32)
                mean = tl.sum(v, 1) / WIDTH
                v = tl.where(mask, v - mean[:, None], 0)
                inverse = tl.rsqrt(tl.sum(v * v, 1) / WIDTH + EPS)
                tl.store(stats + place, mean, mask=live)
                tl.store(stats + all_rows + place, inverse, mask=live)
                v *= inverse[:, None] * w[None, :]
                if shift is not None:
                    v = v * m[None, :] + a[None, :]
                tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=LIVE)
    def _backward(
        d_total,
        d_y,
        total,
        stats,
        branch,
        gate,
        gate_row,
        seed,
        weight,
        scale,
        scale_row,
        d_x,
        d_branch,
        sums,
        all_rows,
        tokens,
        limit,
        factor,
        WIDTH: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        parts = tl.cdiv(tokens, ROWS)
        sample = (tl.program_id(0) // parts).to(tl.int64)
        start = tl.program_id(0) % parts * ROWS
        lane = tl.arange(0, LANES)
        inside = lane < WIDTH
        if gate is not None:
            g = tl.load(gate + sample * gate_row + lane, mask=inside, other=0).to(tl.float32)
            d_gate = tl.zeros([LANES], tl.float32)
        if seed is not None:
            drawn = tl.load(seed)
            first, second = drawn.to(tl.uint32), (drawn >> 32).to(tl.uint32)
            limit = limit.to(tl.uint32)
        if weight is not None:
            w = tl.load(weight + lane, mask=inside, other=0).to(tl.float32)
            d_shift = tl.zeros([LANES], tl.float32)
            d_scaled = tl.zeros([LANES], tl.float32)
            m = tl.full([LANES], 1, tl.float32)
            if scale is not None:
                m += tl.load(scale + sample * scale_row + lane, mask=inside, other=0).to(tl.float32)
        for i in range(0, ROWS, TILE):
            row = start + i + tl.arange(0, TILE)
            live = row < tokens
            mask = live[:, None] & inside[None, :]
            place = sample * tokens + row
            at = place[:, None] * WIDTH + lane[None, :]
            d = tl.load(d_total + at, mask=mask, other=0).to(tl.float32)
            if weight is not None:
                mean = tl.load(stats + place, mask=live, other=0)
                inverse = tl.load(stats + all_rows + place, mask=live, other=0)
                v = tl.load(total + at, mask=mask, other=0).to(tl.float32)
                v = tl.where(mask, (v - mean[:, None]) * inverse[:, None], 0)
                dy = tl.load(d_y + at, mask=mask, other=0).to(tl.float32)
                d_shift += tl.sum(dy, 0)
                d_scaled += tl.sum(dy * v, 0)
                dy *= (w * m)[None, :]
                slope = tl.sum(dy * v, 1) / WIDTH
                dy -= (tl.sum(dy, 1) / WIDTH)[:, None] + v * slope[:, None]
                d += dy * inverse[:, None]
                tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=mask)
            if branch is not None:
                if gate is not None:
                    b = tl.load(branch + at, mask=mask, other=0).to(tl.float32)
                    if seed is not None:
                        b = _dropped(b, at, first, second, limit, factor)
                    d_gate += tl.sum(d * b, 0)
                    d *= g[None, :]
                if seed is not None:
                    d = _dropped(d, at, first, second, limit, factor)
                tl.store(d_branch + at, d.to(d_branch.dtype.element_ty), mask=mask)
        found = sums + tl.program_id(0).to(tl.int64) * 4 * WIDTH + lane
        if gate is not None:
            tl.store(found, d_gate, mask=inside)
        if weight is not None:
            tl.store(found + WIDTH, d_shift, mask=inside)
            tl.store(found + 2 * WIDTH, d_scaled * w, mask=inside)
            tl.store(found + 3 * WIDTH, d_scaled * m, mask=inside)
