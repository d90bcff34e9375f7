"""Parquet files that say less or more than they hold, written byte by byte.

Format: parquet.apache.org/docs/file-format, in Thrift's compact protocol.
"""

import struct
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from test_text_files import documents, table
from tools import refused

from data.arrow import pages, parquet
from data.arrow.thrift import Thrift

LIES, FILLS = "x.parquet is not a parquet file, or only a part of one", "it would fill the memory"
PLAIN, LENGTHS, PREFIXES, OF_DICTIONARY = 0, 6, 7, 8  # encodings
BYTES, FIXED = 6, 7  # types
MOST = 2_147_483_647


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- writing -------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def zigzag(number: int) -> bytes:
    return varint(2 * number if number >= 0 else -2 * number - 1)


class Long(int):
    """Of 64 bits."""


class Fields(bytes):
    """A struct as it is written."""


def fields(**values) -> Fields:
    """f1=…: the field 1."""
    found, last = b"", 0
    for name, value in values.items():
        number = int(name[1:])
        kind, content = written(value)
        found, last = found + bytes([number - last << 4 | kind]) + content, number
    return Fields(found + b"\0")


def written(value) -> tuple[int, bytes]:
    """(kind, content)"""
    if isinstance(value, Fields):
        return 12, bytes(value)
    if isinstance(value, bytes):
        return 8, varint(len(value)) + value
    if isinstance(value, list):
        items = [written(item) for item in value]
        kind = items[0][0] if items else 12
        return 9, bytes([0xF0 | kind]) + varint(len(items)) + b"".join(item for _, item in items)
    return (6 if isinstance(value, Long) else 5), zigzag(value)


def page(body: bytes, *, kind=0, rows=1, encoding=PLAIN, unpacked=None, packed=None) -> bytes:
    """Head and body. kind: 0 rows, 2 dictionary."""
    about = fields(f1=rows, f2=encoding, f3=3, f4=3) if kind == 0 else fields(f1=rows, f2=encoding)
    unpacked = len(body) if unpacked is None else unpacked
    packed = len(body) if packed is None else packed
    return fields(f1=kind, f2=unpacked, f3=packed, **{f"f{5 + kind}": about}) + body


def file(
    *pages: bytes,
    rows=1,
    of=BYTES,
    said: Long | None = None,
    groups=None,
    name=b"text",
    codec=0,
    width=0,
) -> str:
    """One column of one row group; said: the bytes of the pages unpacked."""
    content = b"PAR1" + b"".join(pages)
    size = Long(len(content) - 4)
    dictionary = {"f11": Long(4)} if pages and b"".join(pages)[1] == 4 else {}
    first = len(pages[0]) if dictionary else 0
    about = fields(
        **{
            "f1": of,
            "f2": [PLAIN],
            "f3": [name],
            "f4": codec,
            "f5": Long(rows),
            "f6": said or size,
        },
        **{"f7": size, "f9": Long(4 + first)},
        **dictionary,
    )
    column = fields(f2=Long(0), f3=about)
    group = fields(f1=[column], f2=size, f3=Long(rows))
    kind = {"f1": of, "f2": width, "f3": 0, "f4": name} | ({"f6": 0} if of == BYTES else {})
    schema = [fields(f4=b"schema", f5=1), fields(**kind)]
    footer = fields(f1=1, f2=schema, f3=Long(rows), f4=[group] if groups is None else groups)
    Path("x.parquet").write_bytes(content + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return "x.parquet"


def plain(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def deltas(*numbers: int) -> bytes:
    """Up to 129 numbers: one block of four parts, 32 bits for each difference."""
    steps = [after - before for before, after in pairwise(numbers)]
    least = min(steps, default=0)
    above = [step - least for step in steps] + [0] * (-len(steps) % 32)  # parts that are needed
    first = varint(128) + varint(4) + varint(len(numbers)) + zigzag(numbers[0])
    return first + zigzag(least) + bytes([32] * 4) + struct.pack(f"<{len(above)}I", *above)


def test_what_is_written_here_is_read():
    assert documents(file(page(plain(b"one", b"two"), rows=2), rows=2)) == ["one", "two"]
    lengths = page(deltas(3, 3) + b"onetwo", rows=2, encoding=LENGTHS)
    assert documents(file(lengths, rows=2)) == ["one", "two"]
    prefixes = page(deltas(0, 0) + deltas(3, 3) + b"onetwo", rows=2, encoding=PREFIXES)
    assert documents(file(prefixes, rows=2)) == ["one", "two"]
    words = page(plain(b"one"), kind=2), page(b"\1\4\0", rows=2, encoding=OF_DICTIONARY)
    assert documents(file(*words, rows=2)) == ["one", "one"]


# ---- hostile ones --------------------------------------------------------------------------------


def footer(length: int, *groups: bytes) -> str:
    """A file of nothing else. length: what it says."""
    schema = [fields(f4=b"schema", f5=1), fields(f1=6, f3=0, f4=b"text", f6=0)]
    made = fields(f1=1, f2=schema, f3=Long(0), f4=list(map(Fields, groups)))
    Path("x.parquet").write_bytes(b"PAR1" + made + struct.pack("<I", length or len(made)) + b"PAR1")
    return "x.parquet"


def sparse() -> str:
    """3 GiB of zeros, 2.5 of which it calls its footer."""
    with open("x.parquet", "wb") as new:
        new.truncate(3 << 30)
        new.seek(0, 2)
        new.write(struct.pack("<I", 5 << 29) + b"PAR1")
    return "x.parquet"


def columns(count: int) -> bytes:
    """A row group of so many columns of three bytes; pyarrow needs 700 for each."""
    return b"\x19\xfc" + varint(count) + b"\x26\0\0" * count + b"\x16\0\x16\0\0"


def half_of_one() -> str:
    data = Path(footer(0)).read_bytes()
    Path("x.parquet").write_bytes(data[:4] + b"\x1c" * 8 + struct.pack("<I", 8) + b"PAR1")
    return "x.parquet"


def packed(body: bytes, **how) -> bytes:
    """A page of few bytes; the file has codec=6."""
    content = pyarrow.Codec("zstd").compress(body, asbytes=True)
    return page(content, **{"unpacked": len(body), **how})


def twice() -> str:
    made = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(made, "x.parquet")
    return "x.parquet"


FIRST = page(b"\1" + varint(200) + b"\0", rows=100, encoding=OF_DICTIONARY)
FEW, MANY = 15 << 20, 120 << 20
SAID = Long(1000)  # less than there is
BLOCK = varint(1 << 30) + varint(4) + varint(MOST) + bytes(6)  # 2^31 numbers without a bit
BOMBS = {
    "one long text in many rows": (
        lambda: file(page(plain(b"a" * FEW), kind=2), FIRST, rows=100),
        FILLS,
    ),
    "each row all of the one before": (
        lambda: file(
            packed(
                deltas(0, *[FEW] * 99) + deltas(FEW, *[0] * 99) + b"a" * FEW,
                rows=100,
                encoding=PREFIXES,
            ),
            rows=100,
            codec=6,
        ),
        FILLS,
    ),
    "a long text that is packed": (
        lambda: file(packed(plain(b"a" * MANY)), codec=6, said=SAID),
        "text has 125,829,120 bytes; cut it",
    ),
    "a text of 17 MB in 1 kB": (
        lambda: file(packed(plain(b"a" * (17 << 20))), codec=6, said=SAID),
        FILLS,
    ),
    "a page of 2 GB": (lambda: file(page(plain(b"a"), unpacked=MOST), codec=6), "has a page of 1 "),
    "2^31 rows in a page": (
        lambda: file(page(plain(b"a"), rows=MOST)),
        "a page of 2,147,483,647 r",
    ),
    "2^31 rows in a file": (lambda: file(page(plain(b"a")), rows=MOST), FILLS),
    "a dictionary of 2^31": (
        lambda: file(page(plain(b"a"), kind=2, rows=MOST), FIRST, rows=100),
        "a page of 2,147,483,647 rows",
    ),
    "a dictionary of 30 million": (
        lambda: file(packed(bytes(MANY), kind=2, rows=MANY // 4), FIRST, codec=6, said=SAID),
        "a page of 31,457,280 rows",
    ),
    "2^31 lengths": (lambda: file(page(BLOCK, rows=100, encoding=LENGTHS), rows=100), LIES),
    "2^31 prefixes": (lambda: file(page(BLOCK, rows=100, encoding=PREFIXES), rows=100), LIES),
    "2^31 lengths that are packed": (
        lambda: file(packed(BLOCK, rows=100, encoding=LENGTHS), rows=100, codec=6),
        LIES,
    ),
    "2^31 lengths behind the prefixes": (
        lambda: file(page(deltas(*[0] * 99) + BLOCK, rows=100, encoding=PREFIXES), rows=100),
        LIES,
    ),
    "blocks of no numbers": (
        lambda: file(page(b"\0\4\2\0", rows=9, encoding=LENGTHS), rows=9),
        LIES,
    ),
    "pages of no rows": (lambda: file(*[page(b"", rows=0)] * 5000), LIES),
    "pages of one row": (lambda: file(*[page(plain(b"a"))] * 5000, rows=5000), LIES),
    "a page below zero": (lambda: file(page(plain(b"a"), packed=(1 << 32) - 5)), LIES),
    "a page that is not there": (lambda: file(page(plain(b"a"), packed=1 << 20)), LIES),
    "values of a GB": (lambda: file(page(b""), of=FIXED, width=1 << 30), "[1073741824], not text"),
    "a footer of 2.5 GB": (sparse, "a footer of 2,684,354,560 bytes"),
    "a footer of 4 GB": (lambda: footer((1 << 32) - 1), "it has no footer"),
    "a million columns": (lambda: footer(0, columns(1_000_000)), "lists that are too long"),
    "100 times 10 000 columns": (lambda: footer(0, *[columns(10_000)] * 100), "lists that are too"),
    "a footer of structs alone": (half_of_one, LIES),
    "an unknown codec": (lambda: file(page(plain(b"a")), codec=77), "the unknown way 77"),
    "a column without its numbers": (lambda: footer(0, columns(1)), "half a footer"),
    "two columns of that name": (twice, "has 2 columns 'text'"),
}


@pytest.mark.parametrize(("make", "message"), BOMBS.values(), ids=BOMBS)
def test_a_parquet_file_that_lies_is_refused(make, message):
    name = make()
    refused(lambda: documents(name), message, memory=800 << 20)


def changed(which: int, size: int, **how) -> str:
    """The first page says that it has `size` bytes; which: 1 unpacked, 2 in the file."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 10] * 50}), "x.parquet", **how)
    data = Path("x.parquet").read_bytes()
    begin = 4  # of the head of the page: a type, then the two sizes, each after a byte 0x15
    for number in range(which + 1):
        assert data[begin] == 0x15
        end = begin + 2
        while data[end - 1] & 128:
            end += 1
        if number < which:
            begin = end
    Path("x.parquet").write_bytes(data[: begin + 1] + zigzag(size) + data[end:])
    return "x.parquet"


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("which", [1, 2], ids=["unpacked", "in the file"])
@pytest.mark.parametrize("size", [0, MOST])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_that_lies_about_its_size_is_refused(which, compression, size, dictionary):
    name = changed(which, size, compression=compression, use_dictionary=dictionary)
    refused(lambda: documents(name), "has a page of" if size and which == 1 else LIES)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", None])
def test_honest_pages_are_read(encoding, codec, version):
    rows = [f"row {i} of words" for i in range(3000)]
    how = {"use_dictionary": True} if encoding is None else {"column_encoding": {"text": encoding}}
    how = {"use_dictionary": False, **how, "compression": codec, "data_page_version": version}
    table(rows=rows, row_group_size=1000, data_page_size=4000, **how)
    assert documents("x.parquet") == rows


def test_few_rows_are_in_memory_where_pages_are_long(monkeypatch):
    asked = []
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, rows, **how):
        asked.append(rows)
        return whole(self, rows, **how)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    table(rows=["a" * 100] * 50, use_dictionary=False)
    for together in (parquet.TOGETHER, 20_000, 1):
        monkeypatch.setattr(parquet, "TOGETHER", together)
        assert documents("x.parquet") == ["a" * 100] * 50
    assert asked[0] == parquet.ROWS_AT_ONCE
    assert asked[1:] == [3, 1]


# ---- conversations: lists of objects -------------------------------------------------------------


def records(name: str) -> list[dict]:
    return [each.fields for each in parquet.parquet_records(Path(name), ["messages"])]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_honest_conversations_are_read(encoding, version):
    rows = [[{"role": "user", "content": f"turn {i}"}] * (i % 4) for i in range(300)]
    leaves = [f"messages.list.element.{name}" for name in ("role", "content")]
    how = {"column_encoding": dict.fromkeys(leaves, encoding), "data_page_version": version}
    table(column="messages", rows=rows, use_dictionary=False, data_page_size=500, **how)
    assert records("x.parquet") == [{"messages": row} for row in rows]


def test_two_columns_of_messages_are_refused():
    both = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["messages"] * 2)
    pyarrow.parquet.write_table(both, "x.parquet")
    refused(lambda: records("x.parquet"), "x.parquet has 2 columns 'messages'")


def test_conversations_that_lie_are_refused():
    wide = pyarrow.array([[None] * 9], pyarrow.list_(pyarrow.binary(1 << 27)))
    pyarrow.parquet.write_table(pyarrow.table({"messages": wide}), "x.parquet")
    refused(lambda: records("x.parquet"), "holds values of a fixed length", memory=800 << 20)
    block = page(BLOCK, rows=100, encoding=LENGTHS)
    refused(lambda: records(file(block, rows=100, name=b"messages")), LIES, memory=800 << 20)
    long = packed(plain(b"a" * MANY), unpacked=MOST)
    refused(
        lambda: records(file(long, codec=6, name=b"messages", said=SAID)), "has a page of 1 row"
    )


@pytest.mark.parametrize(("messages", "letters"), [(1_000_000, 1_000_000), (3_000_000, 1)])
def test_a_conversation_of_few_bytes_that_becomes_many_is_refused(messages, letters):
    """One text that every message points at; more messages than memory has room for."""
    text, number = pyarrow.array(["x" * letters]), pyarrow.array([0] * messages, pyarrow.int32())
    content = pyarrow.DictionaryArray.from_arrays(number, text)
    turns = pyarrow.StructArray.from_arrays([content], ["content"])
    whole = pyarrow.ListArray.from_arrays(pyarrow.array([0, messages], pyarrow.int32()), turns)
    table = pyarrow.table({"messages": whole})
    pyarrow.parquet.write_table(table, "x.parquet", store_schema=False, compression="zstd")
    assert Path("x.parquet").stat().st_size < 10_000
    refused(lambda: records("x.parquet"), "x.parquet, row 0 has", memory=800 << 20)


def test_a_column_of_two_kinds_of_pages_is_read_where_it_is_small(monkeypatch):
    """One kind with a dictionary and one without: pyarrow cannot read both as numbers."""

    def head(kind, encoding, values, size=1000):
        about = {
            (1, Thrift.INT32): values,
            (4 if kind == pages.ROWS_2 else 2, Thrift.INT32): encoding,
        }
        return pages.Page(kind, size, size, about, 0)

    words, numbers = head(pages.DICTIONARY, 0, 3), head(pages.ROWS, 8, 1000)
    literal, many = head(pages.ROWS_2, pages.PREFIXES, 1000), head(pages.ROWS, 8, 2_000_000)
    monkeypatch.setattr(pages, "_pages", lambda file, chunk: chunk)
    leaf = SimpleNamespace(path="messages.content")
    assert not pages.is_literal(None, [[words, many]], leaf, "x")
    assert pages.is_literal(None, [[literal]], leaf, "x")
    assert pages.is_literal(None, [[words, numbers], [literal]], leaf, "x")
    with pytest.raises(ValueError, match=r"x: messages.content has pages with a dictionary"):
        pages.is_literal(None, [[words, many], [literal]], leaf, "x")
