"""A checkpoint is data: whatever its pickle names or calls, nothing of it runs."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load, load_json

from checkpointing import restricted_pickle, torch_file
from checkpointing.bounded_pickle import BoundedUnpickler
from checkpointing.layouts import CheckpointError, read_checkpoint
from training.checkpoint_io.files import SafeCheckpointIO

MANIFEST = load_json("manifest.json")
NAMES = [entry["name"] for entry in MANIFEST["checkpoints"]]


def archive(data: bytes, records=(), compression=zipfile.ZIP_STORED) -> io.BytesIO:
    """A torch zip file around the pickle `data`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("archive/data.pkl", data)
        for name, content in dict(records).items():
            out.writestr(f"archive/{name}", content)
    file.seek(0)
    return file


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


class Trap:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def traps(marker):
    """{kind: (pickle, the name that must be quoted)}; each would create `marker` if it ran."""
    shell = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    reduce = lambda function, *arguments: pickle.dumps(  # noqa: E731
        {"state_dict": {}, "hyper_parameters": {"config": Trap(function, *arguments)}}, 2
    )
    return {
        "os.system": (reduce(os.system, shell), "posix.system"),
        "eval": (reduce(eval, code), "__builtin__.eval"),
        "exec": (reduce(exec, code), "__builtin__.exec"),
        "open": (reduce(open, str(marker), "w"), "io.open"),
        "getattr": (
            b"\x80\x02c__builtin__\ngetattr\n(cos\n__dict__\n" + text("x") + b"tR.",
            "__builtin__.getattr",
        ),
        "Popen": (reduce(subprocess.Popen, ["touch", str(marker)]), "commands.Popen"),
        "stack global": (pickle.dumps(Trap(os.system, shell), 4), "posix.system"),
        "opcode INST": (b"(" + text(shell) + b"ios\nsystem\n.", "os.system"),
        "opcode OBJ": (b"(cos\nsystem\n" + text(shell) + b"o.", "os.system"),
        "opcode NEWOBJ": (
            b"\x80\x02csubprocess\nPopen\n]"
            + text("touch")
            + b"a"
            + text(str(marker))
            + b"a\x85\x81.",
            "subprocess.Popen",
        ),
        "opcode BUILD": (b"\x80\x02ctypes\nSimpleNamespace\n)R}b.", "types.SimpleNamespace"),
        "dotted name": (
            b"\x80\x04"
            + text("torch")
            + text("serialization.os.system")
            + b"\x93"
            + text(shell)
            + b"\x85R.",
            "torch.serialization.os.system",
        ),
        "attribute of an allowed name": (
            b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
            "torch._utils._rebuild_tensor_v2.__globals__",
        ),
        "torch function": (
            b"\x80\x02ctorch\nload\n" + text(str(marker)) + b"\x85R.",
            "torch.load",
        ),
        "omegaconf function": (
            b"\x80\x02comegaconf\nOmegaConf.register_new_resolver\n)R.",
            "omegaconf.OmegaConf.register_new_resolver",
        ),
        "transformers function": (
            b"\x80\x02ctransformers\npipeline\n)R.",
            "transformers.pipeline",
        ),
        "module of ours": (
            b"\x80\x02ccheckpointing.restricted_pickle\npickle.loads\n" + text("x") + b"\x85R.",
            "checkpointing.restricted_pickle.pickle.loads",
        ),
        "nested pickle": (
            b"\x80\x02c_pickle\nloads\n" + text("x") + b"\x85R.",
            "_pickle.loads",
        ),
        "extension code": (b"\x80\x02\x82\x01.", "EXT1"),
        "numpy": (b"\x80\x02cnumpy\nfromfile\n" + text("x") + b"\x85R.", "numpy.fromfile"),
    }


KINDS = list(traps("x"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_booby_trapped_pickle_is_refused_by_name_and_nothing_runs(kind, tmp_path):
    marker = tmp_path / "it-ran"
    data, name = traps(marker)[kind]
    path = tmp_path / "trap.ckpt"
    path.write_bytes(archive(data).getvalue())
    for reader in (read_checkpoint, SafeCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            reader(path)
        assert name in str(caught.value)
        assert "trap.ckpt" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "weights.ckpt"])
def test_a_trap_among_the_weights_of_a_folder_does_not_run_either(file, tmp_path):
    marker = tmp_path / "it-ran"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bd3lm"}))
    (tmp_path / file).write_bytes(archive(traps(marker)["os.system"][0]).getvalue())
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read_checkpoint(tmp_path if file == "pytorch_model.bin" else tmp_path / file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        # BUILD with a slot state sets attributes: on a stand-in's class, on a function, on a type
        b"\x80\x02comegaconf.dictconfig\nDictConfig\nN}" + text("origin") + text("x") + b"s\x86b.",
        b"\x80\x02c_codecs\nencode\nN}" + text("parts") + text("x") + b"s\x86b.",
        b"\x80\x02c_codecs\nencode\n}" + text("parts") + text("x") + b"sb.",
        b"\x80\x02ccollections\nOrderedDict\nN}" + text("items") + text("x") + b"s\x86b.",
        b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81" + text("a") + text("b") + b"s.",
        b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81)R.",
    ],
)
def test_a_pickle_cannot_change_what_it_is_handed(data):
    before = (
        dict(vars(restricted_pickle.Inert)),
        dict(restricted_pickle.FUNCTIONS),
        dict(vars(OrderedDict)),
    )
    with pytest.raises(CheckpointError, match="damaged"):
        torch_file.load(archive(data), "x")
    assert before == (
        dict(vars(restricted_pickle.Inert)),
        dict(restricted_pickle.FUNCTIONS),
        dict(vars(OrderedDict)),
    )


def stored(numel=4, key="0", size=(4,), stride=(1,), offset=0):
    """A pickle of one float32 tensor, written by hand."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, key, "cuda:3", numel)
            return None

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = (Storage(), offset, size, stride, False, OrderedDict())
        Pickler(file, 2).dump(Trap(torch._utils._rebuild_tensor_v2, *arguments))
    return file.getvalue()


FOUR = torch.arange(4.0).numpy().tobytes()


def test_a_tensor_is_rebuilt_on_the_cpu_wherever_it_was_saved():
    found = torch_file.load(archive(stored(), {"data/0": FOUR}), "x")
    assert torch.equal(found, torch.arange(4.0))
    assert found.device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "records", "message"),
    [
        ({"numel": 5}, {"data/0": FOUR}, "has 16 bytes, not 5"),
        ({"size": (5,)}, {"data/0": FOUR}, "exceeds its 4 numbers"),
        ({"offset": 1}, {"data/0": FOUR}, "exceeds its 4 numbers"),
        ({"offset": -1}, {"data/0": FOUR}, "exceeds its 4 numbers"),
        ({"stride": (2,)}, {"data/0": FOUR}, "exceeds its 4 numbers"),
        ({"stride": (-1,)}, {"data/0": FOUR}, "exceeds its 4 numbers"),
        ({"stride": ()}, {"data/0": FOUR}, "zip"),
        ({"key": "../0"}, {"data/0": FOUR}, "no item named"),
        ({}, {"data/0": FOUR, "byteorder": "big"}, "big-endian"),
        ({}, {"data/0": FOUR, "constants.pkl": ""}, "TorchScript"),
    ],
)
def test_a_tensor_never_reaches_beyond_its_storage(change, records, message):
    with pytest.raises(CheckpointError, match=message):
        torch_file.load(archive(stored(**change), records), "x")


def test_a_zip_bomb_is_not_inflated():
    packed = archive(stored(), {"data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        torch_file.load(packed, "x")


def test_sharing_strides_dtypes_and_empty_tensors_survive():
    base = torch.arange(12.0).view(3, 4)
    saved = {
        "view": base.t()[1:],
        "base": base,
        "again": base,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        **{
            str(d): torch.tensor([1, 0], dtype=d)
            for d in (torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
        },
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
    }
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    found = torch_file.load(file, "x")
    assert found.pop("dtype") is torch.bfloat16
    assert found.pop("size") == (2, 3)
    for name, value in found.items():
        assert value.dtype == saved[name].dtype
        assert torch.equal(value, saved[name].data)
    assert found["again"] is found["base"]
    assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()


def test_an_omegaconf_config_reads_like_its_container():
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {"a": 1, "b": {"c": [1, 2.5, None, {"d": True}], "e": "${a}"}, "f": None, "g": "x"}
    )
    file = io.BytesIO()
    torch.save({"config": config, "memo": defaultdict(list, {"k": [1]})}, file)
    file.seek(0)
    found = torch_file.load(file, "x")
    assert found == {"config": OmegaConf.to_container(config), "memo": {"k": [1]}}


def test_typed_nodes_and_lists_that_contain_themselves_come_out_plain():
    from omegaconf import IntegerNode, StringNode

    loop = [1]
    loop.append(loop)
    file = io.BytesIO()
    torch.save({"n": IntegerNode(3), "s": StringNode("x"), "loop": loop}, file)
    file.seek(0)
    found = torch_file.load(file, "x")
    assert (found["n"], found["s"]) == (3, "x")
    assert found["loop"][1] is found["loop"]


@pytest.mark.parametrize("name", NAMES)
def test_the_authors_checkpoints_are_read_bit_for_bit(name):
    raw = SafeCheckpointIO().load_checkpoint(GOLDEN / f"checkpoints/{name}.ckpt")
    info = load_json("checkpoints/info.json")[name]
    recorded = load(f"weights/{name}.safetensors")
    assert list(raw["state_dict"]) == info["state_dict_keys"]
    for key, value in raw["state_dict"].items():
        assert value.dtype == recorded[key].dtype
        assert torch.equal(value, recorded[key])
    for key, value in zip(info["ema_order"], raw["ema"]["shadow_params"], strict=True):
        assert torch.equal(value, recorded[f"ema.{key}"])
    assert sorted(raw) == info["top_level_keys"]
    assert (
        raw["optimizer_states"][0]["param_groups"][0]["lr"]
        == (info["optimizer"]["param_groups"][0]["lr"])
    )
    json.dumps(raw["hyper_parameters"])  # plain containers only
    assert raw["hyper_parameters"]["tokenizer"]["class"] == info["hyper_parameters"]["tokenizer"]


def test_reading_needs_neither_omegaconf_nor_transformers_nor_tokenizers():
    """In a process where importing any of the three would fail."""
    path = GOLDEN / "checkpoints" / f"{NAMES[0]}.ckpt"
    code = (
        "import sys\n"
        "for name in ('omegaconf', 'transformers', 'tokenizers'): sys.modules[name] = None\n"
        "from checkpointing import torch_file\n"
        f"raw = torch_file.load(open({str(path)!r}, 'rb'), 'x')\n"
        "print(raw['hyper_parameters']['config']['mode'])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "train", done.stderr


def test_a_reader_that_does_not_say_what_a_state_becomes_changes_nothing():
    with pytest.raises(NotImplementedError):
        BoundedUnpickler(b"}}b.").load()
