"""Texts and prompts: files that are endless, hidden, marked, torn or made to fill the memory."""

import csv
import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tools import bounded, cases, refused

from data import readers, tables
from data.corpora import get_corpus, opened
from data.readers import MOST_LINE
from data.tokenizer import get_tokenizer
from sampling.prompts import encode_prompts, read_prompts
from sampling.sample_file import COLUMNS, SampleFile

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b"
MARK = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def documents(name: str, source=None, column="text") -> list[str]:
    """All documents of a text."""
    found = get_corpus(name, "train", source=source)
    _, pieces = opened(found, "train", None, column, Path("cache"))
    texts, whole = [], ""
    for piece in pieces:
        whole += piece.text
        if piece.ends:
            texts.append(whole)
            whole = ""
    return texts


def written(name: str, data) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return name


def line(count: int, name="x.jsonl") -> str:
    """A JSON line of so many letters."""
    with open(name, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(count >> 20):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')
    return name


def table(name="x.parquet", column="text", rows=("a",), **how) -> str:
    made = pyarrow.table({column: rows})
    pyarrow.parquet.write_table(made, name, **how)
    return name


def one_long_row() -> str:
    return table(rows=["a" * (300 << 20)], compression="zstd", use_dictionary=False)


def linked(target: str, name: str) -> str:
    os.symlink(target, name)
    return name


def fifo(name: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(name)
    return name


def packed(name: str, content, size: int, method=zipfile.ZIP_DEFLATED) -> str:
    """A zip of one file: `content` again and again, up to `size` bytes."""
    with (
        zipfile.ZipFile("x.zip", "w", method, compresslevel=1) as archive,
        archive.open(name, "w") as file,
    ):
        for _ in range(size >> 20):
            file.write(content * (1 << 20))
    return "x.zip"


def tarred(*members: tuple[str, bytes], kind=tarfile.REGTYPE) -> str:
    with tarfile.open("x.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
    return "x.tar"


TEXTS = {
    "a FIFO": (lambda: fifo("x.txt"), "no file matches"),
    "a FIFO in a folder": (lambda: fifo("d/x.txt") and "d", "not a file"),
    "a device": (lambda: linked("/dev/zero", "x.txt"), "no file matches"),
    "a device in a folder": (
        lambda: written("d/a.txt", "a") and linked("/dev/zero", "d/x.txt") and "d",
        "not a file",
    ),
    "a link to itself": (lambda: linked("x.txt", "x.txt"), "no file matches"),
    "a link to nowhere in a folder": (
        lambda: written("d/a.txt", "a") and linked("nowhere", "d/x.txt") and "d",
        "not a file",
    ),
    "hidden files alone": (lambda: written("d/.x/a.txt", "a") and "d", "no file matches"),
    "a line of 200 MB": (lambda: line(200 << 20), "line 1 has 67,108,864 bytes or more"),
    "a line without end": (
        lambda: os.truncate(written("x.jsonl", "{"), 8 << 30) or "x.jsonl",
        "line 1 has 67,108,864 bytes or more",
    ),
    "JSON that is deep": (lambda: written("x.jsonl", "[" * 100_000), "line 1 is not JSON"),
    "JSON objects that are deep": (
        lambda: written("x.jsonl", '{"a":' * 100_000),
        "line 1 is not JSON",
    ),
    "5 000 digits": (
        lambda: written("x.jsonl", '{"text": "a"}\n{"text": "b", "n": %s}' % ("9" * 5000)),
        "line 2 is not JSON",
    ),
    "5 000 digits of text": (
        lambda: written("x.jsonl", '{"text": %s}' % ("9" * 4000)),
        "text is int, not text",
    ),
    "half a pair": (lambda: written("x.jsonl", '{"text": "\\ud800"}'), "half of a surrogate pair"),
    "half a pair in a key": (lambda: written("x.jsonl", '{"\\ud800": "a"}'), "no field 'text'"),
    "escape sequences in a key": (
        lambda: written("x.jsonl", json.dumps({ESCAPE: "a"})),
        "no field 'text'",
    ),
    "many keys": (
        lambda: written("x.jsonl", json.dumps({f"key {i}": 0 for i in range(100_000)})),
        "no field 'text'",
    ),
    "no JSON": (lambda: written("x.jsonl", b"\x1b[2J"), "line 1 is not JSON"),
    "a list of lines": (lambda: written("x.jsonl", "[1]"), "no field 'text'"),
    "text that is null": (lambda: written("x.jsonl", '{"text": null}'), "NoneType, not text"),
    "UTF-16": (lambda: written("x.txt", "text".encode("utf-16")), "not UTF-8"),
    "half a letter": (lambda: written("x.txt", b"a\xc3"), "not UTF-8"),
    "half a pair in UTF-8": (lambda: written("x.txt", b"\xed\xa0\x80"), "not UTF-8"),
    "a row of 300 MB": (one_long_row, "it would fill the memory"),
    "no parquet": (lambda: written("x.parquet", b"PAR1" + bytes(100) + b"PAR1"), "parquet"),
    "a footer of 4 GB": (
        lambda: written("x.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\xffPAR1"),
        "parquet",
    ),
    "half a parquet": (
        lambda: written("x.parquet", Path(table()).read_bytes()[:-20]),
        "parquet",
    ),
    "a column of escape sequences": (lambda: table(column=ESCAPE), "no column 'text'"),
    "a column of numbers": (lambda: table(rows=[1]), "int64, not text"),
    "a column of bytes": (lambda: table(rows=[b"\xff"]), "binary, not text"),
    "a column of lists": (lambda: table(rows=[["a"]]), "list<element: string>, not text"),
    "a name of escape sequences": (lambda: written(f"{ESCAPE.replace('/', '')}.txt", ""), "empty"),
}


@pytest.mark.parametrize(("make", "message"), cases(TEXTS, ["a row of 300 MB"]))
def test_a_hostile_text_is_refused(make, message):
    name = make()
    refused(lambda: documents(name), message)


CACHE = ["cache", "cache/*", "cache/*/*"]
ARCHIVES = {
    "a line of 65 MB in a zip": (
        "wikitext2",
        lambda: packed("wiki.train.raw", b"a", 65 << 20, zipfile.ZIP_STORED),
        "line 1 has 67,108,864 bytes or more",
    ),
    "a text8 of 1 GB": ("text8", lambda: packed("text8", b"a", 1 << 30), "would unpack to"),
    "a sparse text8": (
        "text8",
        lambda: os.truncate(written("text8", "a"), 8 << 30) or "text8",
        "is not text8",
    ),
    "a tar of links": (
        "wikitext2",
        lambda: tarred(("wiki.train.raw", b""), kind=tarfile.SYMTYPE),
        "holds no wiki.train.raw",
    ),
    "a tar of devices": (
        "wikitext2",
        lambda: tarred(("wiki.train.raw", b""), kind=tarfile.CHRTYPE),
        "holds no wiki.train.raw",
    ),
    "a tar of escape sequences": ("wikitext2", lambda: tarred((ESCAPE, b"a")), "holds no wiki"),
    "the same file twice": (
        "wikitext2",
        lambda: tarred(("a/wiki.train.raw", b"a\n"), ("b/wiki.train.raw", b"b\n")),
        "wiki.train.raw",
    ),
    "half a gzip": (
        "wikitext2",
        lambda: written("x.tar.gz", gzip.compress(bytes(1 << 16))[:-30]),
        "x.tar.gz",
    ),
}


@pytest.mark.parametrize(
    ("corpus", "make", "message"), cases(ARCHIVES, ["a text8 of 1 GB", "a sparse text8"])
)
def test_a_hostile_archive_is_refused(corpus, make, message):
    source = make()
    refused(lambda: documents(corpus, source=source), message, writes=CACHE)


def test_what_only_looks_hostile_is_read():
    written("d/a.txt", MARK + b"one")
    for name in ("d/.ipynb_checkpoints/a-checkpoint.txt", "d/._a.txt", "d/__MACOSX/._a.txt"):
        written(name, b"hidden")
    assert documents("d") == ["one"]
    assert [path.name for path in tables.matching("d")] == ["a.txt"]
    written("x.jsonl", MARK + b'{"text": "one"}\r\n{"text": "two"}')
    assert documents("x.jsonl") == ["one", "two"]
    written("y.jsonl", json.dumps({"text": "a long word " * 500_000}))
    assert documents("y.jsonl") == ["a long word " * 500_000]  # in pieces, and whole again
    table(rows=["one", "two " * 2_000_000, "three"])
    assert documents("x.parquet") == ["one", "two " * 2_000_000, "three"]
    assert MOST_LINE > 1 << 25


@pytest.mark.slow
def test_one_long_text_in_many_rows_is_read_in_turn(monkeypatch):
    """A dictionary holds it once, and the rows point to it."""
    monkeypatch.setattr(readers, "MOST_UNPACKED", 1 << 30)
    table(rows=pyarrow.array(["a" * (1 << 20)] * 600).dictionary_encode())
    _, pieces = opened(get_corpus("x.parquet", "train"), "train", None, "text", Path("cache"))
    with bounded(memory=400 << 20):
        assert sum(len(piece.text) for piece in pieces) == 600 << 20


# ---- prompts -------------------------------------------------------------------------------------

PROMPTS = {
    "a FIFO": (lambda: fifo("p.txt"), "p.txt"),
    "a device": (lambda: linked("/dev/zero", "p.txt"), "p.txt"),
    "a folder": (lambda: os.mkdir("p.txt") or "p.txt", "p.txt"),
    "8 GB": (lambda: os.truncate(written("p.txt", "a"), 8 << 30) or "p.txt", "more than"),
    "UTF-16": (lambda: written("p.txt", "text".encode("utf-16")), "not UTF-8"),
    "deep JSON": (lambda: written("p.jsonl", "[" * 100_000), "line 1 cannot be read"),
    "5 000 digits": (lambda: written("p.jsonl", "9" * 5000), "line 1 cannot be read"),
    "a list": (lambda: written("p.jsonl", "[1]"), "line 1 must be an object"),
    "escape sequences": (lambda: written("p.jsonl", ESCAPE), "line 1 is not JSON"),
    "a mark alone": (lambda: written("p.txt", MARK), "is empty"),
}


@pytest.mark.parametrize(("make", "message"), PROMPTS.values(), ids=PROMPTS)
def test_hostile_prompts_are_refused(make, message):
    path = make()
    refused(lambda: read_prompts(path), message)


LIMITS = {"length": 64, "context_size": 64}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("\ud800", "prompt 1"),
        ("a" * 1_000_000, "prompt 1"),
        (f"{ESCAPE} [MASK]", "prompt 1"),
        ("\x00" * 100, "prompt 1"),
    ],
    ids=["half a pair", "a million letters", "escape sequences", "zeros"],
)
def test_a_hostile_prompt_is_refused(prompt, message):
    tokenizer = get_tokenizer("gpt2")
    refused(lambda: encode_prompts([prompt], tokenizer, infill=False, **LIMITS), message)


def test_a_byte_order_mark_is_no_part_of_a_prompt():
    written("p.txt", MARK + b"the cat\r\nan old dog\r\n")
    assert read_prompts("p.txt") == ["the cat", "an old dog"]
    written("p.jsonl", MARK + b'{"prompt": "the cat"}\n')
    assert read_prompts("p.jsonl") == ["the cat"]


def test_spaces_beside_a_mask_are_kept():
    tokenizer = get_tokenizer("characters")
    prompt = "a [MASK] [MASK][MASK]  b"
    (ids,) = encode_prompts([prompt], tokenizer, infill=True, **LIMITS)
    assert tokenizer.decode(ids[1:]) == prompt


# ---- samples -------------------------------------------------------------------------------------

HEADER = ",".join(COLUMNS) + "\r\n"
SAMPLES = {
    "a FIFO": lambda: fifo("s.csv"),
    "a device": lambda: linked("/dev/zero", "s.csv"),
    "a file of nobody": lambda: written("s.csv", f"{ESCAPE},b\n1,2\n"),
    "words for numbers": lambda: written("s.csv", HEADER + "x,y,z,u,v,w,q,run\r\n"),
}


@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
def test_no_samples_are_added_to_it(make):
    path = make()
    refused(lambda: SampleFile(path).check(), "s.csv")


def test_a_row_without_end_is_no_sample():
    """8 GB, of which no more than one row is in memory."""
    os.truncate(written("s.csv", HEADER + ',1,1.0,1,"'), 8 << 30)
    refused(lambda: SampleFile("s.csv").check(), "s.csv: a row has 67,108,864 bytes or more")


def test_a_long_sample_is_read_again():
    text = "long " * 100_000
    with open("s.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, ("", 1, 1.0, 1, text, 1, 0, "run")])
    assert SampleFile("s.csv").rows("run")[0].samples == text
