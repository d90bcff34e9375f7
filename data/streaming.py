"""Training rows straight from the text, nothing prepared: for corpora larger than the disk.

    text -> units of UNIT_CHARACTERS -> dealt out to LANES lanes -> tokenized and packed in each

The training stream takes its rows from the lanes in turn: position p is row p // LANES of lane
p % LANES. Of every LANES units each lane gets one, in random order, so that in the long run all
lanes get equally much text. The rows of a unit come in random order. Neighbours in the stream come
from units that are far apart: the shuffled buffer is one unit per lane, about 12 million
characters. Each epoch reads the parts of the corpus (files) in another order. So the row at a
position depends on the text and the seed alone, not on the number of devices.

A device tokenizes the lanes that it is asked for, and only reads the text of the others. With
`by_files` each lane has files of its own instead, others in each epoch, and cuts its units from
these; so a device reads the files of its lanes and no others. A bookmark says where to read on:
without one, all text up to the position is tokenized again.
"""

import base64
import itertools
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import packing
from data.packing import Chunk, RowFormat, Tokens
from data.readers import Piece
from data.split import Split
from data.token_rows import check_ids
from random_streams import order, version_of
from utils import DataFailure, digest, reason, shown

log = logging.getLogger("bamdlm")

LANES = 48  # a multiple of the usual numbers of devices
UNIT_CHARACTERS = 1 << 18

Part = Callable[[], Iterable[Piece]]  # reads a part of the corpus from its beginning


class TextError(DataFailure):
    """The text cannot be read on."""


class UnitStart(NamedTuple):
    """Where a unit begins."""

    unit: int  # counted over all epochs
    epoch: int
    part: int  # in the order of the epoch
    pieces: int  # of that part, which come before


class Unit(NamedTuple):
    start: UnitStart
    texts: list[str]
    ends: list[bool]


class Bookmark(NamedTuple):
    """What a lane needs to go on: read from the unit at `start`, and number the rows of that one
    from `begin`; `rest`: ids that are left over from the units before."""

    start: UnitStart
    begin: int
    rest: np.ndarray


@dataclass
class Lane:
    bookmark: Bookmark  # of the unit that gave `rows`; of the next one where there are no rows
    rows: Chunk | None = None
    rest: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    units: Iterator[Unit] | None = None  # of files of its own
    waiting: deque[Unit] = field(default_factory=deque)  # read, not tokenized

    @property
    def end(self) -> int:
        """One past the number of the last row that is there."""
        return self.bookmark.begin + (0 if self.rows is None else len(self.rows.ids))


class StreamedText:
    """A training split to be streamed. parts: each reads a part of the text from its beginning.
    by_files: a part belongs to one lane, in each epoch to another."""

    def __init__(self, split: Split, parts: list[Part], by_files: bool = False):
        """Reads the beginning of the text, to find what is wrong with it before any work."""
        if by_files and len(parts) < LANES:
            raise ValueError(
                f"data.stream_by=files: {split} has {len(parts)} files, and {LANES} are needed; cut"
                " it into more, or use data.stream_by=units"
            )
        self.split, self.parts, self.by_files = split, parts, by_files
        check_text(parts, split)

    def fingerprint(self, seed: int) -> str:
        """Of all that decides which row stands where; bookmarks of another are of no use."""
        version = version_of(seed)
        decides = [self.split.about, seed, LANES, UNIT_CHARACTERS, *[version] * (version > 1)]
        decides += ["files"] * self.by_files
        return digest(json.dumps(decides, sort_keys=True), 16)


def streamed(split: Split, cache: Path, by_files: bool = False) -> StreamedText:
    """The split, not prepared. cache: where downloads are kept. by_files: as in StreamedText."""
    if split.entry.windows:
        raise ValueError(f"data.streaming=True: {split.corpus} is windows of prepared rows")
    return StreamedText(split, split.passages(cache), by_files)


class Stream:
    """The rows of a corpus without end, read forwards.

    lanes: those that may be asked for. bookmarks: by lane, of the same text and seed; reading
    begins anew where one is missing.
    """

    def __init__(
        self,
        text: StreamedText,
        seed: int,
        *,
        lanes: Iterable[int] = range(LANES),
        bookmarks: dict[int, Bookmark] | None = None,
    ):
        self.split, self.row_format, self.seed = text.split, text.split.row_format, seed
        lanes, bookmarks = list(lanes), bookmarks or {}
        if not all(lane in bookmarks for lane in lanes):
            none, first = np.empty(0, np.int64), text.by_files  # the number of its first unit
            starts = {lane: UnitStart(lane * first, 0, 0, 0) for lane in lanes}
            bookmarks = {lane: Bookmark(start, 0, none) for lane, start in starts.items()}
        self.lanes = {lane: Lane(bookmarks[lane], rest=bookmarks[lane].rest) for lane in lanes}
        # Units of wrapped text may end inside a document; the lane goes on with the rest.
        self.wrapped = self.row_format.one_stream
        read = partial(units, text.parts, seed, anywhere=self.wrapped)
        if text.by_files:
            for number, lane in self.lanes.items():
                lane.units = read(lane.bookmark.start, lane=number)
        else:
            self.units = read(min(lane.bookmark.start for lane in self.lanes.values()))

    def read(self, positions: Iterable[int]) -> Chunk:
        """The rows at these positions; in each lane they must not go backwards by a unit."""
        try:
            found = [self.row(position) for position in positions]
        except (ValueError, OSError) as error:
            raise TextError(reason(error)) from error
        return joined(found, self.row_format)

    def row(self, position: int) -> Chunk:
        index, number = divmod(position, LANES)
        lane = self.lanes[number]
        while index >= lane.end:
            self.advance(lane)
        at = index - lane.bookmark.begin
        if at < 0:
            raise IndexError(f"row {position} of the stream has gone by")
        return lane.rows.pick(slice(at, at + 1))

    def advance(self, lane: Lane) -> None:
        """To the lane's next unit."""
        unit = self.next_unit(lane)
        lane.bookmark = Bookmark(unit.start, lane.end, lane.rest)
        tokens = Tokens.of(self.split.encode(unit.texts), unit.ends)
        if self.wrapped:
            stream = np.concatenate([lane.rest, packing.stream(tokens, self.row_format)])
            rows, lane.rest = packing.cut_rows(stream, self.row_format)
        else:
            rows = joined(list(packing.packed([tokens], self.row_format)), self.row_format)
        check_ids(rows.ids, self.split.tokenizer.vocab_size)
        lane.rows = rows.pick(order(self.seed, "unit", unit.start.unit, len(rows.ids)))

    def next_unit(self, lane: Lane) -> Unit:
        if lane.units is not None:
            return next(lane.units)
        while not lane.waiting:
            unit = next(self.units)
            turn, at = divmod(unit.start.unit, LANES)
            owner = self.lanes.get(int(order(self.seed, "lanes", turn, LANES)[at]))
            if owner is not None and unit.start.unit >= owner.bookmark.start.unit:
                owner.waiting.append(unit)
        return lane.waiting.popleft()

    def bookmarks(self) -> dict[int, Bookmark]:
        return {number: lane.bookmark for number, lane in self.lanes.items()}


def units(
    parts: list[Part], seed: int, start: UnitStart, *, anywhere: bool, lane: int | None = None
) -> Iterator[Unit]:
    """The text from a start on, epoch after epoch, in units of equal size. anywhere: they may end
    inside a document. lane: of its files alone; its units are every LANES-th by number."""
    number, epoch, part, skip = start
    begin, texts, ends, characters = start, [], [], 0
    parts, turn = read_once(parts), [0]
    while True:
        if len(parts) > 1:
            turn = order(seed, "parts", epoch, len(parts))
            turn = turn if lane is None else turn[lane::LANES]
        while part < len(turn):
            for piece in itertools.islice(parts[turn[part]](), skip, None):
                skip += 1
                texts.append(piece.text)
                ends.append(piece.ends)
                characters += len(piece.text)
                if characters >= UNIT_CHARACTERS and (anywhere or piece.ends):
                    yield Unit(begin, texts, ends)
                    number += 1 if lane is None else LANES
                    begin, texts, ends, characters = UnitStart(number, epoch, part, skip), [], [], 0
            part, skip = part + 1, 0
        epoch, part = epoch + 1, 0


def read_once(parts: list[Part]) -> list[Part]:
    """The parts; the shortest, of no more than a unit together, stay in memory once they were read
    to their ends: a unit may hold thousands of epochs of a very short text."""
    kept: dict[Part, list[Piece]] = {}
    room = UNIT_CHARACTERS

    def read(part: Part) -> Iterator[Piece]:
        nonlocal room
        if part in kept:
            yield from kept[part]
            return
        pieces = []
        for piece in part():
            room -= len(piece.text) + 1
            if room >= 0:
                pieces.append(piece)
            yield piece
        if room >= 0:
            kept[part] = pieces

    return [partial(read, part) for part in parts]


def joined(chunks: list[Chunk], row_format: RowFormat) -> Chunk:
    if not chunks:
        return Chunk(np.empty((0, row_format.length), np.int64), np.empty(0, np.int64))
    arrays = zip(*chunks, strict=True)
    return Chunk(*(None if array[0] is None else np.concatenate(array) for array in arrays))


def check_text(parts: list[Part], split: Split) -> None:
    """Refuse a text that is shorter than one row; reads the beginning alone."""
    tokens, row_format = 0, split.row_format
    for piece in itertools.chain.from_iterable(part() for part in parts):
        tokens += sum(map(len, split.encode([piece.text])))
        if tokens >= (row_format.room if row_format.one_stream else 1):
            return
    change = "larger" if row_format.scored else "smaller"
    raise ValueError(
        f"the training text has {tokens} tokens: not one row of model.length={row_format.length};"
        f" use a {change} model.length or more text"
    )


def lanes_of(rank: int, world_size: int) -> range:
    """The lanes of the positions rank, rank + world_size, rank + 2 world_size ..."""
    step = math.gcd(LANES, world_size)
    return range(rank % step, LANES, step)


def to_text(bookmarks: dict[int, Bookmark], of: str) -> str:
    """Bookmarks of a stream with the fingerprint `of`, for a checkpoint."""
    lanes = {}
    for number, mark in bookmarks.items():
        rest = base64.b64encode(mark.rest.astype("<u4").tobytes()).decode()
        lanes[number] = [mark.start, mark.start.unit, mark.begin, rest]
    return json.dumps({"of": of, "lanes": lanes})


def from_texts(texts: Iterable[str], of: str) -> dict[int, Bookmark]:
    """The bookmarks of all devices, by lane; none where they are of another stream."""
    found = {}
    try:
        for noted in map(json.loads, texts):
            if noted["of"] != of:
                log.warning(
                    "the text or its settings have changed since the checkpoint: reading anew"
                )
                return {}
            for number, (start, _, begin, rest) in noted["lanes"].items():
                ids = np.frombuffer(base64.b64decode(rest), "<u4").astype(np.int64)
                mark = Bookmark(UnitStart(*start), begin, ids)
                if int(number) not in found or mark.start < found[int(number)].start:
                    found[int(number)] = mark
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the bookmarks cannot be read (%s): reading the text anew", shown(error))
        return {}
    return found
