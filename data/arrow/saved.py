"""Folders that `datasets` has saved: streams of Arrow, which are read as they lie on the disk.

pyarrow believes what stands in them: a place of a text that is not in the file ends the process. So
every batch is validated first. Format: arrow.apache.org/docs/format/Columnar.html.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.arrow.parquet import check_column, documents
from data.arrow.thrift import Damaged
from data.readers import Piece, bounded
from utils import first_line, read_json

STATE = "state.json"  # names the files


def files(folder: Path) -> list[Path]:
    """Of a saved table, in order."""
    with _whole(folder):
        try:
            known = read_json(folder / STATE)
        except ValueError as error:
            raise Damaged(first_line(error)) from error
        found = [folder / Path(each["filename"]).name for each in known["_data_files"]]
        for path in found:
            if not path.is_file():
                raise Damaged(f"{path.name} is no regular file")
    return found


def rows(folder: Path, paths: list[Path], column: str) -> Iterator[Piece]:
    """The documents of one column."""
    place, size = f"data: {folder}", sum(path.stat().st_size for path in paths)
    total = count(folder, paths)

    def batches():
        for path in paths:
            for batch in _batches(path):
                check_column(batch.schema, column, place)
                batch.validate(full=True)
                yield batch

    with _whole(folder):
        yield from bounded(documents(batches(), total, column, place), size, place)


def count(folder: Path, paths: list[Path]) -> int:
    with _whole(folder):
        return sum(batch.num_rows for path in paths for batch in _batches(path))


def _batches(path: Path) -> Iterator:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        messages = pyarrow.ipc.MessageReader.open_stream(source)
        first = next(iter(messages), None)
        if first is None:
            raise Damaged(f"{path.name} is empty")
        schema = pyarrow.ipc.read_schema(first)
        for message in messages:
            if message.type != "record batch" or _packed(message.metadata.to_pybytes()):
                raise Damaged("it is packed")  # and may unpack to any size
            yield pyarrow.ipc.read_record_batch(message, schema)


def _packed(metadata: bytes) -> bool:
    """Of a record batch: the field 3 (compression) in the field 2 (header) of a message, in
    flatbuffers."""

    def number(form: str, at: int) -> int:
        return struct.unpack_from(form, metadata, at)[0]

    def field(table: int, which: int) -> int | None:
        places = table - number("<i", table)
        last = number("<H", places)
        place = number("<H", places + 4 + 2 * which) if 4 + 2 * which < last else 0
        return table + place if place else None

    header = field(number("<I", 0), 2)
    return header is None or field(header + number("<I", header), 3) is not None


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """ValueError where a file is damaged."""
    import pyarrow

    wrong = (OSError, KeyError, TypeError, struct.error, EOFError, pyarrow.ArrowException)
    try:
        yield
    except (*wrong, Damaged) as error:
        raise ValueError(
            f"data.source={folder} is not a whole saved table ({first_line(error)}); save it again"
            " with datasets' save_to_disk"
        ) from error
