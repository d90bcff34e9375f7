"""Documents as ids, cut into rows of L.

Wrapped: all documents form one stream, cut into chunks; only what is left at its very end is
dropped. Unwrapped: one document a row, cut or padded to L. Apart (data.pack=documents): one stream
again, in which every document begins at a block border and has an id of its own; where a row
ends inside a document, the next row goes on with it as a new document. A document comes as (ids,
ends) pairs, one for each of its pieces (readers.Piece).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DOCUMENTS_AT_ONCE = 1000
IDS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class RowFormat:
    """How ids become rows. bos, eos, pad: ids."""

    length: int
    wrap: bool
    insert_eos: bool  # after each document; not where rows are unwrapped
    insert_special: bool  # BOS and EOS round each chunk (unwrapped: always), or apart each document
    bos: int
    eos: int
    pad: int
    align: int | None = None  # documents apart: each begins at a multiple of this in its row

    def __post_init__(self):
        if self.align is not None and (not self.wrap or self.length % self.align):
            raise ValueError(
                f"documents cannot be kept apart in rows of {self.length} at multiples of"
                f" {self.align} with data.wrap={self.wrap}"
            )
        if self.room < 1:
            raise ValueError(
                f"model.length={self.length} leaves no room for text between the BOS and the EOS of"
                " a row; it must be at least 3"
            )

    @property
    def framed(self) -> bool:
        """Whether each row begins with BOS and ends with EOS."""
        return self.align is None and (self.insert_special or not self.wrap)

    @property
    def one_stream(self) -> bool:
        """Whether rows are cut from a single stream, wherever documents end."""
        return self.wrap and self.align is None

    @property
    def room(self) -> int:
        return self.length - 2 * self.framed

    def settings(self) -> dict:
        """What the name of a prepared folder depends on. `align` is left out where it is None, so
        that folders prepared before there was this setting keep their names."""
        return {key: value for key, value in vars(self).items() if value is not None}


class Chunk(NamedTuple):
    """Rows that are ready."""

    ids: np.ndarray  # [n, L]
    counts: np.ndarray  # [n], real tokens; padding follows them, and stands between them if apart
    marks: np.ndarray | None = None  # uint8 [n, 2, ceil(L / 8)], apart: bits of `document_ids`


def packed(documents: Iterable[tuple[list[int], bool]], row_format: RowFormat) -> Iterator[Chunk]:
    """The rows, packed as the format says."""
    if row_format.align is not None:
        return apart(documents, row_format)
    return (wrapped if row_format.wrap else unwrapped)(documents, row_format)


def wrapped(documents: Iterable[tuple[list[int], bool]], row_format: RowFormat) -> Iterator[Chunk]:
    """All documents as one stream, cut into rows."""
    streams = (
        np.fromiter(
            itertools.chain.from_iterable(
                (*ids, row_format.eos) if ends and row_format.insert_eos else ids
                for ids, ends in batch
            ),
            np.int64,
        )
        for batch in batched(documents)
    )
    return in_rows(streams, row_format)


def in_rows(streams: Iterable[np.ndarray], row_format: RowFormat) -> Iterator[Chunk]:
    """The parts of a stream, joined and cut into rows."""
    rest = np.empty(0, np.int64)
    for part in streams:
        stream = np.concatenate([rest, part])
        whole = len(stream) // row_format.room * row_format.room
        rest = stream[whole:]
        if whole:
            ids = framed(stream[:whole].reshape(-1, row_format.room), row_format)
            yield Chunk(ids, np.full(len(ids), row_format.length))


def framed(body: np.ndarray, row_format: RowFormat) -> np.ndarray:
    if not row_format.framed:
        return body
    ends = np.full((len(body), 1), row_format.bos), np.full((len(body), 1), row_format.eos)
    return np.concatenate([ends[0], body, ends[1]], axis=1)


def unwrapped(
    documents: Iterable[tuple[list[int], bool]], row_format: RowFormat
) -> Iterator[Chunk]:
    """A document a row: [BOS] + at most L - 2 ids + [EOS] + padding."""
    for batch in batched(joined(documents, row_format.room)):
        ids = np.full((len(batch), row_format.length), row_format.pad, np.int64)
        counts = np.array([len(document) + 2 for document in batch])
        for row, document in zip(ids, batch, strict=True):
            row[: len(document) + 2] = [row_format.bos, *document, row_format.eos]
        yield Chunk(ids, counts)


def joined(documents: Iterable[tuple[list[int], bool]], most: int) -> Iterator[list[int]]:
    """The first ids of each document, whatever pieces it comes in."""
    document: list[int] = []
    for ids, ends in documents:
        document += ids[: most - len(document)]
        if ends:
            yield document
            document = []


def apart(documents: Iterable[tuple[list[int], bool]], row_format: RowFormat) -> Iterator[Chunk]:
    """[BOS] + ids + [EOS] of each document and padding up to the next multiple of `align`, cut into
    rows of L; the last row is padded. Documents without a token are left out.

    A document that does not fit into the rest of a row is cut there. To begin it in a new row
    would waste the rest of each row; cut, at most one document of a row is seen without its
    beginning, as with wrapped rows.
    """
    length = row_format.length
    stream = _Stream(row_format)
    for ids, ends in documents:
        stream.add(ids, ends)
        if len(stream.ids) >= max(length, IDS_AT_ONCE):
            yield stream.cut(len(stream.ids) // length)
    if len(stream.ids) >= length:
        yield stream.cut(len(stream.ids) // length)
    if stream.ids:
        stream.pad(-len(stream.ids) % length)
        yield stream.cut(1)


class _Stream:
    """Documents one after the other, each from a block border on."""

    def __init__(self, row_format: RowFormat):
        self.row_format = row_format
        self.inside = False  # a document has begun and not ended
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.gaps: list[tuple[int, int]] = []  # padding, from and to

    def add(self, ids: list[int], ends: bool) -> None:
        row_format = self.row_format
        if ids and not self.inside:
            self.inside = True
            self.starts.append(len(self.ids))
            if row_format.insert_special:
                self.ids.append(row_format.bos)
        self.ids += ids
        if ends and self.inside:
            self.inside = False
            if row_format.insert_eos or row_format.insert_special:
                self.ids.append(row_format.eos)
            self.pad(-len(self.ids) % row_format.align)

    def pad(self, count: int) -> None:
        self.gaps.append((len(self.ids), len(self.ids) + count))
        self.ids += [self.row_format.pad] * count

    def cut(self, rows: int) -> Chunk:
        """Take the first rows out of the stream."""
        length = self.row_format.length
        end = rows * length
        marks = np.zeros((2, len(self.ids)), bool)
        marks[0, self.starts] = True
        marks[0, ::length] = True
        marks[1] = True
        for begin, stop in self.gaps:
            marks[1, begin:stop] = False
        ids = np.array(self.ids[:end]).reshape(rows, length)
        starts, real = (plane[:end].reshape(rows, length) for plane in marks)
        self.ids = self.ids[end:]
        self.starts = [start - end for start in self.starts if start >= end]
        self.gaps = [(a - end, b - end) for a, b in self.gaps if b > end]
        return Chunk(ids, real.sum(1), np.packbits(np.stack([starts, real], 1), axis=-1))


def document_ids(marks: np.ndarray, length: int) -> np.ndarray:
    """Chunk.marks [B, 2, ceil(L / 8)] -> the number of each token's document in its row, int64
    [B, L]: 1, 2 ...; 0 is padding."""
    starts, real = np.unpackbits(marks, axis=-1, count=length).astype(np.int64).swapaxes(0, 1)
    return starts.cumsum(1) * real


def batched(items: Iterable) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, DOCUMENTS_AT_ONCE)):
        yield batch
