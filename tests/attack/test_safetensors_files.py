"""Heads of safetensors files that lie: offsets, shapes, types, lengths and names."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from checkpoint_helpers import network
from conftest import GOLDEN
from tools import cases, refused

from checkpointing.layouts import read_checkpoint
from checkpointing.load import load_into
from evaluation.judge import load_judge

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"
EMBEDDING = "backbone.vocab_embed.embedding"
FOLDERS = {"checkpoint": GOLDEN / "hf_export", "judge": GOLDEN / "judge"}


def read(folder: Path) -> tuple[dict, bytes]:
    """(head, numbers) of its weights."""
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def entry(dtype="F32", shape=(0,), offsets=(0, 0)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def first(head: dict) -> str:
    return next(name for name in head if name != "__metadata__")


def changed(**parts):
    """Of the first tensor."""
    return lambda head: head | {first(head): head[first(head)] | parts}


def more(name: str, **parts):
    return lambda head: head | {name: entry(**parts)}


def at(name: str, *dims: int):
    """Another shape of a tensor, or where it is not there of the first one."""

    def change(head):
        name_or_first = name if name in head else first(head)
        part = head[name_or_first]
        return head | {name_or_first: part | {"shape": [*dims, *part["shape"]]}}

    return change


def overlapping(head):
    names = [name for name in head if name != "__metadata__"]
    return head | {names[1]: head[names[0]]}


def twice(head):
    name = first(head)
    return json.dumps(head)[:-1] + f", {json.dumps(name)}: {json.dumps(head[name])}}}"


def longer(size: int):
    """A head with one long text."""
    return lambda head: json.dumps(head | {"__metadata__": {"a": "x" * size}})


def many(head):
    lines = (f'"k{i}":{json.dumps(entry())}' for i in range(1_500_000))
    return "{" + ",".join(lines) + "}"


HEADS = {  # what becomes of a head: a dict, or its text
    "offsets below zero": (changed(data_offsets=[-4, 0]), "damaged"),
    "offsets beyond the file": (changed(data_offsets=[0, 1 << 62]), "damaged"),
    "offsets of 2^64": (changed(data_offsets=[(1 << 64) - 8, (1 << 64) - 4]), "damaged"),
    "offsets of 5 000 digits": (lambda h: '{"a":[%s]}' % ("9" * 5000), "damaged"),
    "offsets in turn": (changed(data_offsets=[8, 4]), "damaged"),
    "offsets of text": (changed(data_offsets="all"), "damaged"),
    "tensors that overlap": (overlapping, "damaged"),
    "a shape of 2^64 numbers": (changed(shape=[1 << 32, 1 << 32]), "damaged"),
    "a shape that wraps round": (at("", 1 << 62, 4), "damaged"),
    "a shape below zero": (changed(shape=[-1]), "damaged"),
    "a shape of text": (changed(shape="x"), "damaged"),
    "100 000 dimensions": (at("", *[1] * 100_000), "shape"),
    "65 dimensions": (at("", *[1] * 65), "shape"),
    "an embedding of three dimensions": (at(EMBEDDING, 1), "has no backbone.vocab_embed"),
    "an unknown type": (changed(dtype="F31"), "damaged"),
    "a type of escape sequences": (changed(dtype=ESCAPE), "damaged"),
    "a type of other size": (changed(dtype="F64"), "damaged"),
    "a type of four bits": (changed(dtype="F4"), "damaged"),
    "half a pair in a name": (lambda h: json.dumps(h)[:-1] + ', "\\ud800": {}}', "damaged"),
    "a name twice": (twice, "twice"),
    "metadata of a list": (lambda h: h | {"__metadata__": [1]}, "damaged"),
    "nested": (lambda h: "[" * 100_000, "damaged"),
    "no JSON": (lambda h: "{", "damaged"),
    "a list": (lambda h: "[]", "damaged"),
    "no tensor": (lambda h: {}, "damaged"),
    "100 MB of text": (longer(100 << 20), "more than 16,777,216"),
    "1 500 000 tensors": (many, "more than 16,777,216"),
}


def written(folder: Path, text: str | dict, numbers: bytes, size: int | None = None) -> None:
    head = (text if isinstance(text, str) else json.dumps(text)).encode()
    size = len(head) if size is None else size
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + head + numbers)


def is_refused(message: str) -> str:
    def load():
        checkpoint = read_checkpoint("x")
        load_into(network(checkpoint), checkpoint, use_ema=True, algo="bamdlm")

    return refused(load, "x", message)


@pytest.fixture(params=FOLDERS)
def kind(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDERS[request.param], "x")
    return request.param


@pytest.mark.parametrize(("change", "message"), cases(HEADS, ["1 500 000 tensors"]))
def test_a_head_that_lies_is_refused(change, message, kind):
    head, numbers = read(FOLDERS[kind])
    written(Path("x"), change(head), numbers)
    if kind == "judge":
        refused(lambda: load_judge("x"), "eval.gen_ppl_eval_model_name_or_path='x'")
    else:
        is_refused(message)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_length_that_lies_is_refused(size, kind):
    head, numbers = read(FOLDERS[kind])
    written(Path("x"), head, numbers, size)
    if kind == "judge":
        refused(lambda: load_judge("x"), "eval.gen_ppl_eval_model_name_or_path='x'")
    else:
        is_refused("damaged")


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(8), bytes(64)])
def test_a_file_of_few_bytes_is_refused(data, kind):
    Path("x/model.safetensors").write_bytes(data)
    if kind == "judge":
        refused(lambda: load_judge("x"), "eval.gen_ppl_eval_model_name_or_path='x'")
    else:
        is_refused("damaged")


EXTRA = {ESCAPE: {}, "zero": {"shape": [0, 1 << 62]}}


@pytest.mark.parametrize("name", EXTRA)
def test_what_a_network_does_not_have_is_named_without_harm(name, kind, capfd):
    """transformers takes it, and would write the name to the terminal as it is."""
    head, numbers = read(FOLDERS[kind])
    written(Path("x"), more(name, **EXTRA[name])(head), numbers)
    if kind == "judge":
        assert load_judge("x").model is not None
        said = "".join(capfd.readouterr())
    else:
        said = is_refused("not in the network (1)")
    assert all(each.isprintable() or each == "\n" for each in said)


def test_weights_as_they_are_are_read(kind):
    written(Path("x"), *read(FOLDERS[kind]))
    load_judge("x") if kind == "judge" else network(read_checkpoint("x"))
