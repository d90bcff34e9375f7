"""Nucleus filtering by the reference's rule.

Tokens in descending order of probability are kept while the cumulative sum *including* the token is
<= p, and the first is always kept. So the kept mass is below p, unlike the common variant, which
also keeps the token that crosses p. Published numbers depend on it.

Sorting 50 000 numbers costs as much as the network's head. In float32 the edge of the nucleus is
therefore found by two histograms over the halves of the probabilities' bit patterns (which order as
the numbers do), with masses in fixed point, so that the result depends on no order of summation.
On a GPU with Triton, kernels do all of it (models/kernels: top_p.py, of few rows count_p.py).
Without Triton, compiled for a GPU, many rows are searched for it instead: there a histogram is
slower than the two dozen sums of a search. In float64 it is sorted, as the reference does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.kernels.count_p import MOST_ROWS, counted
from models.kernels.top_p import ONE, can_filter, filtered

HALF = 15  # bits: a float32 in [0, 1] has 30 below its sign
SORTED = 4096  # a vocabulary that is sorted sooner than counted
SEARCHED_ROWS = 64  # and searched sooner than counted, see by_search
BITS = 2  # of the key found by each pass of by_search


def call(function: Callable, *arguments):
    return function(*arguments)


def nucleus(log_probs: Tensor, p: float, search: bool = False, apart: Callable = call) -> Tensor:
    """Log-probabilities [..., V] with -inf at the dropped tokens, not renormalised.

    Among equal probabilities the smaller id is kept first. search: use `by_search` where there are
    many rows. apart: how functions are called that torch.compile must leave alone, see
    `compiled_sample`.
    """
    if p >= 1:
        return log_probs
    sort = log_probs.dtype == torch.float64 or log_probs.shape[-1] <= SORTED
    rows = log_probs.numel() // log_probs.shape[-1]
    if not sort and rows and can_filter(log_probs):
        return counted(log_probs, p) if rows <= MOST_ROWS else filtered(log_probs, p)
    if sort:
        kept = by_sorting(log_probs, p)
    elif search and rows >= SEARCHED_ROWS:
        kept = by_search(log_probs, p)
    else:
        kept = by_digits(log_probs, p, apart)
    return log_probs.masked_fill(~kept, -torch.inf)


def by_sorting(log_probs: Tensor, p: float) -> Tensor:
    """Which tokens are kept, bool [..., V]."""
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    kept = ordered.exp().cumsum(-1) <= p
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def by_digits(log_probs: Tensor, p: float, apart: Callable = call) -> Tensor:
    """The same without sorting; log_probs float32."""
    probs = log_probs.exp()
    bits = probs.view(torch.int32)
    mass = (probs * ONE).long()
    limit = int(p * ONE)
    upper = bits >> HALF
    edge, above = last_that_fits(upper, mass, torch.zeros_like(mass[..., :1]), limit, apart)
    inside = mass * (upper == edge)
    lower, above = last_that_fits(bits & ((1 << HALF) - 1), inside, above, limit, apart)
    edge = (edge << HALF) + lower  # the greatest probability that does not fit, as bits
    at_edge = bits == edge
    each = (edge.view(torch.float32) * ONE).long().clamp(min=1)
    number = apart(running_sum, at_edge, torch.int32)
    kept = (bits > edge) | (at_edge & (number <= (limit - above) // each))
    return kept.scatter(-1, log_probs.argmax(-1, keepdim=True), True)


def last_that_fits(
    digit: Tensor, mass: Tensor, above: Tensor, limit: int, apart: Callable = call
) -> tuple[Tensor, Tensor]:
    """The greatest digit whose tokens do not all fit below `limit`, -1 where all do, and the mass
    above it, [..., 1] each. `above`: mass that is kept whatever the digit."""
    counts = mass.new_zeros(*mass.shape[:-1], 1 << HALF).scatter_add_(-1, digit.long(), mass)
    rest = counts.sum(-1, keepdim=True) - apart(running_sum, counts)  # mass of greater digits
    total = above + rest + counts
    least = (total > limit).sum(-1, keepdim=True)  # digits from it on fit
    last = (1 << HALF) - 1
    above = torch.where(least <= last, total.gather(-1, least.clamp(max=last)), above)
    return (least - 1).int(), above


def running_sum(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.cumsum(-1, dtype=dtype)


def by_search(log_probs: Tensor, p: float) -> Tensor:
    """The same by nothing but sums over the vocabulary. A token's key is its probability's bit
    pattern, followed by the greater number the smaller its id. `edge` becomes, some bits at a time,
    the greatest key at and above which lies more than p."""
    vocabulary = log_probs.shape[-1]
    below = vocabulary.bit_length()
    probs = log_probs.exp()
    ids = torch.arange(vocabulary, device=log_probs.device)
    key = (probs.view(torch.int32).long() << below) + (vocabulary - ids)
    mass = (probs * ONE).long()
    limit = int(p * ONE)
    edge = torch.zeros_like(key[..., :1])
    for shift in range((2 * HALF + below - 1) // BITS * BITS, -1, -BITS):
        too_much = [
            (mass * (key >= edge + (i << shift))).sum(-1, keepdim=True) > limit
            for i in range(1, 1 << BITS)
        ]
        edge = edge + (torch.stack(too_much).sum(0) << shift)
    return (key > edge) | (key == key.amax(-1, keepdim=True))
