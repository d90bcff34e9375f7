"""Attention under the mask of block diffusion, with its gradients, for CUDA in half precision.

FlexAttention reads lists of tiles and asks the mask of every pair at a border. Here both follow
from a few whole numbers. The gradients of queries and keys come from a kernel each, so no number is
added up in an order that changes (arXiv:2205.14135 describes the sums). They can be turned back by
their rotary angles and written side by side, as the product behind them reads them.
"""

import math

import torch
from torch import Tensor

from .block_diffusion_gradients import backward_keys, backward_queries
from .block_diffusion_steps import forward
from .heads import rotated_heads
from .starting import differentiated_by, operator

try:  # see decode.py
    import triton
except ImportError:
    triton = None

HEAD_WIDTHS = (16, 32, 64, 128)


class Tiles:
    """How a kernel is cut up, chosen by measurement on an H200: queries of a tile, keys of a tile,
    warps, stages of loading."""

    FORWARD = 64, 64, 4, 3
    QUERIES = 64, 32, 4, 3
    KEYS = 32, 64, 4, 3


class TilesOfWideHeads:
    """Of 128 numbers, for GPUs with 99 KB of shared memory too."""

    FORWARD = 64, 32, 4, 3
    QUERIES = 64, 64, 4, 2
    KEYS = 32, 64, 4, 2


def can_attend(dtype: torch.dtype, heads: int, head_width: int, tokens: int) -> bool:
    """Whether `block_diffusion` can take texts of so many tokens, all parts together, on a GPU
    where kernels can start (`can_start`)."""
    return (
        dtype.itemsize == 2
        and head_width in HEAD_WIDTHS
        and 3 * tokens * heads * head_width < 2**31  # places inside a sample are int32
    )


def _keep(ctx, inputs, output) -> None:
    q, k, v, *numbers = inputs
    out, logs = output
    ctx.mark_non_differentiable(logs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, logs)
    ctx.numbers = numbers


def _gradients(ctx, d_out, _):
    if d_out is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    return *block_diffusion_backward(d_out, *saved, *ctx.numbers), *(None,) * 4


@differentiated_by(_gradients, _keep)
@operator(__name__, "block_diffusion", mutates_args=())
def block_diffusion(
    q: Tensor, k: Tensor, v: Tensor, length: int, views: int, block_size: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k, v [B, (views + 1) length, K, D] under BlockDiffusion (models/masks.py),
    each group of H / K heads of queries with one of keys -> [B, T, H, D], and for the backward pass
    float32 [B, H, T]: the logarithm to base 2 of the sum of each row. T is views * length, or all
    of them; length is a multiple of block_size."""
    q, k, v = (_readable(x) for x in (q, k, v))
    batch, asked, heads, _ = q.shape
    out = q.new_empty(q.shape)
    logs = q.new_empty(batch, heads, asked, dtype=torch.float32)
    rows, columns, warps, stages = _tiles(q).FORWARD
    parts = asked // length
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(length, rows) * parts * batch * heads,)](
            q,
            *q.stride()[:3],
            k,
            *k.stride()[:3],
            v,
            *v.stride()[:3],
            out,
            logs,
            length,
            _scale(q),
            **_constants(q, k, length, views, block_size, causal, rows, columns),
            num_warps=warps,
            num_stages=stages,
        )
    return out, logs


@block_diffusion.register_fake
def _(q, k, v, length, views, block_size, causal):
    batch, asked, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, asked, dtype=torch.float32)


@operator(__name__, "block_diffusion_backward", mutates_args=())
def block_diffusion_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logs: Tensor,
    length: int,
    views: int,
    block_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    saved = d_out, q, k, v, out, logs
    _backward(*saved, d_q, d_k, d_v, None, None, length, views, block_size, causal)
    return d_q, d_k, d_v


@block_diffusion_backward.register_fake
def _(d_out, q, k, v, out, logs, length, views, block_size, causal):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_rotated(ctx, inputs, output) -> None:
    _, cos, sin, _, *numbers = inputs
    out, q, k, v, logs = output
    ctx.mark_non_differentiable(q, k, v, logs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, logs, cos, sin)
    ctx.numbers = numbers


def _gradients_rotated(ctx, d_out, *_):
    if d_out is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    return rotated_block_diffusion_backward(d_out, *saved, *ctx.numbers), *(None,) * 7


@differentiated_by(_gradients_rotated, _keep_rotated)
@operator(__name__, "rotated_block_diffusion", mutates_args=())
def rotated_block_diffusion(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    length: int,
    views: int,
    block_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv [B, T, 3 H D], cos and sin as for `rotated_heads` -> what `block_diffusion` makes of its
    parts, [B, T, H, D]; and for the backward pass q, k, v and the logarithms."""
    q, k, v = rotated_heads(qkv, cos, sin, heads)
    out, logs = block_diffusion(q, k, v, length, views, block_size, causal)
    return out, q, k, v, logs


@rotated_block_diffusion.register_fake
def _(qkv, cos, sin, heads, length, views, block_size, causal):
    batch, tokens, width = qkv.shape
    shape = batch, tokens, heads, width // 3 // heads
    logs = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    return *(qkv.new_empty(shape) for _ in range(4)), logs


@operator(__name__, "rotated_block_diffusion_backward", mutates_args=())
def rotated_block_diffusion_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logs: Tensor,
    cos: Tensor,
    sin: Tensor,
    length: int,
    views: int,
    block_size: int,
    causal: bool,
) -> Tensor:
    """The gradient of qkv [B, T, 3 H D]."""
    d_qkv = q.new_empty(*q.shape[:2], 3, *q.shape[2:])
    saved, parts = (d_out, q, k, v, out, logs), d_qkv.unbind(2)
    cos, sin = cos.contiguous(), sin.contiguous()
    _backward(*saved, *parts, cos, sin, length, views, block_size, causal)
    return d_qkv.flatten(2)


@rotated_block_diffusion_backward.register_fake
def _(d_out, q, k, v, out, logs, cos, sin, length, views, block_size, causal):
    return q.new_empty(*q.shape[:2], 3 * q.shape[2] * q.shape[3])


def _backward(
    d_out, q, k, v, out, logs, d_q, d_k, d_v, cos, sin, length, views, block_size, causal
) -> None:
    """Fill d_q, d_k and d_v; turned back where cos and sin are given."""
    q, k, v, d_out = (_readable(x) for x in (q, k, v, d_out))
    batch, asked, heads, width = q.shape
    deltas, numbers = torch.empty_like(logs), (q, k, length, views, block_size, causal)
    angle_rows = 0 if cos is None or cos.numel() == asked * width // 2 else asked
    strided = [y for x in (q, k, v, d_out) for y in (x, *x.stride()[:3])]
    scalars = cos, sin, angle_rows, length, _scale(q), width**-0.5
    rows, columns, warps, stages = _tiles(q).QUERIES
    with torch.cuda.device_of(q):
        backward_queries[(triton.cdiv(length, rows) * (asked // length) * batch * heads,)](
            *strided,
            out,
            logs,
            deltas,
            d_q,
            *d_q.stride()[:3],
            *scalars,
            **_constants(*numbers, rows, columns),
            num_warps=warps,
            num_stages=stages,
        )
        rows, columns, warps, stages = _tiles(q).KEYS
        backward_keys[(triton.cdiv(length, columns) * (views + 1) * batch * k.shape[2],)](
            *strided,
            logs,
            deltas,
            d_k,
            *d_k.stride()[:3],
            d_v,
            *d_v.stride()[:3],
            *scalars,
            **_constants(*numbers, rows, columns),
            num_warps=warps,
            num_stages=stages,
        )


def _tiles(q: Tensor) -> type[Tiles] | type[TilesOfWideHeads]:
    return TilesOfWideHeads if q.shape[-1] > 64 else Tiles


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _scale(q: Tensor) -> float:
    """Of scores, in units of log 2."""
    return q.shape[-1] ** -0.5 / math.log(2)


def _constants(q, k, length, views, block_size, causal, rows, columns) -> dict:
    return {
        "HEADS": q.shape[2],
        "GROUPS": q.shape[2] // k.shape[2],
        "D": q.shape[3],
        "VIEWS": views,
        "ASKING": q.shape[1] // length,
        "SIZE": block_size,
        "CAUSAL": causal,
        "EVEN": length % rows == 0 and length % columns == 0,
        "ROWS": rows,
        "COLUMNS": columns,
    }
