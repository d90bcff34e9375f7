"""Documents as ids, cut into rows of L.

Wrapped: all documents form one stream, cut into chunks; only what is left at its very end is
dropped. Unwrapped: one document a row, cut or padded to L. A document comes as (ids, ends) pairs,
one for each of its pieces (readers.Piece).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Shape:
    """How ids become rows. bos, eos, pad: ids."""

    length: int
    wrap: bool
    insert_eos: bool  # after each document; wrapped only
    insert_special: bool  # BOS and EOS round each chunk; unwrapped rows always have them
    bos: int
    eos: int
    pad: int

    def __post_init__(self):
        if self.room < 1:
            raise ValueError(
                f"model.length={self.length} leaves no room for text between the BOS and the EOS of"
                " a row; it must be at least 3"
            )

    @property
    def framed(self) -> bool:
        return self.insert_special or not self.wrap

    @property
    def room(self) -> int:
        return self.length - 2 * self.framed


class Chunk(NamedTuple):
    """Rows that are ready."""

    ids: np.ndarray  # [n, L]
    counts: np.ndarray  # [n], real tokens, the rest of a row is padding


def wrapped(documents: Iterable[tuple[list[int], bool]], shape: Shape) -> Iterator[Chunk]:
    """The stream in rows."""
    rest = np.empty(0, np.int64)
    for batch in batched(documents):
        flat = itertools.chain.from_iterable(
            (*ids, shape.eos) if ends and shape.insert_eos else ids for ids, ends in batch
        )
        stream = np.concatenate([rest, np.fromiter(flat, np.int64)])
        whole = len(stream) // shape.room * shape.room
        rest = stream[whole:]
        if whole:
            ids = framed(stream[:whole].reshape(-1, shape.room), shape)
            yield Chunk(ids, np.full(len(ids), shape.length))


def framed(body: np.ndarray, shape: Shape) -> np.ndarray:
    if not shape.framed:
        return body
    ends = np.full((len(body), 1), shape.bos), np.full((len(body), 1), shape.eos)
    return np.concatenate([ends[0], body, ends[1]], axis=1)


def unwrapped(documents: Iterable[tuple[list[int], bool]], shape: Shape) -> Iterator[Chunk]:
    """A document a row: [BOS] + at most L - 2 ids + [EOS] + padding."""
    for batch in batched(joined(documents, shape.room)):
        ids = np.full((len(batch), shape.length), shape.pad, np.int64)
        counts = np.array([len(document) + 2 for document in batch])
        for row, document in zip(ids, batch, strict=True):
            row[: len(document) + 2] = [shape.bos, *document, shape.eos]
        yield Chunk(ids, counts)


def joined(documents: Iterable[tuple[list[int], bool]], most: int) -> Iterator[list[int]]:
    """The first ids of each document, whatever pieces it comes in."""
    document: list[int] = []
    for ids, ends in documents:
        document += ids[: most - len(document)]
        if ends:
            yield document
            document = []


def batched(items: Iterable) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, DOCUMENTS_AT_ONCE)):
        yield batch
