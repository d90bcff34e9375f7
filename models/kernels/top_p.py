"""The nucleus of samplers/nucleus.py in one kernel for CUDA.

A search for the nucleus' edge goes through the vocabulary again and again. Here a program takes one
row, which stays in the cache on the chip meanwhile. Three passes find between which powers of two
the edge lies. The tokens there are few: their probabilities are written down side by side, and the
search ends among them. All sums are of integers, so that the result depends on no order.
"""

import torch
from torch import Tensor

from .starting import can_start, operator, processors

try:  # see decode.py
    import triton
    import triton.language as tl
    import triton.language.extra.libdevice as libdevice
except ImportError:
    triton = None

ONE = 1 << 40  # of a mass in fixed point


class Tiles:
    """How the kernel is cut up. A processor has room for 32 warps of so many registers a thread:
    for one program, or for two, of which one computes while the other waits."""

    TOKENS = 128  # at a time, per warp
    WARPS_FOR_FEW = 32  # rows, no more than processors
    WARPS = 16
    REGISTERS = 64


def can_filter(log_probs: Tensor) -> bool:
    """Whether `filtered` can take log_probs [..., V]."""
    return (
        log_probs.dtype == torch.float32
        and not torch.is_grad_enabled()  # it has none
        and can_start(log_probs.device)
    )


@operator(__name__, "filtered", mutates_args=())
def filtered(log_probs: Tensor, p: float) -> Tensor:
    """log_probs float32 [..., V] -> the same with -inf at all tokens that the nucleus drops.

    p < 1. To the compiler this is one operator."""
    vocabulary = log_probs.shape[-1]
    rows = log_probs.reshape(-1, vocabulary)  # may be part of wider ones
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    few = rows.shape[0] <= processors(rows.device)
    warps = Tiles.WARPS_FOR_FEW if few else Tiles.WARPS
    with torch.cuda.device_of(log_probs):  # Triton starts on the current device
        _filter[(rows.shape[0],)](
            rows,
            out,
            int(p * ONE),
            STRIDE=rows.stride(0),
            VOCABULARY=vocabulary,
            ONES=float(ONE),
            TILE=warps * Tiles.TOKENS,
            EXACT=log_probs.device.type == "cuda",
            num_warps=warps,
            maxnreg=Tiles.REGISTERS,
        )
    return out


@filtered.register_fake
def _(log_probs, p):
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


if triton is not None:

    @triton.jit
    def _exp(x, EXACT: tl.constexpr):
        """torch's own to the last bit, which Triton's interpreter does not have."""
        if EXACT:
            return libdevice.exp(x)
        else:
            return tl.exp(x)

    @triton.jit
    def _mass(p, ONES: tl.constexpr):
        return (p * ONES).to(tl.int64)

    @triton.jit
    def _added(p, first, second, third, edge, step, ONES: tl.constexpr):
        """Mass at and above the three thresholds behind `edge`."""
        bits, mass = p.to(tl.int32, bitcast=True), _mass(p, ONES)
        first += tl.where(bits >= edge + step, mass, 0)
        second += tl.where(bits >= edge + 2 * step, mass, 0)
        third += tl.where(bits >= edge + 3 * step, mass, 0)
        return first, second, third

    @triton.jit
    def _three(a, b, c, d, e, f):
        return a + d, b + e, c + f

    @triton.jit
    def _moved(first, second, third, edge, step, room):
        """The greatest threshold at and above which lies more than `room`, else `edge`."""
        # together, so that the threads wait for each other once
        first, second, third = tl.reduce((first, second, third), 0, _three)
        number = (first > room).to(tl.int32) + (second > room).to(tl.int32)
        return edge + step * (number + (third > room).to(tl.int32))

    @triton.jit(do_not_specialize=["limit"])
    def _filter(
        log_probs,
        out,
        limit,
        STRIDE: tl.constexpr,
        VOCABULARY: tl.constexpr,
        ONES: tl.constexpr,
        TILE: tl.constexpr,
        EXACT: tl.constexpr,
    ):
        """Tokens are ordered by the bits of their probability, which as an integer orders as the
        probability does. `edge` is the greatest at and above which lies more than `limit`."""
        row = tl.program_id(0).to(tl.int64)
        log_probs += row * STRIDE
        out += row * VOCABULARY
        lane = tl.arange(0, TILE)
        nothing = tl.zeros([TILE], tl.int64)
        limit = limit.to(tl.int64)

        # the power of two; what is below 2^-40 has no mass, and the first of them stands for it
        none: tl.constexpr = 86 << 23
        edge = tl.full([], none, tl.int32)
        for i in range(3):
            step = 1 << (27 - 2 * i)
            first, second, third = nothing, nothing, nothing
            for at in range(0, VOCABULARY, TILE):
                id = at + lane
                x = tl.load(log_probs + id, mask=id < VOCABULARY, other=-float("inf"))
                p = _exp(x, EXACT)
                first, second, third = _added(p, first, second, third, edge, step, ONES)
            edge = _moved(first, second, third, edge, step, limit)

        # the probabilities between it and the next one, at the start of what will be the answer
        beyond = edge + (1 << 23)
        above = nothing
        greatest = tl.zeros([TILE], tl.int32)
        count = tl.zeros([], tl.int32)
        for at in range(0, VOCABULARY, TILE):
            id = at + lane
            x = tl.load(log_probs + id, mask=id < VOCABULARY, other=-float("inf"))
            p = _exp(x, EXACT)
            bits = p.to(tl.int32, bitcast=True)
            above += tl.where(bits >= beyond, _mass(p, ONES), 0)
            greatest = tl.maximum(greatest, bits)
            inside = (bits >= edge) & (bits < beyond)
            number = tl.cumsum(inside.to(tl.int32), 0)
            tl.store(out + count + number - 1, p, mask=inside)
            count += tl.sum(inside.to(tl.int32))
        room = limit - tl.sum(above)  # for the mass of these
        tl.debug_barrier()  # what one thread wrote others read

        for i in range(12):
            step = 1 << tl.maximum(21 - 2 * i, 0)
            first, second, third = nothing, nothing, nothing
            at = tl.zeros([], tl.int32)
            while at < count:
                p = tl.load(out + at + lane, mask=at + lane < count, other=0)
                first, second, third = _added(p, first, second, third, edge, step, ONES)
                at += TILE
            edge = _moved(first, second, third, edge, step, room)

        # of equal tokens at the edge some still fit: those of the smallest ids
        above = nothing
        equal = tl.zeros([TILE], tl.int32)
        at = tl.zeros([], tl.int32)
        while at < count:
            p = tl.load(out + at + lane, mask=at + lane < count, other=0)
            bits = p.to(tl.int32, bitcast=True)
            above += tl.where(bits > edge, _mass(p, ONES), 0)
            equal += (bits == edge).to(tl.int32)
            at += TILE
        each = tl.maximum(_mass(edge.to(tl.float32, bitcast=True), ONES), 1)
        fit = (room - tl.sum(above)) // each
        if edge == tl.max(greatest):
            fit = tl.maximum(fit, 1)  # the first token is always kept
        last = tl.full([], -1, tl.int32)  # the id of the last that is kept
        if fit >= tl.sum(equal):
            last += VOCABULARY
        elif fit > 0:
            seen = tl.zeros([], tl.int32)
            for at in range(0, VOCABULARY, TILE):
                id = at + lane
                x = tl.load(log_probs + id, mask=id < VOCABULARY, other=-float("inf"))
                at_edge = _exp(x, EXACT).to(tl.int32, bitcast=True) == edge
                number = seen + tl.cumsum(at_edge.to(tl.int32), 0)
                last = tl.maximum(last, tl.max(tl.where(at_edge & (number <= fit), id, -1)))
                seen += tl.sum(at_edge.to(tl.int32))
        edge = tl.where(edge == none, -1, edge)  # all fits

        tl.debug_barrier()  # nobody reads the answer's place any more
        for at in range(0, VOCABULARY, TILE):
            id = at + lane
            x = tl.load(log_probs + id, mask=id < VOCABULARY, other=-float("inf"))
            bits = _exp(x, EXACT).to(tl.int32, bitcast=True)
            kept = (bits > edge) | ((bits == edge) & (id <= last))
            tl.store(out + id, tl.where(kept, x, -float("inf")), mask=id < VOCABULARY)
