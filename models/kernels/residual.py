"""What stands between the products of a block in training, in one kernel each way for CUDA: gate,
dropout and residual stream behind a product, norm and modulation before the next one.

These steps compute little; their time is that of reading and writing. So every number is read once
and written once, also in the backward pass, which makes the sums for gate, shift, scale and norm on
its way. Nothing is kept of the dropout: which numbers it drops is a hash of their place and of a
seed, and the backward pass asks again.
"""

import torch
from torch import Tensor

from .residual_steps import backward, forward
from .starting import can_start, differentiated_by, operator

try:  # see decode.py
    import triton
except ImportError:
    triton = None

MOST_WIDTH = 2048  # a program holds whole rows
EPS = 1e-5  # that of torch's layer_norm
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Tiles:
    """How a kernel is cut up, chosen by measurement on an H200: rows of a program, rows of it at a
    time, warps. STAGES: of loading, as Triton counts them: that of the rows in work and those
    of rows on their way."""

    FORWARD = 4, 4, 4
    BACKWARD = 32, 1, 1
    STAGES = 3


def can_fuse(x: Tensor) -> bool:
    """Whether `residual` can take x [B, T, E], and is worth it: gradients are wanted."""
    return (
        torch.is_grad_enabled()
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
    if d_total is None and d_y is None:
        return (None,) * 9
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
@operator(__name__, "residual", mutates_args=())
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
        forward[(batch * triton.cdiv(tokens, rows),)](
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


@operator(__name__, "residual_backward", mutates_args=())
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
    rows, tile, warps = _tiles(Tiles.BACKWARD, width)
    parts = triton.cdiv(tokens, rows)
    d_x = d_total.new_empty(0) if weight is None else torch.empty_like(d_total)
    d_branch = d_total.new_empty(0) if branch is None else torch.empty_like(branch)
    sums = d_total.new_empty(batch, parts, 4, width, dtype=torch.float32)
    with torch.cuda.device_of(d_total):
        backward[(batch * parts,)](
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
            STAGES=Tiles.STAGES,
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
    """As many numbers of a thread where rows are wider than those of the measurement."""
    rows, tile, warps = chosen
    wider = max(1, triton.next_power_of_2(width) // 1024)
    return rows, tile, warps * wider


def _strided(part: Tensor | None) -> tuple[Tensor | None, int]:
    """A modulation [B or 1, 1, E], and how far its rows lie apart: 0 where all samples share it."""
    if part is None:
        return None, 0
    part = part if part.stride(-1) == 1 else part.contiguous()
    return part, 0 if part.shape[0] == 1 else part.stride(0)


def _chances(dropout: float, seed: Tensor | None) -> tuple[int, float]:
    """Hashes below the first are dropped; what is kept is multiplied with the second."""
    if seed is None:
        return 0, 1.0
    return min(round(dropout * 2**32), 2**32 - 1), 1 / (1 - dropout) if dropout < 1 else 0.0
