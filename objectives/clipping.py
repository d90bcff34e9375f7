"""Clipped schedules: the interval of times whose loss varies least becomes the training interval.

Arriola et al. 2025 (arXiv:2503.09573), section 5: training on times in [lo, hi] instead of [0, 1]
lowers the variance of the gradient; which interval is best is read off the validation data. With
noise by counts the same is done with ranges of counts.
"""

import math

import torch
from torch import Tensor

from noise_schedule import EPS

from .block_diffusion import MaskedDiffusion
from .corruption import EXACT, Interval, count_law, log_binomial, times
from .counts import CountLaw

Counts = tuple[int, int]  # least and most masked tokens of a block
BATCHES = 100  # validation batches that enter a candidate's figure
TIMES = 4096  # of an interval, where a mean over its times is taken


def candidates(
    block_size: int, widths: list[float], delta: float, sampling_eps: float
) -> list[Interval]:
    """The full interval first, then for each width every start 0, delta, 2 delta ... <= 1 - width.

    With blocks of one: exactly the full interval and (1, 1), the exact likelihood.
    """
    full = (sampling_eps, 1)  # an int: the published runs log this one as "0.0 - 1"
    if block_size == 1:
        return [full, EXACT]
    grid = [full]
    for width in widths:
        starts = int((1 - width) / delta + 1e-6) + 1
        for i in range(starts):
            lo = round(i * delta, 10)
            interval = (max(lo, sampling_eps), min(round(lo + width, 10), 1.0))
            if interval[0] < interval[1] and interval not in grid:
                grid.append(interval)
    return grid


def name(interval: Interval) -> str:
    """How an interval is logged: its bounds to two digits, "valid_var_0.1 - 1.0" as published."""
    return "valid_var_{} - {}".format(*(round(bound, 2) for bound in interval))


def variance(block_means: Tensor) -> Tensor:
    """Unbiased variance over all blocks [B, N] of one global batch, but those of padding (nan)."""
    means = block_means.double()
    number = (~means.isnan()).sum()
    return (means - means.nansum() / number).square().nansum() / (number - 1)


def moments(objective: MaskedDiffusion, grid: list[Interval]) -> Tensor:
    """Of each interval the mean over its times of weight ** j times the chance that k tokens of a
    block are masked, for j = 1 and 2: float64 [2, C, S + 1]."""
    middles = (torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES
    found = []
    for interval in grid:
        level = objective.noise_level(times(middles, interval), interval)
        law = count_law(objective.block_size, level.p, objective.bounds(interval))
        found.append(torch.stack([level.weight, level.weight.square()]) @ law / TIMES)
    return torch.stack(found, 1)


def variances(of_counts: Tensor, nll: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """Of each interval the variance of a block's mean loss, which `variance` estimates from drawn
    times; here from blocks whose numbers of masked tokens were drawn evenly, in strata: [C].

    of_counts: `moments`. For each block [K]: its mean nll without weight (nan: padding), m of its n
    scored tokens masked. Given m every set is equally likely, so a time shapes nothing but the
    chance of m; with that chance times n in place of the draw, one pass serves all intervals, and
    the noise of the times is gone.
    """
    real = ~nll.isnan()
    nll, m, n = nll[real].double()[:, None], m[real][:, None], n[real][:, None]
    k = torch.arange(of_counts.shape[-1], device=n.device)
    size = torch.as_tensor(len(k) - 1, device=n.device)
    # how likely m of the n are masked where k of the whole block are: [K, S + 1]
    ways = log_binomial(n, m) + log_binomial(size - n, k - m) - log_binomial(size, k)
    chance = ways.exp() @ of_counts.to(n.device).transpose(-1, -2)  # [2, K, C]
    mean, square = (n * chance[0] * nll).mean(0), (n * chance[1] * nll.square()).mean(0)
    return square - mean.square()


def count_candidates(block_size: int, widths: list[float], delta: float) -> list[Counts]:
    """The ranges of counts whose shares of the block lie in an interval of `candidates`: all counts
    first, each range once."""
    ranges = [(1, block_size)]
    for low, high in candidates(block_size, widths, delta, EPS)[1:]:
        least = max(1, math.ceil(low * block_size - 1e-6))
        most = int(high * block_size + 1e-6)
        if least <= most and (least, most) not in ranges:
            ranges.append((least, most))
    return ranges


def name_of_counts(counts: Counts) -> str:
    """How a range of counts is logged."""
    return "valid_var_counts_{} - {}".format(*counts)


def law_variances(laws: list[CountLaw], nll: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """Of each law the variance of a block's mean loss; as for `variances`: [C]."""
    real = ~nll.isnan()
    nll, m, n = nll[real].double(), m[real], n[real]
    found = []
    for law in laws:
        chance, loss = n * law.chance(m, n), nll * law.weight(m, n)
        found.append((chance * loss.square()).mean() - (chance * loss).mean().square())
    return torch.stack(found)


class Batches:
    """Rows of all devices, put together again to the global batches of one: where a split ends,
    which rows come together depends on the number of devices, and a batch's variance must not."""

    def __init__(self, rows: int):
        self.size = rows
        self.held: Tensor | None = None  # the beginning of the next batch

    def add(self, rows: Tensor) -> list[Tensor]:
        """The next rows [B, ...] of the split; the batches [size, ...] that are whole now."""
        held = rows if self.held is None else torch.cat([self.held, rows])
        whole = len(held) // self.size * self.size
        self.held = held[whole:] if whole < len(held) else None
        return list(held[:whole].split(self.size)) if whole else []

    def rest(self) -> list[Tensor]:
        """The last batch, if it is smaller."""
        return [] if self.held is None else [self.held]


class Search:
    """Collects one variance per candidate and batch; the least mean wins, the first on a tie."""

    def __init__(self, grid: list[Interval] | list[Counts]):
        self.grid = grid
        self.figures: list[list[Tensor]] = [[] for _ in grid]

    def wants_more(self) -> bool:
        return len(self.figures[-1]) < BATCHES

    def add(self, variances: list[Tensor]) -> None:
        """One variance per candidate, of the same batch."""
        for kept, new in zip(self.figures, variances, strict=True):
            kept.append(new)

    def means(self) -> list[float]:
        return [float(torch.stack(figures).mean()) for figures in self.figures]

    def best(self) -> Interval | Counts:
        means = self.means()
        return self.grid[min(range(len(means)), key=means.__getitem__)]
