"""Parquet files, and the documents in any table of pyarrow."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.arrow.pages import Damaged, checked_footer, is_literal, longest_page
from data.readers import DOCUMENT, Piece, Record, bounded, check_unpacked, checked, whole
from utils import MOST_LINE, first_line

ROWS_AT_ONCE = 100  # they are in memory together
TOGETHER = 1 << 27  # bytes of rows, each of which may be as long as the longest page
VALUE = 256  # bytes of a small object, with what points at it


def read_parquet(path: Path, column: str) -> Iterator[Piece]:
    with path.open("rb") as file, _undamaged(f"data: {path}"):
        yield from parquet_rows(file, column, f"data: {path}")


def count_parquet(path: Path) -> int:
    """From the footer."""
    with path.open("rb") as file, _undamaged(f"data: {path}"):
        return checked_footer(file).num_rows


def parquet_rows(file: BinaryIO, column: str, place: str) -> Iterator[Piece]:
    """The documents of an open parquet file. ValueError: they would fill the memory. Damaged, or an
    error of pyarrow: it is no such file."""
    table = _opened(file, checked_footer(file))
    check_column(table.schema_arrow, column, place)
    batches = _batches(file, table, [column], place)
    size = file.seek(0, os.SEEK_END)
    return bounded(documents(batches, table.metadata.num_rows, column, place), size, place)


def parquet_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """All rows, of the columns that there are; they may hold lists and objects."""
    place, row = f"data: {path}", 0
    with path.open("rb") as file, _undamaged(place):
        table = _opened(file, checked_footer(file))
        known, total = table.schema_arrow.names, table.metadata.num_rows
        kept = [name for name in columns if name in known]
        if twice := [name for name in kept if known.count(name) > 1]:
            raise ValueError(f"{place} has {known.count(twice[0])} columns {twice[0]!r}")
        table = _opened(file, table.metadata, _numbered(file, table, kept, place))
        for batch in _batches(file, table, kept, place):
            for i in range(batch.num_rows):
                where = f"{place}, row {row}"
                size = sum(nested_size(batch.column(name).slice(i, 1)) for name in kept)
                if size > MOST_LINE:
                    raise ValueError(f"{where} has {size:,} bytes; cut it into several rows")
                try:
                    fields = {name: batch.column(name)[i].as_py() for name in kept}
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8") from error
                row += 1
                yield Record(dict.fromkeys(known) | fields, where, row / total)


def _opened(file: BinaryIO, metadata, texts: Sequence[str] = ()):
    """metadata: of checked_footer(). texts: leaves that are read as numbers of texts, each of which
    is in memory once."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(
        file,
        metadata=metadata,
        read_dictionary=[*texts],
        # by default whole row groups are read
        buffer_size=1 << 20,
        pre_buffer=False,
    )


def _leaves(table, columns: list[str]) -> list[tuple[int, object]]:
    """(number, leaf) of what these columns consist of."""
    leaves = [(i, table.schema.column(i)) for i in range(len(table.schema))]
    found = [(i, leaf) for i, leaf in leaves if leaf.path.partition(".")[0] in columns]
    return found or [(i, leaf) for i, leaf in leaves if leaf.path in columns]


def _numbered(file: BinaryIO, table, columns: list[str], place: str) -> list[str]:
    """The texts in these columns that can be read as numbers."""
    groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
    return [
        leaf.path
        for i, leaf in _leaves(table, columns)
        if leaf.physical_type == "BYTE_ARRAY"
        and not is_literal(file, [group.column(i) for group in groups], leaf, place)
    ]


def nested_size(values) -> int:
    """Bytes that these values of pyarrow become as objects: one that many point at counts as often,
    and VALUE bytes are added for each."""
    from pyarrow import compute, types

    kind, own = values.type, 0
    if types.is_dictionary(kind):
        lengths = compute.binary_length(values.dictionary).take(values.indices)
        own = compute.sum(lengths).as_py() or 0
    elif types.is_struct(kind):
        own = sum(map(nested_size, values.flatten()))
    elif types.is_nested(kind):
        own = nested_size(values.flatten())
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind):
        own = compute.sum(compute.binary_length(values)).as_py() or 0
    return own + VALUE * len(values)


def _batches(file: BinaryIO, table, columns: list[str], place: str) -> Iterator:
    """The rows of some columns, few at a time where their pages are long."""
    known, leaves = table.metadata, dict(_leaves(table, columns))
    groups = [known.row_group(number) for number in range(known.num_row_groups)]
    groups = [{i: group.column(i) for i in leaves} for group in groups]
    unpacked = sum(chunk.total_uncompressed_size for group in groups for chunk in group.values())
    check_unpacked(place, file.seek(0, os.SEEK_END), unpacked + DOCUMENT * known.num_rows)
    for number, group in enumerate(groups):
        said = (longest_page(file, chunk, leaves[i], place) for i, chunk in group.items())
        count = max(1, min(ROWS_AT_ONCE, TOGETHER // max(said, default=1)))
        yield from table.iter_batches(count, row_groups=[number], columns=columns)


def broken_parquet(place: str, error: Exception) -> str:
    reason = first_line(error)
    return f"{place} is not a parquet file, or only a part of one ({reason}); get it again"


@contextmanager
def _undamaged(place: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (Damaged, pyarrow.ArrowException, OSError) as error:
        raise ValueError(broken_parquet(place, error)) from error


def check_column(schema, column: str, place: str) -> None:
    """ValueError where there is no such column, or it is no text: pyarrow would build what else it
    may hold before it is seen, such as lists of any length."""
    from pyarrow import types

    if (count := schema.names.count(column)) != 1:
        known = ", ".join(schema.names)
        has = "has no column" if not count else f"has {count} columns"
        raise ValueError(f"{place} {has} {column!r}, only {known}; set data.text_column")
    kind = schema.field(column).type
    kind = getattr(kind, "storage_type", kind)
    kind = getattr(kind, "value_type", kind) if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ValueError(f"{place}: {column} is {kind}, not text")


def documents(batches: Iterable, total: int, column: str, place: str) -> Iterator[Piece]:
    """Of tables of pyarrow."""
    row = 0
    for batch in batches:
        values = batch.column(column)
        may_be_long = values.nbytes >= MOST_LINE
        for value in values:
            where = f"{place}, row {row}"
            if may_be_long and (length := _bytes(value)) >= MOST_LINE:
                raise ValueError(
                    f"{where}: {column} has {length:,} bytes; cut it into several rows"
                )
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: {column} is not UTF-8") from error
            yield from whole(checked(text, column, where), (row + 1) / total)
            row += 1


def _bytes(value) -> int:
    """Of a text, behind whatever stands before it."""
    while not hasattr(value, "as_buffer"):  # a value of a dictionary, or of a type of one's own
        value = value.value
    found = None if value is None else value.as_buffer()
    return 0 if found is None else found.size
