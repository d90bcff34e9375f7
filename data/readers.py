"""A reader for each kind of file.

A reader yields documents as pieces, never the whole at once, and keeps nothing of what it has read.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils import MOST_LINE  # bytes of a line that is a document; the longest books have a tenth

PIECE_CHARACTERS = 1 << 18
ZEROS = 1 << 12  # bytes, all of them zero: what a crash or a sparse file leaves
LONGEST_WHOLE = 1 << 22  # characters of a document that is tokenized at once
# What is packed may unpack to so many bytes, or to so many times those that it has: texts seldom
# reach ten. A document counts as some bytes more, for the time that even an empty one takes.
MOST_UNPACKED, MOST_PACKED, DOCUMENT = 1 << 24, 30, 8
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Where a text may be cut so that its tokens do not change: word tokenizers and byte-level BPEs
# split there anyway, after a single line break and before a single space.
SEAM = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")

# Half of a surrogate pair, which JSON can write but is no text: as written, and as read.
HALF_A_PAIR, HALF_A_PAIR_DECODED = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """An object of several fields: a line of JSON, or a row of a table."""

    fields: dict
    place: str  # for messages
    done: float  # as in Piece


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends: bool  # the document ends here
    done: float  # share of the whole read so far, 0 to 1; what the progress display shows


def check_unpacked(place: str, packed: int, unpacked: int) -> None:
    """ValueError where so many bytes of a file become more than text does."""
    if unpacked > max(MOST_UNPACKED, MOST_PACKED * packed):
        raise ValueError(
            f"{place} unpacks {packed:,} bytes to {unpacked:,}: it would fill the memory or the"
            " disk. If it is text that you trust, unpack it, or save it as .jsonl"
        )


def bounded(pieces: Iterable[Piece], packed: int, place: str) -> Iterator[Piece]:
    """The same pieces; check_unpacked() of what they have in all."""
    unpacked = 0
    for piece in pieces:
        unpacked += len(piece.text) + DOCUMENT * piece.ends
        check_unpacked(place, packed, unpacked)
        yield piece


def whole(text: str, done: float) -> Iterator[Piece]:
    """One document; cut where it is too long to be tokenized at once."""
    for piece in cut_long(text) if len(text) > LONGEST_WHOLE else (Piece(text, True, done),):
        yield piece._replace(done=done)


def checked(text, column: str, place: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{place}: {column} is {type(text).__name__}, not text")
    return text


def read_txt(path: Path, column: str) -> Iterator[Piece]:
    """The whole file is one document, whatever its size and that of its lines. Text without a
    seam is cut after four pieces."""
    size, text = path.stat().st_size, ""
    with path.open("rb") as file:
        for _, line, done in decoded_lines(file, f"data: {path}", PIECE_CHARACTERS):
            text += line
            if len(text) < PIECE_CHARACTERS:
                continue
            if cut := last_seam(text) or (len(text) >= 4 * PIECE_CHARACTERS) * len(text):
                yield Piece(text[:cut], False, done / size)
                text = text[cut:]
    yield Piece(text, True, 1.0)


def read_jsonl(path: Path, column: str) -> Iterator[Piece]:
    for line, place, done in _json_lines(path):
        yield from whole(json_text(line, column, place), done)


def _json_lines(path: Path) -> Iterator[tuple[str, str, float]]:
    """(line, its place, share of the file read so far), without blank lines."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, line, read in decoded_lines(file, f"data: {path}"):
            if line.strip():
                yield line, f"data: {path}, line {number}", read / size


def jsonl_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """All lines, whatever their fields."""
    for line, place, done in _json_lines(path):
        record = _json_value(line, place)
        if not isinstance(record, dict):
            raise ValueError(f"{place} is {type(record).__name__}, not an object of fields")
        yield Record(record, place, done)


def _json_value(line: str, place: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a number may have too many digits
        raise ValueError(f"{place} is not JSON ({error})") from error


def json_text(line: str, column: str, place: str) -> str:
    """One field of a JSON object."""
    record = _json_value(line, place)
    if not isinstance(record, dict) or column not in record:
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place} has no field {column!r} ({known}); set data.text_column")
    text = checked(record[column], column, place)
    if HALF_A_PAIR.search(line):
        check_pairs(text, f"{place}: {column}")
    return text


def check_pairs(text: str, what: str) -> None:
    if HALF_A_PAIR_DECODED.search(text):
        raise ValueError(f"{what} holds half of a surrogate pair, which is no text")


def decoded_lines(
    file: BinaryIO, place: str, longest: int | None = None
) -> Iterator[tuple[int, str, int]]:
    """(line number from 1, text with its line break, bytes read so far), without a byte order mark;
    lines of more than `longest` bytes come in several. None: ValueError for one of MOST_LINE."""
    number, read, rest = 1, 0, b""
    for part in iter(partial(file.readline, longest or MOST_LINE), b""):
        if longest is None and len(part) == MOST_LINE:
            raise ValueError(f"{place}, line {number} has {MOST_LINE:,} bytes or more")
        if len(part) >= ZEROS and not part.strip(b"\0"):
            raise ValueError(
                f"{place}, line {number} has {len(part):,} bytes of zero and no others: the file is"
                " damaged or no text; get it again"
            )
        line, rest = rest + part, b""
        if read == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                wrong = read - len(line) + len(part) + error.start
                raise _not_utf8(place, number, wrong) from error
            text, rest = line[: error.start].decode(), line[error.start :]
        read += len(part)
        yield number, text, read
        number += line.endswith(b"\n")
    if rest:
        raise _not_utf8(place, number, read - len(rest))


def _not_utf8(place: str, number: int, byte: int) -> ValueError:
    return ValueError(
        f"{place}, line {number} is not UTF-8 (byte {byte});"
        " convert the file, for example with iconv -t utf-8"
    )


def last_seam(text: str) -> int:
    """The last place to cut, 0 where there is none in the second half."""
    matches = SEAM.finditer(text, max(len(text) - 4096, len(text) // 2))
    return max((match.start() for match in matches), default=0)


def cut_long(text: str) -> Iterator[Piece]:
    """One long document in pieces."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        part = text[begin : begin + PIECE_CHARACTERS]
        part = part[: last_seam(part) or len(part)]
        begin += len(part)
        yield Piece(part, False, begin / len(text))
    yield Piece(text[begin:], True, 1.0)
