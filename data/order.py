"""The order of examples: which rows make up which batch, on which device.

Training reads one endless shuffled stream. Its position p (0, 1, 2 ... over the whole run) shows
row permutation(seed, epoch p // n)[p % n] of n rows. The stream is cut into slices of batch size
times world size; each rank takes its part of a slice. So the examples of an optimizer step depend
on the seed and the position alone, not on devices, micro-batches or workers, and a run resumes at
any position. A batch sampler runs in the main process: workers only fetch the rows they are told.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import random_streams


class ExampleIndex(NamedTuple):
    """One example of a batch."""

    position: int  # in the stream; in validation, the row
    row: int  # of the data set


class ShuffledStream:
    """n rows in a new order every epoch. Reading at any position costs one permutation per
    epoch."""

    def __init__(self, rows: int, seed: int):
        if rows < 1:
            raise ValueError(f"the training split has {rows} rows; it needs at least one")
        self.rows, self.seed = rows, seed
        self.epoch, self.permutation = -1, None

    def __getitem__(self, position: int) -> ExampleIndex:
        epoch, offset = divmod(position, self.rows)
        if epoch != self.epoch:
            self.permutation = random_streams.order(self.seed, "rows", epoch, self.rows)
            self.epoch = epoch
        return ExampleIndex(position, int(self.permutation[offset]))


class InOrder:
    """A stream whose rows are its positions (streaming.py)."""

    def __getitem__(self, position: int) -> ExampleIndex:
        return ExampleIndex(position, position)


@dataclass
class TrainBatches:
    """Batch sampler without end; `start` tells the position at which an iterator begins.

    in_turn: the ranks take the rows of a slice in turn instead of a contiguous part each, so that
    a rank's positions are all equal modulo the world size. The examples of a step are the same.

    With accumulation over k micro-batches a step's global batch is k whole slices, so any number of
    devices that gives the same global batch gives the same steps.
    """

    stream: ShuffledStream | InOrder
    batch_size: int  # of one device
    rank: int
    world_size: int
    start: Callable[[], int]
    in_turn: bool = False

    def __iter__(self) -> Iterator[list[ExampleIndex]]:
        begin, step = self.rank * self.batch_size, 1
        if self.in_turn:
            begin, step = self.rank, self.world_size
        position = self.start() + begin
        while True:
            yield [self.stream[position + i * step] for i in range(self.batch_size)]
            position += self.batch_size * self.world_size


class ValidBatches:
    """Every row once over all ranks, in order, none repeated; all ranks have equally many batches
    (some collectives run once a batch), so the last batches may be smaller than asked."""

    def __init__(self, rows: int, batch_size: int, rank: int, world_size: int):
        if rows < world_size:
            raise ValueError(
                f"the validation split has {rows} rows for {world_size} devices; use a smaller"
                " model.length, more text or fewer devices"
            )
        slices, rest = divmod(rows, batch_size * world_size)
        pieces = world_size if rest else 0
        if 0 < rest < world_size:  # does not reach every rank: shared out with the slice before it
            slices -= 1
            if batch_size > 1:
                pieces *= 2
        whole = slices * batch_size * world_size
        begins = [*range(0, whole, batch_size)]
        begins += [whole + (rows - whole) * i // pieces for i in range(pieces)]
        self.ranges = [*itertools.pairwise([*begins, rows])][rank::world_size]

    def __iter__(self) -> Iterator[list[ExampleIndex]]:
        for begin, end in self.ranges:
            yield [ExampleIndex(row, row) for row in range(begin, end)]

    def __len__(self) -> int:
        return len(self.ranges)
