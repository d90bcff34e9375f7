"""A reader for each kind of file.

A reader yields documents as pieces, never the whole at once, and keeps nothing of what it has read.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils import MOST_LINE  # bytes of a line that is a document; the longest books have a tenth

PIECE_CHARACTERS = 1 << 18
ZEROS = 1 << 12  # bytes, all of them zero: what a crash or a sparse file leaves
LONGEST_WHOLE = 1 << 22  # characters of a document that is tokenized at once
ROWS_AT_ONCE = 100  # they are in memory together, and may all be the one long text of a dictionary
MOST_UNPACKED, MOST_PACKED = 1 << 28, 200  # bytes of what is packed, and times its bytes so
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BIT_BY_BIT = {"buffer_size": 1 << 20, "pre_buffer": False}  # by default whole row groups are read

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


def table(dataset, column: str, place: str) -> Iterator[Piece]:
    """The documents of one column of a `datasets` table."""
    known = [name for name in dataset.column_names if name == column]
    batches = dataset.with_format("arrow", columns=known).iter(ROWS_AT_ONCE)
    return _documents(batches, len(dataset), dataset.column_names, column, place)


def check_unpacked(place: str, packed: int, unpacked: int) -> None:
    """ValueError where so many bytes of a file become more than text does."""
    if unpacked > max(MOST_UNPACKED, MOST_PACKED * packed):
        raise ValueError(
            f"{place} unpacks {packed:,} bytes to {unpacked:,}: it would fill the memory or the"
            " disk"
        )


def parquet_rows(file, column: str, place: str) -> Iterator[Piece]:
    """The documents of an open pyarrow.parquet.ParquetFile."""
    _check_columns(file, [column], place)
    batches = file.iter_batches(ROWS_AT_ONCE, columns=[column])
    return _documents(batches, file.metadata.num_rows, file.schema_arrow.names, column, place)


def _check_columns(file, columns: list[str], place: str) -> None:
    """ValueError where one of them, or a field inside of it, unpacks to too much."""
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for part in map(group.column, range(group.num_columns)):
            if (column := part.path_in_schema.partition(".")[0]) in columns:
                packed, unpacked = part.total_compressed_size, part.total_uncompressed_size
                check_unpacked(f"{place}: {column}", packed, unpacked)


def _documents(batches: Iterable, total: int, known: list[str], column: str, place: str):
    """Of tables of pyarrow."""
    if column not in known:
        raise ValueError(
            f"{place} has no column {column!r}, only {', '.join(known)}; set data.text_column"
        )
    row = 0
    for batch in batches:
        for value in batch.column(column):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}, row {row}: {column} is not UTF-8") from error
            yield from _whole(checked(text, column, f"{place}, row {row}"), (row + 1) / total)
            row += 1


def _whole(text: str, done: float) -> Iterator[Piece]:
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
        yield from _whole(json_text(line, column, place), done)


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


def read_parquet(path: Path, column: str) -> Iterator[Piece]:
    with _parquet(path) as file:
        yield from parquet_rows(file, column, f"data: {path}")


@contextmanager
def _parquet(path: Path) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, **_how(path)) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(broken_parquet(f"data: {path}", error)) from error


def parquet_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """All rows, of the columns that there are; they may hold lists and objects."""
    place, row = f"data: {path}", 0
    with _parquet(path) as file:
        known, total = file.schema_arrow.names, file.metadata.num_rows
        kept = [name for name in columns if name in known]
        _check_columns(file, kept, place)
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=kept):
            for i in range(batch.num_rows):
                where = f"{place}, row {row}"
                try:
                    fields = {name: batch.column(name)[i].as_py() for name in kept}
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8") from error
                row += 1
                yield Record(dict.fromkeys(known) | fields, where, row / total)


def _how(path: Path) -> dict:
    """To read bit by bit only where whole columns are large: for that pyarrow takes as much memory
    as a page says it has, up to 2 GB."""
    import pyarrow.parquet

    known = pyarrow.parquet.read_metadata(path)
    groups = map(known.row_group, range(known.num_row_groups))
    sizes = (g.column(i).total_compressed_size for g in groups for i in range(g.num_columns))
    return BIT_BY_BIT if max(sizes, default=0) > MOST_LINE else {"pre_buffer": False}


def count_parquet(path: Path) -> int:
    """From the footer."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(broken_parquet(f"data: {path}", error)) from error


def broken_parquet(place: str, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"{place} is not a parquet file, or only a part of one ({reason}); get it again"


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}
RECORDS = {".jsonl": jsonl_records, ".parquet": parquet_records}


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
                raise _not_utf8(
                    place, number, read - len(line) + len(part) + error.start
                ) from error
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
    cut = 0
    for match in SEAM.finditer(text, max(len(text) - 4096, len(text) // 2)):
        cut = match.start()
    return cut


def cut_long(text: str) -> Iterator[Piece]:
    """One long document in pieces."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        part = text[begin : begin + PIECE_CHARACTERS]
        part = part[: last_seam(part) or len(part)]
        begin += len(part)
        yield Piece(part, False, begin / len(text))
    yield Piece(text[begin:], True, 1.0)
