"""top_p.py for a few rows, which many programs share: they count the masses of their tokens by the
digits of the probability. A histogram of the first digit tells in which of its bins the edge of the
nucleus lies, then one of the next digit among the tokens of that bin. Sums are of integers, so that
the result depends on no order.
"""

import torch
from torch import Tensor

from . import top_p
from .split import can_start_early, early_launch
from .starting import operator
from .top_p import ONE

try:  # see decode.py
    import triton
    import triton.language as tl
    import triton.language.extra.cuda as cuda
except ImportError:
    triton = None

MOST_ROWS = 32  # beyond it top_p.py is as fast
DIGIT = 10  # bits; a float32 in [0, 1] has three such digits below its sign
SLICE = 1024  # tokens of a program


@operator(__name__, "counted", mutates_args=())
def counted(log_probs: Tensor, p: float) -> Tensor:
    """The same as `filtered`, for any number of rows."""
    vocabulary = log_probs.shape[-1]
    rows = log_probs.reshape(-1, vocabulary).contiguous()
    count, slices = rows.shape[0], triton.cdiv(vocabulary, SLICE)
    out = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    masses = torch.zeros(count, 3 << DIGIT, dtype=torch.int64, device=rows.device)
    # of a row: digits so far and the mass above them, after each of three rounds; then of each
    # slice how many tokens stand at the edge
    found = torch.empty(count, 6 + slices, dtype=torch.int64, device=rows.device)
    early = can_start_early(rows.device)
    shared = {
        "ONES": float(ONE),
        "DIGIT": DIGIT,
        "SLICE": SLICE,
        "EXACT": rows.device.type == "cuda",
        "EARLY": early,
        "num_warps": 4,
        **early_launch(early),
    }
    grid, numbers = (count, slices), (vocabulary, int(p * ONE))
    with torch.cuda.device_of(rows):
        for number in range(4):
            _round[grid](rows, masses, found, *numbers, ROUND=number, **shared)
        _keep[grid](rows, found, out, *numbers, PADDED=triton.next_power_of_2(slices), **shared)
    return out


@counted.register_fake
def _(log_probs, p):
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


if triton is not None:

    @triton.jit
    def _bits(log_probs, at, vocabulary, EXACT: tl.constexpr):
        """Probabilities and their bit patterns, below 0 behind the vocabulary."""
        x = tl.load(log_probs + at, mask=at < vocabulary, other=-float("inf"))
        p = top_p._exp(x, EXACT)
        return x, p, tl.where(at < vocabulary, p.to(tl.int32, bitcast=True), -1)

    @triton.jit
    def _round(
        log_probs,
        masses,
        found,
        vocabulary,
        limit,
        ROUND: tl.constexpr,
        ONES: tl.constexpr,
        DIGIT: tl.constexpr,
        SLICE: tl.constexpr,
        EXACT: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        bins: tl.constexpr = 1 << DIGIT
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        found += row * (6 + tl.num_programs(1))
        masses += row * (3 * bins)
        at = part * SLICE + tl.arange(0, SLICE)
        _, p, bits = _bits(log_probs + row * vocabulary, at, vocabulary, EXACT)
        mine = bits >= 0
        if ROUND > 0:
            digits = tl.zeros((), tl.int64)
            above = tl.zeros((), tl.int64)
            if ROUND > 1:
                digits = tl.load(found + 2 * ROUND - 4)
                above = tl.load(found + 2 * ROUND - 3)
            d = tl.arange(0, bins)
            mass = tl.load(masses + (ROUND - 1) * bins + d)
            rest = above + tl.sum(mass, 0) - tl.cumsum(mass, 0)  # of greater digits
            digit = tl.sum((rest + mass > limit).to(tl.int32), 0) - 1
            above = tl.sum(tl.where(d == digit, rest, 0), 0)
            digits = digits * bins + digit  # below 0 from the first on, if all are kept
            if part == 0:
                tl.store(found + 2 * ROUND - 2, digits)
                tl.store(found + 2 * ROUND - 1, above)
            mine = mine & ((bits >> (3 - ROUND) * DIGIT) == digits)
        if ROUND < 3:
            mass = top_p._mass(p, ONES)
            digit = (bits >> (2 - ROUND) * DIGIT) & (bins - 1)
            tl.atomic_add(masses + ROUND * bins + digit, mass, mask=mine & (mass > 0))
        else:
            tl.store(found + 6 + part, tl.sum(mine.to(tl.int32), 0).to(tl.int64))

    @triton.jit
    def _keep(
        log_probs,
        found,
        out,
        vocabulary,
        limit,
        PADDED: tl.constexpr,
        ONES: tl.constexpr,
        DIGIT: tl.constexpr,
        SLICE: tl.constexpr,
        EXACT: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        slices = tl.num_programs(1)
        found += row * (6 + slices)
        log_probs += row * vocabulary
        edge, over = tl.load(found + 4), tl.load(found + 5)
        every = tl.arange(0, PADDED)
        count = tl.load(found + 6 + every, mask=every < slices, other=0)
        pattern = tl.maximum(edge, 0).to(tl.int32)
        each = tl.maximum(top_p._mass(pattern.to(tl.float32, bitcast=True), ONES), 1)
        kept = (limit - over) // each  # of those at the edge, the first ones
        kept = tl.where((over == 0) & (kept == 0), 1, kept)  # the first of all is always kept
        before = tl.sum(tl.where(every < part, count, 0), 0)
        at = part * SLICE + tl.arange(0, SLICE)
        x, _, bits = _bits(log_probs, at, vocabulary, EXACT)
        equal = bits == edge
        number = before + tl.cumsum(equal.to(tl.int32), 0)
        stays = (bits > edge) | (equal & (number <= kept))
        at_out = out + row * vocabulary + at
        tl.store(at_out, tl.where(stays, x, -float("inf")), mask=at < vocabulary)
