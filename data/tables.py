"""Tables of documents: their parts, mostly files, and which parts hold the documents asked for."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.arrow.parquet import count_parquet, parquet_records, read_parquet
from data.readers import Piece, jsonl_records, read_jsonl, read_txt
from utils import matching_files, visible_files

# The first bytes of compressed files, which are not read.
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
}
READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}
RECORDS = {".jsonl": jsonl_records, ".parquet": parquet_records}


class Gone(ValueError):
    """The text is not there, or not any more."""


@dataclass(frozen=True)
class Part:
    """A part of a table, mostly a file; nothing is opened before it is read or counted."""

    place: str  # path or address, for messages
    size: int  # bytes, or another measure of its share in the whole
    read: Callable[[str], Iterator[Piece]]  # by the name of the column
    count: Callable[[], int] | None = None  # documents; None: they must be read to be counted


@dataclass(frozen=True)
class Files:
    """Own .txt (one document a file), .jsonl (one a line) and .parquet (one a row) files."""

    pattern: str

    def identity(self, split, revision):
        return {"files": [stamp(path) for path in matching(self.pattern)]}

    def parts(self, split, revision, cache, *, download=True):
        return [file_part(path) for path in matching(self.pattern)]


def read(parts: list[Part], column: str) -> Iterator[Piece]:
    """The documents of all parts."""
    before, total = 0, max(sum(part.size for part in parts), 1)
    for part in parts:
        for text, ends, done in part.read(column):
            yield Piece(text, ends, (before + done * part.size) / total)
        before += part.size


def window(parts: list[Part], column: str, begin: int, end: int | None) -> list[Part]:
    """The parts that hold the documents [begin:end], cut to these. Both bounds are counted from the
    end, as Python counts: -100 is the hundredth. As few parts as possible are counted."""
    found, total = [], 0  # documents from the beginning of the part to the end of the table
    for part in reversed(parts):
        if total >= max(-begin, -(end or 0)):
            if not begin:
                found.append(part)
            continue
        count = part.count() if part.count else sum(piece.ends for piece in part.read(column))
        total += count
        first = max(0, total + begin) if begin else 0
        last = min(count, total + end) if end else count
        if first < last:
            found.append(replace(part, read=partial(_window, part, first, last)))
    return found[::-1]


def _window(part: Part, first: int, last: int, column: str) -> Iterator[Piece]:
    number = 0
    for piece in part.read(column):
        if number >= first:
            yield piece
        number += piece.ends
        if number == last:
            return


def matching(pattern: str) -> list[Path]:
    """Files of a path, folder or glob pattern, sorted. A file of exactly this name comes first."""
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        found = [p for p in visible_files(path) if p.suffix in READERS]
    else:
        found = matching_files(pattern)
    known = ", ".join(READERS)
    if not found:
        raise Gone(
            f"data: no file matches {pattern} (looked in {Path.cwd()}); known kinds: {known}"
        )
    for file in found:
        if file.suffix not in READERS:
            raise ValueError(f"data: {file} is none of the known kinds: {known}")
    check_one_kind(found, f"data: {pattern}")
    return sorted(found)


def check_one_kind(paths: list[Path], place: str) -> None:
    """A README.txt beside tables is not meant to be read."""
    kinds = Counter(path.suffix for path in paths)
    if len(kinds) > 1:
        known = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise ValueError(f"{place} holds files of several kinds ({known}); keep one kind there")


def stamp(path: Path) -> dict:
    """Path, size and time of a file, which must not be empty: they differ once it has changed."""
    if not path.is_file():
        raise ValueError(f"data: {path} is not a file")
    status = path.stat()
    if status.st_size == 0:
        raise ValueError(f"data: {path} is empty; remove it or leave it out of the pattern")
    return {"path": str(path.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns}


def in_memory(place: str, documents: Callable[[], Iterable[str]]) -> Part:
    """A part of few documents, none of which is long."""

    def read(column: str) -> Iterator[Piece]:
        found = list(documents())
        for number, text in enumerate(found, 1):
            yield Piece(text, True, number / len(found))

    return Part(place, 1, read)


def file_part(path: Path) -> Part:
    """A local file of a known kind."""
    size = stamp(path)["bytes"]
    with path.open("rb") as file:
        begin = file.read(8)
    for magic, kind in MAGIC.items():
        if begin.startswith(magic):
            raise ValueError(f"data: {path} is compressed ({kind}); unpack it and name what was in")
    count = partial(count_parquet, path) if path.suffix == ".parquet" else None
    return Part(str(path), size, partial(READERS[path.suffix], path), count)
