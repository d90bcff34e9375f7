"""Tables of documents: their parts, mostly files, and which parts hold the documents asked for."""

import glob
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.readers import COUNTERS, READERS, Piece

# The first bytes of compressed files, which are not read.
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
}


@dataclass(frozen=True)
class Part:
    """A part of a table, mostly a file; nothing is opened before it is read or counted."""

    place: str  # path or address, for messages
    size: int  # bytes, or another measure of its share in the whole
    read: Callable[[str], Iterator[Piece]]  # by the name of the column
    count: Callable[[str], int]  # documents, found without reading them where the kind allows it


def read(parts: list[Part], column: str, begin: int = 0, end: int | None = None) -> Iterator[Piece]:
    """The documents [begin:end] of a table, counted as Python counts: -100 is the hundredth from
    the end. Only the parts that hold them are read, and as few as possible are counted."""
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
    """Path, size and time of a file: they differ once the file has changed."""
    size_of(path)
    status = path.stat()
    return {"path": str(path.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns}


def file_part(path: Path) -> Part:
    """A local file of a known kind."""
    read, count = partial(READERS[path.suffix], path), COUNTERS.get(path.suffix)
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
