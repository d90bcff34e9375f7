"""Readers of tables and files: each yields the documents as pieces, never the whole at once."""

import glob
import json
import logging
import os
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("bamdlm")

PIECE_CHARACTERS = 1 << 18
ROWS_AT_ONCE = 1000

# Where a text may be cut so that its tokens do not change: word tokenizers and byte-level BPEs
# split there anyway, after a single line break and before a single space.
SEAM = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends: bool  # the document ends here
    done: float  # share of the whole read so far, 0 to 1; what the progress display shows


def table(dataset, column: str, name: str) -> Iterator[Piece]:
    """The documents of one column of a `datasets` table."""
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}, only {', '.join(dataset.column_names)};"
            " set data.text_column"
        )
    total, row = len(dataset), 0
    for batch in dataset.select_columns([column]).iter(ROWS_AT_ONCE):
        for text in batch[column]:
            yield Piece(checked(text, column, f"{name}, row {row}"), True, (row + 1) / total)
            row += 1


def checked(text, column: str, place: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{place}: {column} is {type(text).__name__}, not text")
    return text


def matching(pattern: str) -> list[Path]:
    """Files of a path, folder or glob pattern, sorted."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in READERS]
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
    return sorted(found)


def files(paths: list[Path], column: str) -> Iterator[Piece]:
    sizes = [path.stat().st_size for path in paths]
    before, total = 0, max(sum(sizes), 1)
    for path, size in zip(paths, sizes, strict=True):
        if size == 0:
            raise ValueError(f"data: {path} is empty; remove it or leave it out of the pattern")
        for text, ends, done in READERS[path.suffix](path, column):
            yield Piece(text, ends, (before + done * size) / total)
        before += size


def read_txt(path: Path, column: str) -> Iterator[Piece]:
    """The whole file is one document, whatever its size."""
    size = path.stat().st_size
    text, done = "", 0
    for _, line, read in decoded_lines(path):
        text, done = text + line, read
        if len(text) >= PIECE_CHARACTERS and (cut := last_seam(text)):
            yield Piece(text[:cut], False, done / size)
            text = text[cut:]
    yield Piece(text, True, 1.0)


def read_jsonl(path: Path, column: str) -> Iterator[Piece]:
    size = path.stat().st_size
    for number, line, read in decoded_lines(path):
        if not line.strip():
            continue
        place = f"data: {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON ({error})") from error
        if not isinstance(record, dict) or column not in record:
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{place} has no field {column!r} ({known}); set data.text_column")
        yield Piece(checked(record[column], column, place), True, read / size)


def read_parquet(path: Path, column: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: {path} is not a parquet file ({error})") from error
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(
                f"data: {path} has no column {column!r}, only {', '.join(names)};"
                " set data.text_column"
            )
        total, row = file.metadata.num_rows, 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
            for text in batch.column(0).to_pylist():
                place = f"data: {path}, row {row}"
                yield Piece(checked(text, column, place), True, (row + 1) / total)
                row += 1


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def decoded_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(line number from 1, text with its line break, bytes read so far)."""
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"data: {path}, line {number} is not UTF-8 (byte {read + error.start});"
                    " convert the file, for example with iconv -t utf-8"
                ) from error
            read += len(line)
            yield number, text, read


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


def text8(path: Path) -> str:
    """The text of text8.zip, or of the file inside it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "text8" not in names:
                raise ValueError(f"data: {path} holds {', '.join(names)}, but no file text8")
            content = archive.read("text8")
    else:
        content = path.read_bytes()
    text = content.decode("ascii", errors="replace")
    if strange := sorted(set(text) - set("abcdefghijklmnopqrstuvwxyz ")):
        raise ValueError(
            f"data: {path} is not text8: it holds {strange[:5]} beside a-z and space; get"
            " text8.zip again"
        )
    return text


def fetched(url: str, folder: Path) -> Path:
    """The local copy of a file on the web, downloaded once; a killed download leaves none."""
    target = folder / url.rpartition("/")[2]
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    log.info("downloading %s to %s", url, target)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
        os.replace(part, target)
    except OSError as error:
        raise OSError(f"could not download {url} ({error}); place the file at {target}") from error
    finally:
        part.unlink(missing_ok=True)
    return target
