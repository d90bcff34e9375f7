"""The MLP of a block in training: two products with a GELU between them, for CUDA.

Between the products lie four times as many numbers as anywhere else in a block. Only what the first
product gives is kept; the backward pass makes what leaves the GELU again, in the kernel that reads
it anyway and sums up the gradient of the bias.
"""

import torch
from torch import Tensor, nn

from .starting import can_start, differentiated_by, operator

try:  # see decode.py
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# of a program: rows, rows at a time, columns; stages of loading, as in residual.py; warps
CUT = {"ROWS": 64, "TILE": 4, "COLUMNS": 512, "STAGES": 3, "num_warps": 4}


def can_fuse_mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> bool:
    """Whether `mlp` can stand for the two layers, and is worth it: gradients are wanted."""
    return (
        torch.is_grad_enabled()
        and type(first) is nn.Linear  # an adapter's have more in them
        and type(second) is nn.Linear
        and first.weight.requires_grad  # gradients of both are made
        and second.weight.requires_grad
        and x.dtype.itemsize <= 4
        and can_start(x.device)
    )


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, weight2, bias2 = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, bias, weight2)
    ctx.dtypes = bias.dtype, bias2.dtype


def _gradients(ctx, d_out, _):
    if d_out is None:
        return (None,) * 5
    saved = ctx.saved_tensors  # once: a layer that is made again gives them out once
    d_x, d_weight, d_bias, d_weight2, d_bias2 = mlp_backward(d_out, *saved)
    return d_x, d_weight, d_bias.to(ctx.dtypes[0]), d_weight2, d_bias2.to(ctx.dtypes[1])


@differentiated_by(_gradients, _keep)
@operator(__name__, "mlp", mutates_args=())
def mlp(
    x: Tensor, weight: Tensor, bias: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    """gelu(x weight^T + bias) weight2^T + bias2 for x [..., E], weight [F, E], weight2 [E, F], all
    of the type of x but bias [F], with the GELU by tanh in float32. Returns [..., E], and [N, F]
    for the backward pass: x weight^T of the N rows."""
    rows = x.reshape(-1, x.shape[-1])
    inner = rows @ weight.t()
    out = torch.addmm(bias2, _gelu(inner, bias), weight2.t())
    return out.view(*x.shape[:-1], len(weight2)), inner


@mlp.register_fake
def _(x, weight, bias, weight2, bias2):
    rows = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], len(weight2)), x.new_empty(rows, len(weight))


@operator(__name__, "mlp_backward", mutates_args=())
def mlp_backward(
    d_out: Tensor, x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias (float32), weight2 and bias2 (float32)."""
    rows = x.reshape(-1, x.shape[-1])
    d_rows = d_out.reshape(-1, d_out.shape[-1])
    d_inner, left, d_bias = _gelu_backward(inner, bias, d_rows @ weight2)
    d_weight2, d_bias2 = d_rows.t() @ left, d_rows.sum(0, dtype=torch.float32)
    del left
    return (d_inner @ weight).view_as(x), d_inner.t() @ rows, d_bias, d_weight2, d_bias2


@mlp_backward.register_fake
def _(d_out, x, inner, weight, bias, weight2):
    d_bias = x.new_empty(len(weight), dtype=torch.float32)
    d_bias2 = x.new_empty(len(weight2), dtype=torch.float32)
    d_x = x.new_empty(x.shape)
    return d_x, weight.new_empty(weight.shape), d_bias, weight2.new_empty(weight2.shape), d_bias2


def _gelu(inner: Tensor, bias: Tensor) -> Tensor:
    rows, width = inner.shape
    out = torch.empty_like(inner)
    if not rows:  # a step in which nothing counts
        return out
    with torch.cuda.device_of(inner):
        _forward[_grid(inner)](inner, bias, out, rows, width, **CUT)
    return out


def _grid(inner: Tensor) -> tuple[int, int]:
    rows, width = inner.shape
    return triton.cdiv(rows, CUT["ROWS"]), triton.cdiv(width, CUT["COLUMNS"])


def _gelu_backward(inner: Tensor, bias: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of inner; what _gelu gave, in the place of d_out; the gradient of the bias."""
    rows, width = inner.shape
    parts = _grid(inner)[0]
    d_inner = torch.empty_like(inner)
    sums = inner.new_empty(parts, width, dtype=torch.float32)
    if not rows:
        return d_inner, d_out, sums.sum(0)
    with torch.cuda.device_of(inner):
        _backward[_grid(inner)](inner, bias, d_out, d_inner, sums, rows, width, **CUT)
    return d_inner, d_out, sums.sum(0)


if triton is not None:

    @triton.jit
    def _tanh(x):
        return 1 - 2 / (tl.exp(2 * x) + 1)

    @triton.jit
    def _slope(x):
        """tanh inside the GELU of x, and the derivative of what it is the tanh of."""
        square = x * x
        inner = 0.7978845608028654 * x * (1 + 0.044715 * square)
        return _tanh(inner), 0.7978845608028654 * (1 + 3 * 0.044715 * square)

    @triton.jit(do_not_specialize=["rows"])
    def _forward(
        inner,
        bias,
        out,
        rows,
        width,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        start = tl.program_id(0).to(tl.int64) * ROWS
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.load(bias + column, mask=column < width, other=0).to(tl.float32)
        for i in tl.range(0, ROWS, TILE, num_stages=STAGES):
            row = start + i + tl.arange(0, TILE)
            mask = (row < rows)[:, None] & (column < width)[None, :]
            at = row[:, None] * width + column[None, :]
            x = tl.load(inner + at, mask=mask, other=0).to(tl.float32) + b[None, :]
            turned, _ = _slope(x)
            tl.store(out + at, (0.5 * x * (1 + turned)).to(out.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["rows"])
    def _backward(
        inner,
        bias,
        d_out,
        d_inner,
        sums,
        rows,
        width,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        start = tl.program_id(0).to(tl.int64) * ROWS
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.load(bias + column, mask=column < width, other=0).to(tl.float32)
        total = tl.zeros([TILE, COLUMNS], tl.float32)  # rows are added up once, in the end
        for i in tl.range(0, ROWS, TILE, num_stages=STAGES):
            row = start + i + tl.arange(0, TILE)
            mask = (row < rows)[:, None] & (column < width)[None, :]
            at = row[:, None] * width + column[None, :]
            x = tl.load(inner + at, mask=mask, other=0).to(tl.float32) + b[None, :]
            d = tl.load(d_out + at, mask=mask, other=0).to(tl.float32)
            turned, slope = _slope(x)
            tl.store(d_out + at, (0.5 * x * (1 + turned)).to(d_out.dtype.element_ty), mask=mask)
            d *= 0.5 * (1 + turned + x * (1 - turned * turned) * slope)
            tl.store(d_inner + at, d.to(d_inner.dtype.element_ty), mask=mask)
            total += d
        found = sums + tl.program_id(0) * width + column
        tl.store(found, tl.sum(total, 0), mask=column < width)
