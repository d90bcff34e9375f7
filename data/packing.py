"""Documents as ids, cut into rows of L.

Wrapped: all documents form one stream, cut into chunks; only what is left at its very end is
dropped. Unwrapped: one document a row, cut or padded to L. Apart (data.pack=documents): one stream
again, in which every document begins at a block border and has an id of its own; where a row
ends inside a document, the next row goes on with it as a new document. Whole (data.pack=whole): the
same, but documents that fit into a row are never cut.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

PIECES_AT_ONCE = 1000
IDS_AT_ONCE, ROWS_AT_ONCE = 1 << 18, 256  # whole: at least as many are packed together
# A bit above those of all ids, of a token that enters the loss where not all do (conversations).
SCORED = 1 << 30


class Tokens(NamedTuple):
    """Pieces of a text (readers.Piece) as ids: all in one array, and where they end."""

    ids: np.ndarray  # [tokens]
    lengths: np.ndarray  # [pieces], tokens of each
    ends: np.ndarray  # [pieces], bool: the document ends with the piece

    @classmethod
    def of(cls, ids: list[list[int]], ends: list[bool]) -> "Tokens":
        """ids: of each piece."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, lengths.sum())
        return cls(flat, lengths, np.array(ends, bool))

    def pieces(self) -> Iterator[tuple[np.ndarray, bool]]:
        """(ids, whether the document ends) of each."""
        return zip(np.split(self.ids, self.lengths.cumsum()[:-1]), self.ends, strict=True)


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
    scored: bool = False  # ids have SCORED where they enter the loss

    def __post_init__(self):
        if self.align is not None and (not self.wrap or self.length % self.align):
            raise ValueError(
                f"documents cannot be kept apart in rows of {self.length} at multiples of"
                f" {self.align} with data.wrap={self.wrap}"
            )
        if self.whole and self.align is None:
            raise ValueError("documents stay whole only where they are kept apart: give `align`")
        if self.scored and not self.whole:
            raise ValueError("tokens are scored only in documents that stay whole: give `whole`")
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
    # apart: bits of `document_ids` and `scored`, uint8 [n, 2, ceil(L / 8)], or [n, 3, ...]
    marks: np.ndarray | None = None

    def pick(self, rows) -> "Chunk":
        """rows: numbers or a slice."""
        return Chunk(*(None if array is None else array[rows] for array in self))


def packed(parts: Iterable[Tokens], row_format: RowFormat) -> Iterator[Chunk]:
    """The rows of a text, packed as the format says."""
    if row_format.one_stream:
        return in_rows((stream(part, row_format) for part in parts), row_format)
    few = itertools.chain.from_iterable(map(batched, parts))
    if row_format.align is None:
        return unwrapped(few, row_format)
    return (whole if row_format.whole else apart)(few, row_format)


def batched(part: Tokens) -> Iterator[Tokens]:
    """The pieces, a few at a time: with their padding they may take far more memory."""
    stops = part.lengths.cumsum()
    for first in range(0, len(stops), PIECES_AT_ONCE):
        some = slice(first, first + PIECES_AT_ONCE)
        ids = part.ids[stops[first] - part.lengths[first] : stops[some][-1]]
        yield Tokens(ids, part.lengths[some], part.ends[some])


def stream(part: Tokens, row_format: RowFormat) -> np.ndarray:
    """The ids, with EOS after each document where it is wanted."""
    if not row_format.insert_eos:
        return part.ids
    return np.insert(part.ids, part.lengths.cumsum()[part.ends], row_format.eos)


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
        bos, eos = (np.full((len(ids), 1), end) for end in (row_format.bos, row_format.eos))
        ids = np.concatenate([bos, ids, eos], axis=1)
    return Chunk(ids, np.full(len(ids), row_format.length)), stream[whole:]


def unwrapped(parts: Iterable[Tokens], row_format: RowFormat) -> Iterator[Chunk]:
    """A document a row: [BOS] + at most L - 2 ids + [EOS] + padding."""
    document: list[int] = []
    for part in parts:
        rows = []
        for ids, ends in part.pieces():
            document += ids[: row_format.room - len(document)].tolist()
            if ends:
                rows.append([row_format.bos, *document, row_format.eos])
                document = []
        counts = np.array([len(row) for row in rows], np.int64)
        ids = np.full((len(rows), row_format.length), row_format.pad, np.int64)
        ids[np.arange(row_format.length) < counts[:, None]] = list(itertools.chain(*rows))
        yield Chunk(ids, counts)


def apart(parts: Iterable[Tokens], row_format: RowFormat) -> Iterator[Chunk]:
    """[BOS] + ids + [EOS] of each document and padding up to the next multiple of `align`, cut into
    rows of L; the last row is padded. Documents without a token are left out.

    A document that does not fit into the rest of a row is cut there. To begin it in a new row
    would waste the rest of each row; cut, at most one document of a row is seen without its
    beginning, as with wrapped rows.
    """
    length, rest = row_format.length, np.empty((3, 0), np.int64)
    for part, begins in framed(parts, row_format):
        gaps = np.zeros_like(part.lengths)
        stops = (rest.shape[1] % row_format.align + part.lengths.cumsum())[part.ends]
        gaps[part.ends] = -np.diff(stops, prepend=0) % row_format.align
        rest = np.concatenate([rest, laid(part, begins, gaps, row_format.pad)], axis=1)
        full = rest.shape[1] // length * length
        yield marked(rest[:, :full], row_format)
        rest = rest[:, full:]
    if rest.size:
        end = np.array([[row_format.pad], [0], [0]]).repeat(-rest.shape[1] % length, axis=1)
        yield marked(np.concatenate([rest, end], axis=1), row_format)


def framed(parts: Iterable[Tokens], row_format: RowFormat) -> Iterator[tuple[Tokens, np.ndarray]]:
    """Of documents apart: with BOS before them and EOS behind, where these are wanted; those
    without a token are left out. And [pieces] bool, whether the document begins with the piece."""
    special, inside = row_format.insert_special, False
    for ids, lengths, ends in parts:
        stops = lengths.cumsum()
        before = stops - lengths
        first = np.concatenate([[not inside], ends[:-1]])  # piece of its document
        goes_on = before > np.maximum.accumulate(np.where(first, before, -1))
        begins = ~goes_on & (lengths > 0)
        kept = goes_on | begins
        closes = kept & ends
        bos, eos = begins & special, closes & (special or row_format.insert_eos)
        extra = np.repeat([row_format.eos, row_format.bos], [eos.sum(), bos.sum()])
        ids = np.insert(ids, np.concatenate([stops[eos], before[bos]]), extra)
        if kept.any():
            yield Tokens(ids, (lengths + bos + eos)[kept], closes[kept]), begins[kept]
            inside = not closes[kept][-1]


def laid(part: Tokens, begins: np.ndarray, gaps: np.ndarray, pad: int) -> np.ndarray:
    """[3, n]: the pieces with a gap of padding after each; where a document begins; what is not
    padding."""
    steps = part.lengths + gaps
    real = np.repeat(np.tile([1, 0], len(gaps)), np.stack([part.lengths, gaps], 1).ravel())
    ids, starts = np.full(len(real), pad), np.zeros(len(real), np.int64)
    ids[real > 0] = part.ids
    starts[(steps.cumsum() - steps)[begins]] = 1
    return np.stack([ids, starts, real])


def marked(stream: np.ndarray, row_format: RowFormat) -> Chunk:
    """The rows of what `laid` gave."""
    ids, starts, real = stream.reshape(3, -1, row_format.length)
    starts[:, 0] = 1
    marks = [starts, real]
    if row_format.scored:
        marks.append((ids & SCORED > 0).astype(np.int64))
        ids = ids & ~SCORED
    return Chunk(ids, real.sum(1), np.packbits(np.stack(marks, 1), axis=-1))


def whole(parts: Iterable[Tokens], row_format: RowFormat) -> Iterator[Chunk]:
    """As `apart`, but each document goes whole into a row that has room for it. Documents longer
    than a row are cut into full rows and a rest, which is packed like another document."""
    length, rest, size = row_format.length, np.empty(0, np.int64), 0
    waiting: list[np.ndarray] = []
    for part, _ in framed(parts, row_format):
        for ids, ends in part.pieces():
            rest = np.concatenate([rest, ids])
            new = np.split(rest, range(length, len(rest), length))
            rest = rest[:0] if ends else new.pop()
            waiting += new
            size += sum(map(len, new))
            if size >= max(IDS_AT_ONCE, ROWS_AT_ONCE * length):
                yield fitted(waiting, row_format)
                waiting, size = [], 0
    if waiting:
        yield fitted(waiting, row_format)


def fitted(pieces: list[np.ndarray], row_format: RowFormat) -> Chunk:
    """Best fit decreasing (Johnson 1973): the longest piece first, each in the fullest row that has
    room. Rows, and pieces in a row, stand in the order of the text."""
    lengths = np.array([len(piece) for piece in pieces])
    steps = lengths + -lengths % row_format.align
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(steps[piece])
        at = bisect.bisect_left(rooms, (size, 0))
        free, row = rooms.pop(at) if at < len(rooms) else (row_format.length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (free - size, row))
    rows = sorted(map(sorted, rows))
    for row in rows:  # the last one is padded to the end of the row
        steps[row[-1]] += row_format.length - steps[row].sum()
    order = list(itertools.chain(*rows))
    part = Tokens(np.concatenate([pieces[i] for i in order]), lengths[order], None)
    every = np.ones(len(order), bool)
    return marked(laid(part, every, (steps - lengths)[order], row_format.pad), row_format)


def document_ids(marks: np.ndarray, length: int) -> np.ndarray:
    """Chunk.marks [B, 2, ceil(L / 8)] -> the number of each token's document in its row, int64
    [B, L]: 1, 2 ...; 0 is padding."""
    bits = np.unpackbits(marks[:, :2], axis=-1, count=length).astype(np.int64)
    starts, real = bits.swapaxes(0, 1)
    return starts.cumsum(1) * real


def scored(marks: np.ndarray, length: int) -> np.ndarray:
    """Chunk.marks -> 1 where a token may enter the loss, int64 [B, L]: the last of its bits, which
    without any of its own says what is not padding."""
    return np.unpackbits(marks[:, -1], axis=-1, count=length).astype(np.int64)
