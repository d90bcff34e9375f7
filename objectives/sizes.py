"""Rows of different block sizes in one batch: one network for all of them.

Each row of the global batch draws its block size S from a law. Its expected loss is then the NELBO
at that S, and that of the batch their mean by the law.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.randomness import uniform
from random_streams import order

ROUNDING = 1e-9  # of a border between two sizes, in rows


@dataclass(frozen=True)
class SizeLaw:
    """`sizes` in ascending order, and how likely each is: `weights` of sum 1."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def common(self) -> int:
        """The least multiple of all sizes: where blocks of every size begin."""
        return math.lcm(*self.sizes)

    def deal(self, seed: int, step: int, rows: int, stream: int) -> Tensor:
        """The size of each row of a global batch of `rows`, int64. A random permutation deals the
        rows one stratum each, so each size comes as often as its weight says, rounded up or down;
        which of both is drawn, so that each row has the law itself.

        stream: of the uniform number that rounds.
        """
        # a plain seed: runs that began with the first version of the streams had no such order
        stratum = torch.from_numpy(order(int(seed), "sizes", step, rows))
        inside = uniform(int(seed), step, stream, dtype=torch.float64)
        border = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)[:-1] * rows
        border = torch.where((border - border.round()).abs() < ROUNDING, border.round(), border)
        whole = border.floor()
        # stratum + inside >= border, without rounding
        passed = stratum[:, None] >= whole + (inside < border - whole)
        return torch.tensor(self.sizes)[passed.sum(1)]


@dataclass(frozen=True)
class Deal:
    """The blocks of a global batch, numbered row after row."""

    sizes: Tensor  # int64 [G], of each row
    first: Tensor  # int64 [G], the number of its first block
    of_block: Tensor  # int64 [N], the size of each block

    def blocks(self, rows: Tensor, length: int) -> Tensor:
        """The number of the block that each token of these rows is in, int64 [B, L]."""
        place = torch.arange(length, device=rows.device) // self.sizes[rows, None]
        return self.first[rows, None] + place

    def among_equals(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """A permutation of all blocks [N] -> the place of each among those of its size, and how
        many these are: the order within a size is as random as that of all."""
        place, number = torch.empty_like(ranks), torch.empty_like(ranks)
        for size in self.of_block.unique().tolist():
            own = self.of_block == size
            place[own] = ranks[own].argsort().argsort()
            number[own] = own.sum()
        return place, number


@functools.lru_cache(maxsize=2, typed=True)  # an OldSeed is another seed than the equal int
def deal(law: SizeLaw, seed: int, step: int, rows: int, length: int, stream: int) -> Deal:
    """Kept for the micro-batches of a step."""
    sizes = law.deal(seed, step, rows, stream)
    number = length // sizes
    return Deal(sizes, number.cumsum(0) - number, sizes.repeat_interleave(number))


def size_at(schedule: dict[int, int], step: int) -> int:
    """Of the blocks at a step, counted from 0, where sizes follow the steps from which they are
    trained; one of these is 0."""
    return schedule[max(begin for begin in schedule if begin <= step)]


def shares_of_steps(schedule: dict[int, int], steps: int) -> dict[int, float]:
    """{size: its share of the first `steps` steps}, in ascending order of sizes."""
    begins = sorted(begin for begin in schedule if begin < steps)
    found: dict[int, float] = {}
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        found[schedule[begin]] = found.get(schedule[begin], 0.0) + (end - begin) / steps
    return dict(sorted(found.items()))
