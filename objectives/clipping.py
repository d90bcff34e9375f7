"""Clipped schedules: the interval of times whose loss varies least becomes the training interval.

Arriola et al. 2025 (arXiv:2503.09573), section 5: training on times in [lo, hi] instead of [0, 1]
lowers the variance of the gradient; which interval is best is read off the validation data.
"""

import torch
from torch import Tensor

from .corruption import EXACT, Interval

BATCHES = 100  # validation batches that enter a candidate's figure


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


class Search:
    """Collects one variance per candidate and batch; the least mean wins, the first on a tie."""

    def __init__(self, grid: list[Interval]):
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

    def best(self) -> Interval:
        means = self.means()
        return self.grid[min(range(len(means)), key=means.__getitem__)]
