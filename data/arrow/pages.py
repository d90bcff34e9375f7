"""What a parquet file says of its sizes, read before pyarrow takes as much memory as it says.

Format: parquet.apache.org/docs/file-format.
"""

import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from data.arrow.thrift import Damaged, Thrift

MOST_FOOTER, MOST_ITEMS = 1 << 26, 500_000  # bytes, and items of its lists: 350 MB of memory
MOST_PAGE, MOST_VALUES = 1 << 27, 1 << 22  # bytes and rows; pyarrow takes six times the bytes
MOST_POINTED = 1 << 30  # bytes of the texts that the rows of a dictionary may become
MOST_HEAD = 1 << 24  # bytes of a page's head; pyarrow's own bound
# A file of small pages takes long: beside the first ones, a page has so many bytes on average.
FIRST_PAGES, PAGE = 1000, 256
ROWS, DICTIONARY, ROWS_2 = 0, 2, 3  # kinds of pages
ABOUT = {ROWS: 5, DICTIONARY: 7, ROWS_2: 8}  # the field that says more
LENGTHS, PREFIXES = 6, 7  # encodings that begin with how many lengths there are
CODECS = range(8)  # ways to pack pages
RLE = 3  # how it is said which rows are null


def checked_footer(file: BinaryIO):
    """The FileMetaData of pyarrow, once it is known to be small enough: its lists take up to 300
    times their bytes."""
    import pyarrow.parquet

    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length, magic = struct.unpack("<I4s", file.read(8).rjust(8))
    if magic != b"PAR1" or length > size - 8:
        raise Damaged("it has no footer")
    if length > MOST_FOOTER:
        raise Damaged(f"a footer of {length:,} bytes")
    file.seek(size - 8 - length)
    try:
        _check_codecs(Thrift(file.read(length), MOST_ITEMS).struct())
    except (IndexError, KeyError) as error:
        raise Damaged("half a footer") from error
    return pyarrow.parquet.read_metadata(file)


def _check_codecs(footer: dict) -> None:
    """An unknown way to pack a column ends pyarrow's process. KeyError: something is missing."""
    for group in footer[4, Thrift.LIST]:
        for column in group[1, Thrift.LIST]:
            codec = column[3, Thrift.STRUCT][4, Thrift.INT32]
            if codec not in CODECS:
                raise Damaged(f"a column is packed in the unknown way {codec}")


def longest_page(file: BinaryIO, chunk, leaf, place: str) -> int:
    """Bytes, unpacked, of the longest page in a column's chunk, which no text of it exceeds.
    leaf: the column in the schema. ValueError for a page that is too long."""
    longest, place = 1, f"{place}: {leaf.path}"
    if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":  # each null of it takes as many bytes
        raise ValueError(f"{place} holds values of a fixed length, not text")
    for page in _pages(file, chunk):
        if max(page.packed, page.unpacked) > MOST_PAGE or page.values > MOST_VALUES:
            raise ValueError(
                f"{place} has a page of {page.values:,} rows and {page.unpacked:,} bytes, in the"
                f" file {page.packed:,}; at most {MOST_VALUES:,} rows and {MOST_PAGE:,} bytes are"
                " read: write it again, with fewer rows in a row group"
            )
        if page.encoding in (LENGTHS, PREFIXES):
            _check_lengths(page, _body(file, page, chunk.compression, leaf))
        longest = max(longest, page.unpacked)
    return longest


def is_literal(file: BinaryIO, chunks: Iterable, leaf, place: str) -> bool:
    """Whether pages of a column have their texts in a form that pyarrow cannot read as numbers of a
    dictionary. ValueError where others of it have a dictionary, to one text of which so many rows
    may point that they fill the memory."""
    literal, longest, rows = False, 0, 0
    for page in itertools.chain.from_iterable(_pages(file, chunk) for chunk in chunks):
        literal |= page.encoding in (LENGTHS, PREFIXES)
        if page.kind == DICTIONARY:
            longest = max(longest, page.unpacked)
        else:
            rows += page.values
    if literal and longest * rows > MOST_POINTED:
        raise ValueError(
            f"{place}: {leaf.path} has pages with a dictionary and others; write it again"
        )
    return literal


class Page(NamedTuple):
    """A page by its head."""

    kind: int
    packed: int  # bytes in the file
    unpacked: int
    about: dict  # what the head says of a page of this kind
    begin: int  # of its content

    @property
    def values(self) -> int:
        """Rows, or entries of a dictionary."""
        return self.about.get((1, Thrift.INT32), -1) if self.kind in ABOUT else 0

    @property
    def encoding(self) -> int | None:
        field = {ROWS: 2, ROWS_2: 4}.get(self.kind)
        return self.about.get((field, Thrift.INT32))


def _pages(file: BinaryIO, chunk) -> Iterator[Page]:
    """The pages of a column's chunk, as far as pyarrow reads them."""
    begin = at = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    size = file.seek(0, os.SEEK_END)
    rows = count = 0
    while rows < chunk.num_values and at < begin + chunk.total_compressed_size:
        head, length = _head(file, at)
        kind, unpacked, packed = (head.get((field, Thrift.INT32), -1) for field in (1, 2, 3))
        about = head.get((ABOUT.get(kind), Thrift.STRUCT), {})
        page = Page(kind, packed, unpacked, about, at + length)
        at += length + packed
        if min(unpacked, packed, page.values) < 0 or at > size:
            raise Damaged("a page that is not whole")
        count += 1
        if count > FIRST_PAGES + (at - begin) // PAGE:
            raise Damaged(f"{count:,} pages in {at - begin:,} bytes")
        yield page
        rows += page.values if kind != DICTIONARY else 0


def _head(file: BinaryIO, at: int) -> tuple[dict, int]:
    """(the head of the page there, its bytes)"""
    for most in (1 << 10, 1 << 16, MOST_HEAD):
        file.seek(at)
        thrift = Thrift(file.read(most), MOST_ITEMS)
        with suppress(IndexError):
            return thrift.struct(), thrift.at
    raise Damaged("a page without a head")


def _body(file: BinaryIO, page: Page, compression: str, leaf) -> bytes:
    """The encoded values of a page, unpacked."""
    import pyarrow

    file.seek(page.begin)
    body, levels = file.read(page.packed), 0
    if page.kind == ROWS_2:  # what says which rows are null is not packed
        levels = sum(max(0, page.about.get((field, Thrift.INT32), 0)) for field in (5, 6))
        body = body[levels:]
    packed = compression != "UNCOMPRESSED" and (7, Thrift.FALSE) not in page.about
    if packed and page.unpacked > levels:
        codec = {"LZ4": "lz4_raw"}.get(compression, compression.lower())
        body = pyarrow.decompress(body, page.unpacked - levels, codec=codec, asbytes=True)
    said = ((4, leaf.max_repetition_level), (3, leaf.max_definition_level))
    for field in [field for field, most in said if most and page.kind == ROWS]:
        if page.about.get((field, Thrift.INT32)) != RLE or len(body) < 4:
            raise Damaged("a page that does not say which rows are null")
        body = body[4 + int.from_bytes(body[:4], "little") :]
    return body


def _check_lengths(page: Page, body: bytes) -> None:
    """Damaged where a page has more lengths than rows: pyarrow would make room for all of them."""
    numbers = Thrift(body, 0)
    try:
        for _ in range(2 if page.encoding == PREFIXES else 1):
            _skip_deltas(numbers, page.values)
    except IndexError as error:
        raise Damaged("a page whose lengths end too early") from error


def _skip_deltas(numbers: Thrift, most: int) -> None:
    """Past the numbers of one DELTA_BINARY_PACKED; Damaged: they are more than `most`."""
    block, parts, count = (numbers.varint() for _ in range(3))
    numbers.varint()  # the first of them
    each = block // max(parts, 1)
    if count > most or not each:
        raise Damaged(f"{count:,} lengths of {most:,} rows")
    left = count - 1
    while left > 0:
        numbers.varint()  # the least difference in the block
        widths = numbers.data[numbers.at : numbers.at + parts]
        numbers.at += parts
        if len(widths) < parts:
            raise Damaged("a page whose lengths end too early")
        for bits in widths[: -(-left // each)]:
            numbers.at += each * bits // 8
        left -= block
