"""Folders that `datasets` has saved, whose Arrow says what is not so."""

import json
import os
from pathlib import Path

import numpy
import pyarrow
import pytest
from test_text_files import documents
from tools import refused

TABLE, STATE = Path("train/data-00000-of-00001.arrow"), Path("train/state.json")
DAMAGED = "data.source=train is not a whole saved table"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("train")
    state([TABLE.name])
    Path("train/dataset_info.json").write_text("{}")


def state(names) -> None:
    STATE.write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def save(column, name="text", **how) -> None:
    table = pyarrow.table({name: column})
    options = pyarrow.ipc.IpcWriteOptions(**how)
    with pyarrow.ipc.new_stream(str(TABLE), table.schema, options=options) as file:
        file.write_table(table)


def placed(*places: int):
    """Texts of six letters, whose places are written into the file as they are."""
    save(pyarrow.array(["ab", "cdef"]))
    data = TABLE.read_bytes()
    there, said = (numpy.array(each, "<i4").tobytes() for each in ((0, 2, 6), places))
    assert data.count(there) == 1
    TABLE.write_bytes(data.replace(there, said))


def cut(count: int) -> None:
    save(["a", "b"])
    os.truncate(TABLE, TABLE.stat().st_size - count)


def state_is(text: str) -> None:
    save(["a"])
    STATE.write_text(text)


def elsewhere() -> None:
    save(["a"])
    TABLE.rename("table.arrow")
    state(["../table.arrow"])


def linked() -> None:
    TABLE.symlink_to("/dev/zero")


LIES = {
    "a text behind the end": (lambda: placed(0, 2, 1 << 30), DAMAGED),
    "a text of less than nothing": (lambda: placed(0, 6, 2), DAMAGED),
    "a text before the beginning": (lambda: placed(-(10**8), 2, 6), DAMAGED),
    "packed": (lambda: save(["a" * (64 << 20)], compression="zstd"), "(it is packed)"),
    "a dictionary": (lambda: save(pyarrow.array(["a"] * 9).dictionary_encode()), DAMAGED),
    "no UTF-8": (lambda: save(pyarrow.array([b"\xff"]).view(pyarrow.string())), "UTF8"),
    "lists": (lambda: save([["a"]]), "list<item: string>, not text"),
    "another column": (lambda: save(["a"], name="body"), "has no column 'text'"),
    "its end is gone": (lambda: cut(100), DAMAGED),
    "no Arrow": (lambda: TABLE.write_bytes(b"\xff" * 1000), DAMAGED),
    "nothing": (lambda: TABLE.write_bytes(b""), DAMAGED),
    "2^63 bytes": (lambda: TABLE.write_bytes(b"\xff" * 7 + b"\x7f" + bytes(100)), DAMAGED),
    "a device": (linked, "no regular file"),
    "a file elsewhere": (elsewhere, "no regular file"),
    "a list": (lambda: state_is("[1]"), DAMAGED),
    "a number": (lambda: state_is('{"_data_files": 3}'), DAMAGED),
    "numbers": (lambda: state_is('{"_data_files": [{"filename": 3}]}'), DAMAGED),
    "deep": (lambda: state_is("[" * 100_000), DAMAGED),
    "no JSON": (lambda: state_is("{"), DAMAGED),
    "a row of 64 MB": (lambda: save(["a" * (64 << 20)]), "row 0: text has 67,108,864 bytes"),
}


@pytest.mark.parametrize(("make", "message"), LIES.values(), ids=LIES)
def test_a_saved_table_that_lies_is_refused(make, message):
    make()
    refused(lambda: documents("ag_news", source="train"), message, memory=800 << 20)


def test_what_describes_a_saved_table_is_not_believed():
    """Its types are those of its Arrow."""
    save(["one", "two"])
    for text in ('{"features": {"text": {"_type": "os.system"}}}', "[" * 1000, "[1]"):
        Path("train/dataset_info.json").write_text(text)
        assert documents("ag_news", source="train") == ["one", "two"]
    os.remove("train/dataset_info.json")
    os.mkfifo("train/dataset_info.json")
    assert documents("ag_news", source="train") == ["one", "two"]
