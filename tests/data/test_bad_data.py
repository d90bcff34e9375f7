"""Data that cannot be used: one message that names the file or setting, what is wrong and the way
out, through the whole preparation; and nothing is left that could be taken for prepared data."""

import dataclasses
import gzip
import json
import sys
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from hub_tools import get_rows
from test_local_copies import tarred, write_table, zipped

import main
from data.readers import read_jsonl
from data.tokenizer import get_tokenizer

ENOUGH = "the license shall be provided under the terms of this notice " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(GOLDEN / "tokenizer"))


@pytest.fixture
def refused(tokenizer, tmp_path):
    """Prepares, and gives the message."""

    def refused(corpus, split="train", **settings):
        cache = tmp_path / "cache"
        settings = {"tokenizer": tokenizer, "length": 16} | settings
        with pytest.raises(ValueError) as raised:
            get_rows(corpus, split, cache_dir=cache, **settings)
        assert not [path for path in cache.rglob("*") if path.is_file()]
        return str(raised.value)

    return refused


def jsonl(*lines):
    return "".join(f"{line}\n" for line in lines).encode()


def line(**fields):
    return json.dumps(fields)


# name, content, what is said
FILES = {
    "broken UTF-8 in text": ("a.txt", b"fine\nbr\xffken", "a.txt, line 2 is not UTF-8 (byte 7)"),
    "broken UTF-8 in JSON": (
        "a.jsonl",
        jsonl(line(text="a")) + b'{"text": "\xe9"}\n',
        "a.jsonl, line 2 is not UTF-8 (byte 24); convert the file",
    ),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "a.txt, line 1 is not UTF-8 (byte 0)"),
    "empty text": ("a.txt", b"", "a.txt is empty; remove it"),
    "empty JSON lines": ("a.jsonl", b"", "a.jsonl is empty; remove it"),
    "blank lines": ("a.jsonl", b"\n\n \n", "has 0 tokens in 0 documents: not one row of model.len"),
    "too short": ("a.txt", b"be", "1 documents: not one row of model.length=16; use a smaller"),
    "bad JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not JSON ("),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 is not JSON ("),
    "a byte order mark alone": ("a.txt", b"\xef\xbb\xbf", "1 documents: not one row"),
    "two objects": ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', "line 1 is not JSON (Extra data"),
    "one array": ("a.jsonl", b'[\n{"text": "a"}\n]\n', "a.jsonl, line 1 is not JSON ("),
    "not an object": ("a.jsonl", b'["text"]\n', "line 1 has no field 'text' (list); set data.text"),
    "missing field": (
        "a.jsonl",
        jsonl(line(text="a"), line(body="a", id=1)),
        "line 2 has no field 'text' (body, id); set data.text_column",
    ),
    "a number": ("a.jsonl", jsonl(line(text=5)), "a.jsonl, line 1: text is int, not text"),
    "nothing": ("a.jsonl", jsonl(line(text=None)), "a.jsonl, line 1: text is NoneType, not text"),
    "half a surrogate": (
        "a.jsonl",
        jsonl('{"text": "\\ud83d\\ude00"}', '{"text": "\\ud83d"}'),
        "a.jsonl, line 2: text holds half of a surrogate pair",
    ),
    "gzip": ("a.jsonl", gzip.compress(b"{}"), "a.jsonl is compressed (gzip); unpack it"),
    "zip": ("a.txt", b"PK\x03\x04...", "a.txt is compressed (zip); unpack it"),
    "not parquet": ("a.parquet", b"PAR2", "a.parquet is not a parquet file, or only a part"),
    "another kind": (
        "a.csv",
        b"text\n",
        "a.csv is none of the known kinds: .txt, .jsonl, .parquet",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_a_bad_file_is_named(name, content, message, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    said = refused(str(tmp_path / name))
    assert message in said
    assert name in said or "tokens in" in said
    assert len(said.splitlines()) == 1


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def broken_text():
    values = pa.array([b"fine", b"br\xffken"], pa.binary())
    return pa.StringArray.from_buffers(2, values.buffers()[1], values.buffers()[2])


TABLES = {
    "missing column": ({"body": ["a"], "title": ["b"]}, "no column 'text', only body, title; set"),
    "a number": ({"text": [1, 2]}, "a.parquet: text is int64, not text"),
    "nothing": ({"text": ["a", None]}, "a.parquet, row 1: text is NoneType, not text"),
    "a list": ({"text": [["a"], ["b"]]}, "a.parquet: text is list<element: string>, not text"),
    "no rows": ({"text": pa.array([], pa.string())}, "0 documents: not one row of model.length"),
    "broken UTF-8": ({"text": broken_text()}, "a.parquet, row 1: text is not UTF-8"),
}


@pytest.mark.parametrize(("columns", "message"), TABLES.values(), ids=TABLES)
def test_a_bad_table_is_named(columns, message, refused, tmp_path):
    assert message in refused(str(parquet(tmp_path / "a.parquet", **columns)))


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_a_truncated_parquet_file_is_named(keep, refused, tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[ENOUGH] * 100)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert "a.parquet is not a parquet file, or only a part of one (" in refused(str(path))


def test_damage_inside_a_parquet_file_is_named(refused, tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[f"{i} {ENOUGH}" for i in range(100)])
    content = bytearray(path.read_bytes())
    content[8:2000] = b"\xff" * 1992
    path.write_bytes(bytes(content))
    assert "a.parquet is not a parquet file, or only a part of one (" in refused(str(path))


def test_names_that_give_no_text(refused, tmp_path):
    (tmp_path / "x.txt").mkdir()
    assert f"no file matches {tmp_path / 'x.txt'}" in refused(str(tmp_path / "x.txt"))
    assert "no file matches" in refused(str(tmp_path / "*.txt"))
    (tmp_path / "notes.md").write_text("x")
    assert "known kinds: .txt, .jsonl, .parquet" in refused(str(tmp_path))
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    assert "lost.txt is not a file" in refused(str(tmp_path))
    assert "did you mean wikitext103" in refused("wikitext1003")
    assert "data.valid=openwebtext: this corpus has no valid split" in refused(
        "openwebtext", "valid"
    )


def test_a_folder_of_several_kinds_is_refused(refused, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.txt").write_text(ENOUGH)
    (tmp_path / "own" / "a.jsonl").write_text(line(text=ENOUGH))
    said = refused(str(tmp_path / "own"))
    assert "own holds files of several kinds (1 .jsonl, 1 .txt); keep one kind there" in said


# Local copies


def cut(path, keep=0.7):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    return path


def damage(path):
    """Another byte in the middle of the compressed content."""
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


def saved(path, **tables):
    tables = {split: datasets.Dataset.from_dict(columns) for split, columns in tables.items()}
    datasets.DatasetDict(tables).save_to_disk(path)
    return path


def without(folder, pattern):
    for path in folder.rglob(pattern):
        path.unlink()
    return folder


def tables(folder, *names):
    for name in names:
        write_table(folder / name, [ENOUGH])
    return folder


def rewritten(folder, name, text):
    (folder / name).write_text(text)
    return folder


def random_bytes(count):
    import random

    return random.Random(1).randbytes(count).hex()


RAW = "wikitext-103-raw/wiki.valid.raw"
# corpus, what makes the copy in a folder, what is said
COPIES = {
    "nothing": ("wikitext103", lambda d: d / "none", "none does not exist: name a file or folder"),
    "an empty folder": (
        "ag_news",
        lambda d: (d / "copy").mkdir() or d / "copy",
        "copy holds nothing, but no file of the kinds .txt, .jsonl, .parquet",
    ),
    "another zip": (
        "wikitext103",
        lambda d: zipped(d / "x.zip", {"a.txt": "a", "b.txt": "b"}),
        "x.zip holds no wiki.valid.raw (validation split), but a.txt, b.txt",
    ),
    "the version with <unk>": (
        "wikitext103",
        lambda d: zipped(d / "x.zip", {"wikitext-103/wiki.valid.tokens": "a"}),
        "holds no wiki.valid.raw (validation split), but wikitext-103/wiki.valid.tokens",
    ),
    "the sister": (
        "wikitext2",
        lambda d: zipped(d / "x.zip", {RAW: ENOUGH}),
        f"x.zip is of another corpus ({RAW}); look at data.train and data.valid",
    ),
    "a truncated zip": (
        "wikitext103",
        lambda d: cut(zipped(d / "x.zip", {RAW: random_bytes(5000)})),
        "x.zip is damaged or only a part of an archive (neither zip nor tar); get it again",
    ),
    "a damaged zip": (
        "wikitext103",
        lambda d: damage(zipped(d / "x.zip", {RAW: random_bytes(5000)})),
        f"x.zip, {RAW} is damaged or only a part of an archive (",
    ),
    "broken UTF-8 in a zip": (
        "wikitext103",
        lambda d: zipped(d / "x.zip", {RAW: b"fine\n\xff\n"}),
        f"x.zip, {RAW}, line 2 is not UTF-8 (byte 5)",
    ),
    "an empty file in a zip": (
        "wikitext103",
        lambda d: zipped(d / "x.zip", {RAW: ""}),
        f"x.zip, {RAW} is empty; get it again",
    ),
    "a truncated tar": (
        "lm1b",
        lambda d: cut(tarred(d / "x.tar.gz", {"news.en.heldout-0-of-1": random_bytes(50_000)})),
        "x.tar.gz is damaged or only a part of an archive (",
    ),
    "another tar": (
        "lm1b",
        lambda d: tarred(d / "x.tar.gz", {"a.txt": "a"}),
        "x.tar.gz holds no news.en.heldout-*-of-*, but a.txt",
    ),
    "no tar": (
        "ptb",
        lambda d: rewritten(d, "x.tgz", "text") / "x.tgz",
        "x.tgz is damaged or only a part of an archive (neither zip nor tar)",
    ),
    "half of an unpacked archive": (
        "ptb",
        lambda d: rewritten(d, "ptb.train.txt", ENOUGH),
        "holds no ptb.valid.txt (validation split), but ptb.train.txt",
    ),
    "an archive that nobody knows": (
        "ag_news",
        lambda d: zipped(d / "x.zip", {"test.jsonl": line(text=ENOUGH)}),
        "x.zip: no archive of this corpus is known; unpack it, then give a folder of .parquet",
    ),
    "another kind": (
        "ag_news",
        lambda d: rewritten(d, "test.csv", "text") / "test.csv",
        "test.csv is of no kind that is known; give a folder of .parquet, .jsonl or .txt files",
    ),
    "no file of the split": (
        "ag_news",
        lambda d: tables(d / "copy", "train.jsonl", "latest.jsonl"),
        "copy holds latest.jsonl, train.jsonl, but no file of the split test of ag_news; name it",
    ),
    "lines in a text file": (
        "lm1b",
        lambda d: tables(d / "copy", "train.txt", "test.txt"),
        "test.txt would be one document, but those of lm1b are lines: give news.en-*-of-* and",
    ),
    "lines in one text file": (
        "ptb",
        lambda d: rewritten(d, "valid.txt", ENOUGH) / "valid.txt",
        "valid.txt would be one document, but those of ptb are lines: give ptb.train.txt and",
    ),
    "a folder with an archive": (
        "wikitext103",
        lambda d: zipped(d / "x.zip", {RAW: ENOUGH}).parent,
        "holds x.zip, but no file of the kinds .txt, .jsonl, .parquet; an archive must be named",
    ),
    "a file of the other split": (
        "ag_news",
        lambda d: tables(d, "ag_train.parquet") / "ag_train.parquet",
        "ag_train.parquet: its name does not say that it is the split test; rename it, or",
    ),
    "a part of the split": (
        "wikitext2",
        lambda d: tables(d / "copy", "partial-validation/0000.parquet"),
        "0000.parquet is only a part of validation",
    ),
    "several kinds": (
        "ag_news",
        lambda d: tables(d / "copy", "test.jsonl", "test.parquet"),
        "copy holds files of several kinds (1 .jsonl, 1 .parquet); keep one kind there",
    ),
    "a saved table without its data": (
        "ag_news",
        lambda d: without(saved(d / "s", test={"text": [ENOUGH]}), "*.arrow"),
        "test is not a whole saved table (",
    ),
    "a saved table without its state": (
        "ag_news",
        lambda d: without(saved(d / "s", test={"text": [ENOUGH]}), "state.json"),
        "test is not a whole saved table (",
    ),
    "a saved table that was cut": (
        "ag_news",
        lambda d: cut(next(saved(d / "s", test={"text": [ENOUGH]}).rglob("*.arrow"))) and d / "s",
        "test is not a whole saved table (",
    ),
    "a saved table alone": (
        "ag_news",
        lambda d: saved(d / "s", test={"text": [ENOUGH]}).joinpath("test").rename(d / "mine"),
        "mine is one saved table: give the folder of the DatasetDict, with the split test inside",
    ),
    "a saved dict without the split": (
        "ag_news",
        lambda d: saved(d / "s", train={"text": [ENOUGH]}),
        "s has no split test, only train",
    ),
    "a damaged dict": (
        "ag_news",
        lambda d: rewritten(saved(d / "s", test={"text": ["a"]}), "dataset_dict.json", "{"),
        "s: dataset_dict.json is damaged (",
    ),
    "a saved table without the column": (
        "ag_news",
        lambda d: saved(d / "s", test={"body": [ENOUGH]}),
        "test has no column 'text', only body; set data.text_column",
    ),
    "a saved table of numbers": (
        "ag_news",
        lambda d: saved(d / "s", test={"text": [1]}),
        "test: text is int64, not text",
    ),
    "not text8": (
        "text8",
        lambda d: rewritten(d, "text8", "Not Text8!") / "text8",
        "text8 is not text8: it holds ['!', '8', 'N', 'T'] beside a-z and space",
    ),
    "a zip without text8": (
        "text8",
        lambda d: zipped(d / "x.zip", {"text9": "a"}),
        "x.zip holds text9, but no file text8",
    ),
    "a copy of what is not on the hub": (
        "shakespeare",
        lambda d: d,
        "shakespeare is not on the hub, so data.source has no meaning for it",
    ),
}


@pytest.mark.parametrize(("name", "make", "message"), COPIES.values(), ids=COPIES)
def test_a_bad_copy_is_named(name, make, message, refused, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    said = refused(name, "valid", source=str(make(folder)))
    assert message in said
    assert str(folder) in said
    assert len(said.splitlines()) == 1


# Tokenizers


def test_a_tokenizer_without_an_end_is_refused(refused, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"no end-of-sequence token .* set data.eos_token to"):
        get_tokenizer(str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=r"data.eos_token='</s>' is not in the vocabulary"):
        get_tokenizer(str(tmp_path / "tokenizer"), eos_token="</s>")


def test_ids_that_do_not_fit_are_refused(refused, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(ENOUGH)
    small = dataclasses.replace(tokenizer, vocab_size=50)
    said = refused(str(tmp_path / "a.txt"), tokenizer=small)
    assert "but its vocabulary has 50 ids, the mask included; check data.tokenizer_name" in said


# From the command line

COMMAND = [
    "mode=train",
    "model=tiny",
    "model.length=16",
    "data.tokenizer_name_or_path=text8",
    "trainer.accelerator=cpu",
    "loader.num_workers=0",
    "wandb=null",
]
WRONG = {
    "a copy of own files": (
        ["data=files", "data.train=a.txt", "data.valid=a.txt", "data.source=."],
        "data.source=. stands for a named corpus, but data.train=a.txt, data.valid=a.txt is text",
    ),
    "no copy": (
        ["data=ag_news", "data.source=none"],
        "data.source=none does not exist: name a folder, an archive or a file with ag_news",
    ),
    "a bad copy": (["data=ag_news", "data.source=a.txt"], "its name does not say that it is the"),
    "a bad file": (
        ["data=files", "data.train=a.txt", "data.valid=bad.jsonl"],
        "bad.jsonl: line 1 is not JSON",
    ),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_the_command_line_says_it_and_writes_nothing(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(ENOUGH)
    (tmp_path / "bad.jsonl").write_text("{text}\n")
    with pytest.raises(SystemExit) as left:  # before anything is loaded, or after
        sys.exit(main.main([*words, *COMMAND, f"data.cache_dir={tmp_path / 'cache'}"]))
    assert left.value.code == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.rglob("checkpoints"))
    assert not [path for path in (tmp_path / "cache").rglob("*valid*") if path.is_file()]


def test_of_lines_of_json_one_value_is_in_memory(tmp_path):
    """A short line may become a large value: lists of lists take some thirty times its bytes."""
    line = json.dumps({"text": "a", "more": [[]] * 100_000}) + "\n"
    peaks = []
    for count in (1, 3):
        (tmp_path / "lines.jsonl").write_text(line * count)
        tracemalloc.start()
        assert len(list(read_jsonl(tmp_path / "lines.jsonl", "text"))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
