"""Tables of documents: their parts (mostly files), and a reader for each kind of file.

A reader yields documents as pieces, never the whole at once, and keeps nothing of what it has read.
"""

import glob
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

PIECE_CHARACTERS = 1 << 18
ROWS_AT_ONCE = 1000
BIT_BY_BIT = {"buffer_size": 1 << 20, "pre_buffer": False}  # else row groups are read whole

# Where a text may be cut so that its tokens do not change: word tokenizers and byte-level BPEs
# split there anyway, after a single line break and before a single space.
SEAM = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")

# JSON can write what is no text: the two, as written and as read.
HALF_A_PAIR, HALF_A_PAIR_DECODED = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")

# How files begin that are mistaken for others.
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
}


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends: bool  # the document ends here
    done: float  # share of the whole read so far, 0 to 1; what the progress display shows


@dataclass(frozen=True)
class Part:
    """A part of a table, mostly a file; nothing is opened before it is read or counted."""

    place: str  # path or address, for messages
    size: int  # bytes, or another measure of its share in the whole
    read: Callable[[str], Iterator[Piece]]  # by the name of the column
    count: Callable[[str], int]  # documents, found without reading them where the kind allows it


def read(parts: list[Part], column: str, begin: int = 0, end: int | None = None) -> Iterator[Piece]:
    """The documents [begin:end] of a table, counted as Python counts: -100 is the hundredth from
    the end. Only the parts that hold them are read, and only those counted that must be."""
    chosen = _between(parts, column, begin, end)
    before, total = 0, max(sum(part.size for part, _, _ in chosen), 1)
    for part, first, last in chosen:
        for text, ends, done in _window(part.read(column), first, last):
            yield Piece(text, ends, (before + done * part.size) / total)
        before += part.size


def passages(
    parts: list[Part], column: str, begin: int = 0, end: int | None = None
) -> list[Callable[[], Iterator[Piece]]]:
    """What `read` gives, part by part; each function reads its part from the beginning."""
    return [
        lambda part=part, first=first, last=last: _window(part.read(column), first, last)
        for part, first, last in _between(parts, column, begin, end)
    ]


def _between(parts, column, begin, end) -> list[tuple[Part, int, int | None]]:
    """(part, first document, one past its last or None) of the parts that hold [begin:end]."""
    if begin > 0 or (end is not None and end >= 0):
        raise ValueError(f"[{begin}:{end}]: bounds are counted from the end")
    counts = {}  # by index, from the last part backwards

    def place(bound: int) -> tuple[int, int]:
        """(part, document in it) of the document at a negative index; the first one at most."""
        left = -bound
        for i in range(len(parts) - 1, -1, -1):
            if i not in counts:
                counts[i] = parts[i].count(column)
            if left <= counts[i]:
                return i, counts[i] - left
            left -= counts[i]
        return 0, 0

    first_part, first = place(begin) if begin else (0, 0)
    last_part, last = place(end) if end is not None else (len(parts), 0)
    chosen = []
    for i in range(first_part, min(last_part + 1, len(parts))):
        stop = last if i == last_part else None
        if stop != 0:
            chosen.append((parts[i], first if i == first_part else 0, stop))
    return chosen


def _window(pieces: Iterator[Piece], first: int, last: int | None) -> Iterator[Piece]:
    number = 0
    for piece in pieces:
        if number >= first:
            yield piece
        number += piece.ends
        if number == last:
            return


def count_read(reader: Callable[[str], Iterator[Piece]]) -> Callable[[str], int]:
    """Part.count of a kind whose documents can only be counted by reading them."""
    return lambda column: sum(piece.ends for piece in reader(column))


def table(dataset, column: str, name: str) -> Iterator[Piece]:
    """The documents of one column of a `datasets` table."""
    if column not in dataset.column_names:
        raise ValueError(missing_column(name, column, dataset.column_names))
    total, row = len(dataset), 0
    for batch in dataset.select_columns([column]).iter(ROWS_AT_ONCE):
        for text in batch[column]:
            yield Piece(checked(text, column, f"{name}, row {row}"), True, (row + 1) / total)
            row += 1


def missing_column(place: str, column: str, known: list[str]) -> str:
    return f"{place} has no column {column!r}, only {', '.join(known)}; set data.text_column"


def checked(text, column: str, place: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{place}: {column} is {type(text).__name__}, not text")
    return text


def matching(pattern: str) -> list[Path]:
    """Files of a path, folder or glob pattern, sorted."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in READERS and not p.is_dir()]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    if not found:
        raise ValueError(
            f"data: no file matches {pattern} (looked in {Path.cwd()}); known kinds:"
            f" {', '.join(READERS)}"
        )
    for file in found:
        if file.suffix not in READERS:
            raise ValueError(f"data: {file} is none of the known kinds: {', '.join(READERS)}")
    check_one_kind(found, f"data: {pattern}")
    return sorted(found)


def check_one_kind(paths: list[Path], place: str) -> None:
    """A README.txt beside tables is not meant to be read."""
    kinds = Counter(path.suffix for path in paths)
    if len(kinds) > 1:
        known = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise ValueError(f"{place} holds files of several kinds ({known}); keep one kind there")


def stamp(path: Path) -> dict:
    """What tells whether a file has changed."""
    size_of(path)
    status = path.stat()
    return {"path": str(path.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns}


def file_part(path: Path) -> Part:
    """A local file of a known kind."""
    reader, count = READERS[path.suffix], COUNTERS.get(path.suffix)

    def read(column: str) -> Iterator[Piece]:
        return reader(path, column)

    size = size_of(path)
    with path.open("rb") as file:
        begin = file.read(8)
    for magic, kind in MAGIC.items():
        if begin.startswith(magic):
            raise ValueError(f"data: {path} is compressed ({kind}); unpack it and name what was in")
    return Part(str(path), size, read, count_read(read) if count is None else lambda _: count(path))


def size_of(path: Path) -> int:
    """Bytes of a file, which must not be empty."""
    if not path.is_file():
        raise ValueError(f"data: {path} is not a file")
    if size := path.stat().st_size:
        return size
    raise ValueError(f"data: {path} is empty; remove it or leave it out of the pattern")


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
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, line, read in decoded_lines(file, f"data: {path}"):
            if line.strip():
                text = json_text(line, column, f"data: {path}, line {number}")
                yield Piece(text, True, read / size)


def json_text(line: str, column: str, place: str) -> str:
    """One field of a JSON object."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error})") from error
    if not isinstance(record, dict) or column not in record:
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place} has no field {column!r} ({known}); set data.text_column")
    text = checked(record[column], column, place)
    if HALF_A_PAIR.search(line) and HALF_A_PAIR_DECODED.search(text):
        raise ValueError(f"{place}: {column} holds half of a surrogate pair, which is no text")
    return text


def read_parquet(path: Path, column: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, **BIT_BY_BIT) as file:
            yield from parquet_rows(file, column, f"data: {path}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(broken_parquet(f"data: {path}", error)) from error


def parquet_rows(file, column: str, place: str) -> Iterator[Piece]:
    """The documents of an open pyarrow.parquet.ParquetFile."""
    names = file.schema_arrow.names
    if column not in names:
        raise ValueError(missing_column(place, column, names))
    total, row = file.metadata.num_rows, 0
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
        for value in batch.column(0):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}, row {row}: {column} is not UTF-8") from error
            yield Piece(checked(text, column, f"{place}, row {row}"), True, (row + 1) / total)
            row += 1


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
COUNTERS = {".parquet": count_parquet}  # of the kinds that say how many documents they hold


def decoded_lines(file: BinaryIO, place: str, longest: int = -1) -> Iterator[tuple[int, str, int]]:
    """(line number from 1, text with its line break, bytes read so far); lines of more than
    `longest` bytes come in several."""
    number, read, rest = 1, 0, b""
    for part in iter(partial(file.readline, longest), b""):
        line, rest = rest + part, b""
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
