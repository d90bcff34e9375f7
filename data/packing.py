"""Documents as ids, cut into rows of L.

Wrapped: all documents form one stream, cut into chunks; only what is left at its very end is
dropped. Unwrapped: one document a row, cut or padded to L. Apart (data.pack=documents): one stream
again, in which every document begins at a block border and has an id of its own; where a row
ends inside a document, the next row goes on with it as a new document. Whole (data.pack=whole): the
same, but documents that fit into a row are never cut. A document comes as (ids, ends) pairs, one
for each of its pieces (readers.Piece).
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

DOCUMENTS_AT_ONCE = 1000
IDS_AT_ONCE = 1 << 18
ROWS_AT_ONCE = 256  # whole: at least as many are packed together


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
    whole: bool = False  # and none is cut that fits into a row

    def __post_init__(self):
        if self.align is not None and (not self.wrap or self.length % self.align):
            raise ValueError(
                f"documents cannot be kept apart in rows of {self.length} at multiples of"
                f" {self.align} with data.wrap={self.wrap}"
            )
        if self.whole and self.align is None:
            raise ValueError("documents stay whole only where they are kept apart: give `align`")
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
        """What the name of a prepared folder depends on. What has its default is left out, so that
        folders prepared before there was the setting keep their names."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


class Chunk(NamedTuple):
    """Rows that are ready."""

    ids: np.ndarray  # [n, L]
    counts: np.ndarray  # [n], real tokens; padding follows them, and stands between them if apart
    marks: np.ndarray | None = None  # uint8 [n, 2, ceil(L / 8)], apart: bits of `document_ids`

    def pick(self, rows) -> "Chunk":
        """rows: numbers or a slice."""
        return Chunk(*(None if array is None else array[rows] for array in self))


def packed(documents: Iterable[tuple[list[int], bool]], row_format: RowFormat) -> Iterator[Chunk]:
    """The rows, packed as the format says."""
    if row_format.align is not None:
        return (whole if row_format.whole else apart)(documents, row_format)
    return (wrapped if row_format.wrap else unwrapped)(documents, row_format)


def wrapped(documents: Iterable[tuple[list[int], bool]], row_format: RowFormat) -> Iterator[Chunk]:
    """All documents as one stream, cut into rows."""
    return in_rows((joined(batch, row_format) for batch in batched(documents)), row_format)


def joined(documents: Iterable[tuple[list[int], bool]], row_format: RowFormat) -> np.ndarray:
    """The ids as one array, with EOS after each document where it is wanted."""
    eos = [row_format.eos] * row_format.insert_eos
    parts = ([*ids, *eos] if ends else ids for ids, ends in documents)
    return np.fromiter(itertools.chain.from_iterable(parts), np.int64)


def in_rows(streams: Iterable[np.ndarray], row_format: RowFormat) -> Iterator[Chunk]:
    """The parts of a stream, joined and cut into rows."""
    rest = np.empty(0, np.int64)
    for part in streams:
        rows, rest = cut_rows(np.concatenate([rest, part]), row_format)
        if len(rows.ids):
            yield rows


def cut_rows(stream: np.ndarray, row_format: RowFormat) -> tuple[Chunk, np.ndarray]:
    """(the rows of a stream, what is left over at its end)"""
    whole = len(stream) // row_format.room * row_format.room
    ids = stream[:whole].reshape(-1, row_format.room)
    if row_format.framed:
        ends = [row_format.bos], [row_format.eos]
        bos, eos = (np.broadcast_to(end, (len(ids), 1)) for end in ends)
        ids = np.concatenate([bos, ids, eos], axis=1)
    return Chunk(ids, np.full(len(ids), row_format.length)), stream[whole:]


def unwrapped(
    documents: Iterable[tuple[list[int], bool]], row_format: RowFormat
) -> Iterator[Chunk]:
    """A document a row: [BOS] + at most L - 2 ids + [EOS] + padding."""
    for batch in batched(beginnings(documents, row_format.room)):
        ids = np.full((len(batch), row_format.length), row_format.pad, np.int64)
        counts = np.array([len(document) + 2 for document in batch])
        for row, document in zip(ids, batch, strict=True):
            row[: len(document) + 2] = [row_format.bos, *document, row_format.eos]
        yield Chunk(ids, counts)


def beginnings(documents: Iterable[tuple[list[int], bool]], most: int) -> Iterator[list[int]]:
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
    for ids, ends in bounded(documents, row_format):
        stream.add(ids, ends)
        if len(stream.ids) >= max(length, IDS_AT_ONCE):
            yield stream.cut(len(stream.ids) // length)
    if len(stream.ids) >= length:
        yield stream.cut(len(stream.ids) // length)
    if stream.ids:
        stream.pad(-len(stream.ids) % length)
        yield stream.cut(1)


def bounded(
    documents: Iterable[tuple[list[int], bool]], row_format: RowFormat
) -> Iterator[tuple[list[int], bool]]:
    """Of documents apart: with BOS before them and EOS behind, where these are wanted; those
    without a token are left out."""
    inside = False
    for ids, ends in documents:
        if ids and not inside:
            inside = True
            ids = [row_format.bos, *ids] if row_format.insert_special else ids
        if inside and ends and (row_format.insert_eos or row_format.insert_special):
            ids = [*ids, row_format.eos]
        if inside:
            yield ids, ends
        inside = inside and not ends


def whole(documents: Iterable[tuple[list[int], bool]], row_format: RowFormat) -> Iterator[Chunk]:
    """As `apart`, but each document goes whole into a row that has room for it. Documents longer
    than a row are cut into full rows and a rest, which is packed like another document."""
    length, rest, size = row_format.length, [], 0
    parts: list[list[int]] = []
    for ids, ends in bounded(documents, row_format):
        rest += ids
        new = [rest[i : i + length] for i in range(0, len(rest), length)]
        rest = [] if ends else new.pop()
        parts += new
        size += sum(map(len, new))
        if size >= max(IDS_AT_ONCE, ROWS_AT_ONCE * length):
            yield fitted(parts, row_format)
            parts, size = [], 0
    if parts:
        yield fitted(parts, row_format)


def fitted(parts: list[list[int]], row_format: RowFormat) -> Chunk:
    """Best fit decreasing (Johnson 1973): the longest part first, each in the fullest row that has
    room. Rows, and parts in a row, stand in the order of the text."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for part in sorted(range(len(parts)), key=lambda part: -len(parts[part])):
        size = len(parts[part]) + -len(parts[part]) % row_format.align
        at = bisect.bisect_left(rooms, (size, 0))
        free, row = rooms.pop(at) if at < len(rooms) else (row_format.length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(part)
        bisect.insort(rooms, (free - size, row))
    stream = _Stream(row_format)
    for row in sorted(map(sorted, rows)):
        for part in row:
            stream.add(parts[part], ends=True)
        stream.pad(-len(stream.ids) % row_format.length)
    return stream.cut(len(rows))


class _Stream:
    """Documents one after the other, each from a block border on."""

    def __init__(self, row_format: RowFormat):
        self.row_format = row_format
        self.inside = False  # a document has begun and not ended
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.gaps: list[tuple[int, int]] = []  # padding, from and to

    def add(self, ids: list[int], ends: bool) -> None:
        if not self.inside:
            self.starts.append(len(self.ids))
        self.ids += ids
        self.inside = not ends
        if ends:
            self.pad(-len(self.ids) % self.row_format.align)

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


class CutDocuments:
    """Counts documents that do not lie in one row, from their lengths alone: those that go on in
    the next row, and where rows are unwrapped those that lose their end."""

    def __init__(self, row_format: RowFormat):
        self.row_format = row_format
        self.count = 0
        self.begin = 0  # where the next document begins, in its row
        self.open = 0  # tokens of the document that has not ended

    def add(self, lengths: np.ndarray, ends: np.ndarray) -> None:
        """The next pieces: tokens of each, and whether its document ends with it."""
        row_format, room = self.row_format, self.row_format.room
        stops = (self.open + lengths.cumsum())[ends]
        tokens = np.diff(stops, prepend=0)  # of each document
        self.open += int(lengths.sum() - tokens.sum())
        if row_format.align is not None:
            tokens = tokens[tokens > 0]
            tokens += row_format.insert_special
            tokens += row_format.insert_eos or row_format.insert_special
        elif row_format.wrap:
            tokens += row_format.insert_eos
        if row_format.whole or not row_format.wrap:
            self.count += int((tokens > room).sum())
            return
        steps = tokens + -tokens % (row_format.align or 1)
        ends_at = self.begin + steps.cumsum()
        last = np.maximum(tokens, 1) - 1
        begins = ends_at - steps
        self.count += int((begins // room < (begins + last) // room).sum())
        self.begin = int(ends_at[-1] % room) if len(ends_at) else self.begin


def document_ids(marks: np.ndarray, length: int) -> np.ndarray:
    """Chunk.marks [B, 2, ceil(L / 8)] -> the number of each token's document in its row, int64
    [B, L]: 1, 2 ...; 0 is padding."""
    starts, real = np.unpackbits(marks, axis=-1, count=length).astype(np.int64).swapaxes(0, 1)
    return starts.cumsum(1) * real


def batched(items: Iterable) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, DOCUMENTS_AT_ONCE)):
        yield batch
