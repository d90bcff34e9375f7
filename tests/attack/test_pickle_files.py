"""Checkpoint files whose bytes were made to do harm: pickles, archives, and what is no file."""

import os
import pickle
import socket
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from tools import cases, refused

from checkpointing.layouts import read_checkpoint

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b"
KEY = b"\x80\x02}X\x05\x00\x00\x00state"  # a dict, and its first key


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def archive(data: bytes, records=(), name="x.ckpt") -> str:
    """A torch zip file around the pickle `data`."""
    with zipfile.ZipFile(name, "w") as out:
        out.writestr("archive/data.pkl", data)
        for record, content in dict(records).items():
            out.writestr(f"archive/{record}", content)
    return name


def value(data: bytes) -> bytes:
    """A pickle of {"state_dict": {}, "hyper_parameters": {"config": data}}."""
    config = b"}" + text("config") + b"}" + text("a") + data + b"ss"
    return b"\x80\x02}" + text("state_dict") + b"}s" + text("hyper_parameters") + config + b"s."


def doubled(make: bytes, times: int) -> bytes:
    """Each holds the one before it twice; `make` takes two values from the stack."""
    steps = b"".join(b"q\x010h\x01h\x01" + make for _ in range(times))
    return b"N" + steps


def long(number: int) -> bytes:
    data = pickle.encode_long(number)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def tensor(
    *, kind="FloatStorage", key=None, numel=b"K\x04", offset=b"K\x00", size=None, stride=None
):
    """A pickle of one tensor, whose parts are pickles."""
    key = text("0") if key is None else key
    size, stride = size or b"K\x04\x85", stride or b"K\x01\x85"
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + key + text("cpu") + numel
    head = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage[1:] + b"tQ"
    return (
        b"\x80\x02}"
        + text("state_dict")
        + b"}"
        + text("backbone.x")
        + (head + offset + size + stride + b"\x89}tRss.")
    )


BOMBS = {
    "doubled tuples": (value(doubled(b"\x86", 60)), "config"),
    "doubled lists": (value(b"]" + b"".join(b"q\x010]h\x01ah\x01a" for _ in range(60))), "config"),
    "doubled dicts": (
        value(b"}" + b"".join(b"q\x010}K\x00h\x01sK\x01h\x01s" for _ in range(60))),
        "config",
    ),
    "doubled tuples as a key": (b"\x80\x02}" + doubled(b"\x86", 60) + b"Ns.", "key of type tuple"),
    "a key of 100 000 tuples": (
        b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.",
        "key of type tuple",
    ),
    "a number and tuples as a key": (b"\x80\x02}N\x85\x85Ns.", "key of type tuple"),
    "doubled tuples as a stored object": (
        b"\x80\x02" + doubled(b"\x86", 60) + b"Q.",
        "unknown kind of stored object",
    ),
    "a large memo": (b"\x80\x02Nr\xff\xff\xff\xff.", "x.ckpt"),
    "100 000 lists in lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "x.ckpt"),
    "many lists": (b"\x80\x02(" + b"]" * 1_100_000 + b"l.", "more than 1,000,000 containers"),
    "many marks": (b"\x80\x02" + b"(" * 1_100_000 + b".", "more than 1,000,000 containers"),
    "a long pickle": (b"\x80\x02" + b"N0" * (9 << 20) + b"N.", "more than 16,777,216"),
    "a buffer of a terabyte": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "BYTEARRAY8"),
    "bytes of an exabyte": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", "x.ckpt"),
    "a frame of an exabyte": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.", "x.ckpt"),
    "text of an exabyte": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".", "x.ckpt"),
    "a number of 5 000 digits": (value(long(10**5000)), "more than 128 bits"),
    "a number of 20 000 000 bits": (value(long(1 << 20_000_000)), "more than 128 bits"),
    "5 000 digits": (b"\x80\x02L" + b"9" * 5000 + b"L\n.", "x.ckpt"),
    "5 000 more digits": (b"\x80\x02I" + b"9" * 5000 + b"\n.", "x.ckpt"),
    "numbers of one hash": (
        b"\x80\x02}(" + b"".join(long(i * (2**61 - 1)) + b"N" for i in range(1, 60_000)) + b"u.",
        "a key of",
    ),
    "a set": (b"\x80\x04\x8f.", "EMPTY_SET"),
    "a frozen set": (b"\x80\x04(\x91.", "FROZENSET"),
    "a dict of an odd number": (b"\x80\x02(NNNd.", "x.ckpt"),
    "text that is called": (b"\x80\x02" + text("x") + b")R.", "x.ckpt"),
    "text that is made": (b"\x80\x02" + text("x") + b")\x81.", "x.ckpt"),
    "a type that is made": (b"\x80\x02cbuiltins\nlist\n)\x81.", "x.ckpt"),
    "a type that is called": (b"\x80\x02cbuiltins\nlist\n)R.", "x.ckpt"),
    "nothing on the stack": (b"\x80\x02R.", "x.ckpt"),
    "no end": (b"\x80\x02N", "x.ckpt"),
    "no pickle": (b"\xff" * 100, "x.ckpt"),
    "half a number": (b"\x80\x02J\x01", "x.ckpt"),
    "an empty pickle": (b"", "x.ckpt"),
    "escape sequences in a name": (b"\x80\x02cos\n" + ESCAPE.encode() + b"\n.", "os."),
    "escape sequences in a key": (
        b"\x80\x02}" + text(ESCAPE) + b"Ns.",
        "without a state_dict",
    ),
    "half a pair in a key": (b"\x80\x02}" + text("\ud800") + b"Ns.", "without a state_dict"),
    "a long key": (b"\x80\x02}" + text("x" * 1_000_000) + b"Ns.", "without a state_dict"),
    "escape sequences in a stored object": (
        b"\x80\x02" + text(ESCAPE) + b"Q.",
        "unknown kind of stored object",
    ),
    "settings without content": (
        value(b"comegaconf.dictconfig\nDictConfig\n)\x81}b"),
        "x.ckpt",
    ),
    "a tokenizer of no text": (
        value(b"ctokenizers\nTokenizer\n)\x81C\x01\xffb").replace(b"\x80\x02", b"\x80\x03", 1),
        "x.ckpt",
    ),
    "settings that double": (
        value(
            b"}"
            + text("a0") + text("x" * 64) + b"s"
            + b"".join(
                text(f"a{i + 1}") + text(f"${{.a{i}}}${{.a{i}}}") + b"s" for i in range(31)
            )
        ),
        "config",
    ),
    "settings in a ring": (
        value(b"}q\x01" + text("x") + b"h\x01s"),
        "config",
    ),
    "settings deep in lists": (value(b"]" * 90_000 + b"a" * 89_999), "x.ckpt"),
    "settings of long text many times": (
        value(b"]" + text("x" * 100_000) + b"q\x020" + b"h\x02a" * 100_000),
        "config",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"), cases(BOMBS, ["many lists", "many marks", "doubled dicts"])
)
def test_a_bomb_of_a_pickle_is_refused(data, message):
    path = archive(data)
    refused(lambda: read_checkpoint(path), "x.ckpt", message)


SIX = b"K\x02K\x03\x86"
TENSORS = {
    "strides of 0": ({"size": SIX, "stride": b"K\x00K\x00\x86"}, "several places"),
    "a stride of 0": ({"size": b"K\x02K\x02\x86", "stride": b"K\x00K\x01\x86"}, "several places"),
    "strides that overlap": (
        {"size": b"K\x02K\x03\x86", "stride": b"K\x01K\x01\x86"},
        "several places",
    ),
    "2^80 numbers": (
        {"size": long(1 << 40) * 2 + b"\x86", "stride": b"K\x00K\x00\x86"},
        "several places",
    ),
    "a size of text": ({"size": text("ab"), "stride": b"K\x01K\x01\x86"}, "whole numbers"),
    "a size of floats": ({"size": b"G?\xf0" + bytes(6) + b"\x85"}, "whole numbers"),
    "a size of lists": ({"size": b"]\x85"}, "whole numbers"),
    "an offset of text": ({"offset": text("0")}, "whole numbers"),
    "no size": ({"size": b"N"}, "x.ckpt"),
    "1 000 dimensions": (
        {"size": b"(" + b"K\x01" * 1000 + b"t", "stride": b"(" + b"K\x01" * 1000 + b"t"},
        "whole numbers",
    ),
    "a number of text": ({"numel": text("4")}, "stored object"),
    "2^62 numbers": ({"numel": long(1 << 62)}, "x.ckpt"),
    "-1 numbers": ({"numel": long(-1)}, "x.ckpt"),
    "a key of a tuple": ({"key": b"N\x85"}, "stored object"),
    "a key with escape sequences": ({"key": text(ESCAPE)}, "x.ckpt"),
    "a key that leads out": ({"key": text("../../etc/passwd")}, "x.ckpt"),
    "another storage": ({"kind": "UntypedStorage"}, "torch.UntypedStorage"),
    "no storage": ({"kind": "float32"}, "stored object"),
}


@pytest.mark.parametrize(("parts", "message"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_is_none_is_refused(parts, message):
    records = {"data/0": torch.arange(4.0).numpy().tobytes()}
    path = archive(tensor(**parts), records)
    refused(lambda: read_checkpoint(path), "x.ckpt", message)


# ---- files --------------------------------------------------------------------------------------


def sparse(size: int, begin: bytes, name="x.ckpt") -> str:
    with open(name, "wb") as file:
        file.write(begin)
        file.truncate(size)
    return name


def lying_zip(offset: int, form: str, number: int) -> str:
    """A zip whose central directory has another number at `offset` of its first entry."""
    data = bytearray(Path(archive(b"N.")).read_bytes())
    place = data.index(b"PK\x01\x02") + offset
    data[place : place + struct.calcsize(form)] = struct.pack(form, number)
    Path("x.ckpt").write_bytes(data)
    return "x.ckpt"


def hub(config="{}", weights=None) -> str:
    os.mkdir("x")
    if config is not None:
        with open("x/config.json", "w") as file:
            file.write(config)
    if weights is not None:
        with open("x/model.safetensors", "wb") as file:
            file.write(weights)
    return "x"


def linked(target: str, name: str) -> str:
    hub(None if name == "config.json" else '{"model_type": "bd3lm"}')
    os.symlink(target, f"x/{name}")
    if name == "config.json":
        open("x/model.safetensors", "wb").close()
    return "x"


def fifo(name: str) -> str:
    if "/" in name:
        hub(None if "config" in name else '{"model_type": "bd3lm"}')
        open("x/model.bin", "wb").close()
    os.mkfifo(name)
    return "x" if "/" in name else name


def bound_socket() -> str:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x.ckpt")
    return "x.ckpt"


def to_itself() -> str:
    os.symlink("x.ckpt", "x.ckpt")
    return "x.ckpt"


def safetensors(header: bytes, size: int | None = None) -> str:
    return hub('{"model_type": "bd3lm"}', struct.pack("<Q", size or len(header)) + header)


NONE = b"\x02" + bytes(7) + b"{}"  # safetensors without a tensor
FILES = {
    "a FIFO": (lambda: fifo("x.ckpt"), "regular file"),
    "a socket": (bound_socket, "x.ckpt"),
    "a link to itself": (to_itself, "x.ckpt"),
    "a folder": (lambda: os.mkdir("x.ckpt") or "x.ckpt", "folder"),
    "a sparse pickle of 8 GB": (lambda: sparse(8 << 30, b"\x80\x02"), "x.ckpt"),
    "a sparse zip of 8 GB": (lambda: sparse(8 << 30, b"PK\x03\x04"), "x.ckpt"),
    "a record of 4 GB": (lambda: lying_zip(24, "<I", 0xFFFFFFF0), "x.ckpt"),
    "a record of 4 GB twice": (lambda: lying_zip(20, "<Q", 0xFFFFFFF0FFFFFFF0), "x.ckpt"),
    "a record that begins elsewhere": (lambda: lying_zip(42, "<I", 0xFFFFFF), "x.ckpt"),
    "a locked record": (lambda: lying_zip(8, "<H", 1), "x.ckpt"),
    "another method": (lambda: lying_zip(10, "<H", 99), "x.ckpt"),
    "a config that is endless": (lambda: linked("/dev/zero", "config.json"), "regular file"),
    "weights that are endless": (lambda: linked("/dev/zero", "model.safetensors"), "regular file"),
    "an index that is endless": (
        lambda: linked("/dev/zero", "model.safetensors.index.json"),
        "regular file",
    ),
    "a config of nowhere": (lambda: linked("nowhere", "config.json"), "x"),
    "a config that is a FIFO": (lambda: fifo("x/config.json"), "regular file"),
    "weights that are a FIFO": (lambda: fifo("x/model.safetensors"), "regular file"),
    "a config of 8 GB": (
        lambda: sparse(8 << 30, b"{", hub("{}", b"") + "/config.json") and "x",
        "more than",
    ),
    "a deep config": (lambda: hub("[" * 100_000, b""), "not JSON"),
    "a config of digits": (
        lambda: hub('{"model_type": "bd3lm", "block_size": %s}' % ("9" * 5000), b""),
        "not JSON",
    ),
    "a config of escape sequences": (
        lambda: hub('{"model_type": "\\u001b[2J\\u202e"}', NONE),
        "model_type",
    ),
    "a config of half a pair": (lambda: hub('{"model_type": "\\ud800"}', NONE), "model_type"),
    "a config of lists": (lambda: hub('{"model_type": ["bd3lm"]}', NONE), "model_type"),
    "a length of text": (
        lambda: hub('{"model_type": "bd3lm", "model_length": "x"}', NONE),
        "length of the model",
    ),
    "an algorithm of a list": (
        lambda: hub('{"model_type": "bd3lm", "algo": []}', NONE),
        "algo",
    ),
    "an interval of text": (
        lambda: hub(
            '{"model_type": "bd3lm", "var_min": true, "sampling_eps_min": "x",'
            ' "sampling_eps_max": null}',
            NONE,
        ),
        "sampling_eps",
    ),
    "a header of an exabyte": (lambda: safetensors(b"{}", 1 << 60), "model.safetensors"),
    "a deep header": (lambda: safetensors(b'{"a":' * 100_000), "model.safetensors"),
    "a tensor of 2^60": (
        lambda: safetensors(
            b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'
        ),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize(("make", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_none_is_refused(make, message):
    path = make()
    refused(lambda: read_checkpoint(path), path, message)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/dev/full", "/proc/self/mem", "/dev"])
def test_a_device_is_refused(path):
    refused(lambda: read_checkpoint(path), path)
