"""The products of a block for a few rows, with what stands behind each, in one kernel for CUDA.

A pass over a block of one text has 16 rows. Its products are then no work: what takes time is to
bring the weights from memory, and to start one kernel after another. So gate and residual stream
are in the product before them, and a program asks for its weights before it waits for the kernel
before it, which still runs ("programmatic dependent launch", from Hopper on).

Every program makes a few columns of TALL rows. Its warps share out the sum over the width, and add
up what they have in a fixed order: a row's numbers do not depend on the rows beside it. Norm and
modulation have a kernel of their own: made by every program for itself they took 4 us more.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .split import can_start_early, early_launch
from .starting import operator

try:  # see decode.py
    import triton
    import triton.language as tl
    import triton.language.extra.cuda as cuda
except ImportError:
    triton = None

MODULATING = 4  # warps, of a row
MOST_ROWS = 32  # beyond it torch's products are faster
TALL = 16  # rows of a program: those of a tensor core
MOST_WIDTH = 1024  # of what is normed: a program holds a row
MOST_INSIDE = 4 * MOST_WIDTH  # of another sum: a program holds the weights


class Tiles(NamedTuple):
    """How a product is cut up: columns of a program; warps, each of which takes its part of the
    width; the most of it that a warp takes at a time."""

    columns: int
    warps: int
    depth: int = 256

    def cut(self, width: int) -> tuple[int, int]:
        """What a warp takes at a time of `width`, and how often: all of it exactly, if that can
        be."""
        depth = self.depth
        while width % (self.warps * depth) and depth > 16:
            depth //= 2
        if width % (self.warps * depth):
            depth = 32
        return depth, -(-width // (self.warps * depth))


# by the width that is summed over
NARROW, WIDE = Tiles(16, 4), Tiles(16, 8)


def _tiles(width: int) -> Tiles:
    return NARROW if width <= MOST_WIDTH else WIDE


def takes(*layers: nn.Linear) -> bool:
    """Whether the two products can stand for these layers, the last of which may be wider inside
    than MOST_WIDTH."""
    *normed, last = layers
    return (
        all(type(layer) is nn.Linear for layer in layers)  # an adapter's have more in them
        and all(layer.weight.dtype.itemsize == 2 for layer in layers)
        and all(layer.in_features % 8 == 0 for layer in layers)  # rows begin at 16 bytes
        and all(layer.in_features <= MOST_WIDTH for layer in normed)
        and last.in_features <= MOST_INSIDE
    )


@operator(__name__, "normed_product", mutates_args=())
def normed_product(
    x: Tensor,
    norm: Tensor,
    modulation: Tensor | None,
    part: int,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
) -> Tensor:
    """modulate(norm(x)) weight^T + bias for x [..., E] float32 and weight [N, E] -> [..., N] of the
    weight's type; with GELU (tanh) on top, of what is not rounded yet.

    norm float32 [E]. modulation [1, 1, 6 E] or None, of which part 0 (attention) or 1 (MLP): shift,
    scale and gate, as in block.py.
    """
    x = x.contiguous()
    width = weight.shape[1]
    y = torch.empty_like(x, dtype=weight.dtype)
    early = can_start_early(x.device)
    with torch.cuda.device_of(x):
        _modulate[(x.numel() // width,)](
            x,
            norm,
            modulation,
            y,
            3 * part * width,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            EARLY=early,
            num_warps=MODULATING,
            **early_launch(early),
        )
    out = weight.new_empty(*x.shape[:-1], weight.shape[0])
    _start(None, y, None, 0, weight, bias, None, out, gelu)
    return out


@normed_product.register_fake
def _(x, norm, modulation, part, weight, bias, gelu):
    return weight.new_empty(*x.shape[:-1], weight.shape[0])


@operator(__name__, "added_product", mutates_args=())
def added_product(
    x: Tensor,
    a: Tensor,
    modulation: Tensor | None,
    part: int,
    weight: Tensor,
    bias: Tensor | None,
    read: Tensor | None,
) -> Tensor:
    """x + gate * (a weight^T + bias), float32 as x [..., E]; a [..., K] and weight [E, K] of one
    type. Of the flattened rows `read` [M] alone, where it is given: [M, E]. modulation, part: as
    above; None: no gate."""
    x, a = x.contiguous(), a.contiguous()
    out = torch.empty_like(x) if read is None else x.new_empty(read.shape[0], x.shape[-1])
    gate_at = (3 * part + 2) * x.shape[-1]
    _start(x, a, modulation, gate_at, weight, bias, read, out, False)
    return out


@added_product.register_fake
def _(x, a, modulation, part, weight, bias, read):
    return torch.empty_like(x) if read is None else x.new_empty(read.shape[0], x.shape[-1])


def _start(x, a, modulation, gate_at, weight, bias, read, out, gelu: bool) -> None:
    columns, width = weight.shape
    rows = out.numel() // columns
    tiles, early = _tiles(width), can_start_early(a.device)
    depth, passes = tiles.cut(width)
    with torch.cuda.device_of(a):
        _product[(triton.cdiv(columns, tiles.columns), triton.cdiv(rows, TALL))](
            x,
            a,
            modulation,
            weight,
            bias,
            read,
            out,
            rows,
            columns,
            gate_at,
            WIDTH=width,
            PASSES=passes,
            SLICES=tiles.warps,
            DEPTH=depth,
            TALL=TALL,
            COLUMNS=tiles.columns,
            WHOLE=columns % tiles.columns == 0 and width == passes * tiles.warps * depth,
            GELU=gelu,
            EARLY=early,
            PRECISION="ieee" if weight.dtype == torch.float32 else "tf32",
            num_warps=tiles.warps,
            num_stages=1,
            **early_launch(early),
        )


if triton is not None:

    @triton.jit
    def _gelu(x):
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1 + tl.exp(-2 * inner))  # x / 2 (1 + tanh inner)

    @triton.jit
    def _modulate(
        x,
        norm,
        modulation,
        out,
        shift_at,
        WIDTH: tl.constexpr,
        PADDED: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            cuda.gdc_launch_dependents()
        k = tl.arange(0, PADDED)
        inside = k < WIDTH
        factor = tl.load(norm + k, mask=inside, other=0).to(tl.float32)
        if modulation is not None:
            shift = tl.load(modulation + shift_at + k, mask=inside, other=0).to(tl.float32)
            scale = tl.load(modulation + shift_at + WIDTH + k, mask=inside, other=0).to(tl.float32)
        if EARLY:  # what stands above was there before this pass
            cuda.gdc_wait()
        at = tl.program_id(0) * WIDTH + k
        y = tl.load(x + at, mask=inside, other=0)
        y = tl.where(inside, y - tl.sum(y, 0) / WIDTH, 0)
        y = y * tl.rsqrt(tl.sum(y * y, 0) / WIDTH + 1e-5) * factor
        if modulation is not None:
            y = shift + y * (1 + scale)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["rows"])
    def _product(
        x,
        a,
        modulation,
        weight,
        bias,
        read,
        out,
        rows,
        columns,
        gate_at,
        WIDTH: tl.constexpr,
        PASSES: tl.constexpr,
        SLICES: tl.constexpr,
        DEPTH: tl.constexpr,
        TALL: tl.constexpr,
        COLUMNS: tl.constexpr,
        WHOLE: tl.constexpr,
        GELU: tl.constexpr,
        EARLY: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        if EARLY:
            cuda.gdc_launch_dependents()
        n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = n < columns
        deep = tl.arange(0, SLICES)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
        parts = ()  # all weights are on their way before anything is waited for
        for i in tl.static_range(PASSES):
            k = deep + i * (SLICES * DEPTH)
            at = weight + n[None, :, None] * WIDTH + k
            if WHOLE:  # without masks: at few rows it is instructions that take time
                parts += (tl.load(at),)
            else:
                mask = wanted[None, :, None] & (k < WIDTH)
                parts += (tl.load(at, mask=mask, other=0),)
        if modulation is not None:
            gate = tl.load(modulation + gate_at + n, mask=wanted, other=0).to(tl.float32)
        if bias is not None:
            more = tl.load(bias + n, mask=wanted, other=0).to(tl.float32)

        r = tl.program_id(1) * TALL + tl.arange(0, TALL)
        row = tl.minimum(r, rows - 1)  # what is read beyond the last row is not written
        if EARLY:  # what stands above was there before this pass
            cuda.gdc_wait()
        if read is not None:
            row = tl.load(read + row)
        there = (r < rows)[:, None] & wanted[None, :]
        if x is not None:
            old = tl.load(x + row[:, None] * columns + n[None, :], mask=there, other=0)
        answer = tl.zeros((SLICES, TALL, COLUMNS), tl.float32)  # a warp a slice
        for i in tl.static_range(PASSES):
            k = deep + i * (SLICES * DEPTH)
            at = a + row[None, :, None] * WIDTH + k
            y = tl.load(at) if WHOLE else tl.load(at, mask=k < WIDTH, other=0)
            w = tl.permute(parts[i], 0, 2, 1)
            answer = tl.dot(y, w, answer, input_precision=PRECISION)
        answer = tl.sum(answer, 0)
        if bias is not None:
            answer += more[None, :]
        if GELU:
            answer = _gelu(answer)
        if modulation is not None:
            answer *= gate[None, :]
        if x is not None:
            answer += old
        tl.store(out + r[:, None] * columns + n[None, :], answer.to(out.dtype.element_ty), there)
