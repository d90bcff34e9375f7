"""Broken weights of every kind, each with its one message; the network is never touched."""

import io
import json
import shutil
import zipfile

import pytest
import torch
from checkpoint_helpers import BY_ALGO, MANIFEST, network, path
from conftest import GOLDEN, load_json
from safetensors.torch import load_file, save_file

from checkpointing.layouts import CheckpointError, read_checkpoint
from checkpointing.load import build_backbone_args, load_into

CONFIG = load_json("hf_export/config.json")
TENSORS = load_file(GOLDEN / "hf_export" / "model.safetensors")
SOURCE = path(BY_ALGO["bamdlm"])
EMBEDDING = "backbone.vocab_embed.embedding"
WIDTH = MANIFEST["hidden_size"]


def lightning(change):
    """A checkpoint after `change(raw)`, at folder / x.ckpt."""

    def make(folder):
        raw = read_checkpoint(SOURCE).raw
        result = change(raw)
        torch.save(raw if result is None else result, folder / "x.ckpt")
        return folder / "x.ckpt"

    return make


def written(data: bytes, name="x.ckpt"):
    def make(folder):
        (folder / name).write_bytes(data() if callable(data) else data)
        return folder / name

    return make


def hub(change=None, config=CONFIG, weights="model.safetensors"):
    """A hub folder after `change(tensors, folder)`."""

    def make(folder):
        folder = folder / "model"
        folder.mkdir()
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (folder / "config.json").write_text(text)
        tensors = {key: value.clone() for key, value in TENSORS.items()}
        if change is not None:
            change(tensors, folder)
        if weights is not None:
            save_file(tensors, folder / weights)
        return folder

    return make


def index(weight_map, *, keep=True):
    """A sharded folder with one shard and this weight_map."""

    def change(tensors, folder):
        if keep:
            save_file(tensors, folder / "one.safetensors")
        mapping = weight_map(tensors) if callable(weight_map) else weight_map
        (folder / "model.safetensors.index.json").write_text(json.dumps(mapping))

    return hub(change, weights=None)


def state(change):
    return lightning(lambda raw: change(raw["state_dict"]) or None)


def config(change):
    return lightning(lambda raw: change(raw["hyper_parameters"]["config"]) or None)


def swap_halves(state):
    """Two weights of one shape but for the other's name: only the shape of others can tell."""
    first, second = f"{EMBEDDING}", "backbone.output_layer.linear.bias"
    state[first], state[second] = state[second], state[first]


def flipped():
    data = bytearray(SOURCE.read_bytes())
    with zipfile.ZipFile(SOURCE) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + 3000] ^= 1
    return bytes(data)


def other_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.txt", "x")
    return file.getvalue()


def legacy():
    file = io.BytesIO()
    torch.save({"state_dict": {}}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def drop_config(folder):
    shutil.copy(GOLDEN / "hf_export" / "model.safetensors", folder / "model.safetensors")
    return folder / "model.safetensors"


def cut(name):
    data = (GOLDEN / "hf_export" / "model.safetensors").read_bytes()

    def change(tensors, folder):
        (folder / name).write_bytes(data[: len(data) // 2])

    return hub(change, weights=None)


BROKEN = {
    # files
    "empty file": (written(b""), r"empty \(0 bytes\)"),
    "half a file": (
        written(lambda: SOURCE.read_bytes()[: SOURCE.stat().st_size // 2]),
        "damaged or was cut short",
    ),
    "a flipped bit": (written(flipped), "damaged or was cut short .*CRC"),
    "text": (written(b"not a checkpoint at all"), "does not start like a torch zip file"),
    "another zip": (written(other_zip), "torch.save did not write"),
    "a torch file before 1.6": (written(legacy), "torch before 1.6"),
    "a bare tensor": (lightning(lambda raw: torch.zeros(3)), "without a state_dict .*Tensor"),
    "weights alone": (
        lightning(lambda raw: raw["state_dict"]),
        "without a state_dict .it holds sampling_eps_min",
    ),
    "state_dict of another kind": (
        lightning(lambda raw: {**raw, "state_dict": [1, 2]}),
        "without a state_dict",
    ),
    "no such file": (lambda folder: folder / "none.ckpt", "does not exist"),
    "no such id on disk": (lambda folder: folder / "a" / "b", "does not exist"),
    # keys and shapes
    "empty state_dict": (state(lambda s: s.clear()), "not a network of this family"),
    "a missing key": (
        state(lambda s: s.pop("backbone.blocks.1.norm2.weight") is None),
        r"missing from the file \(1\): blocks.1.norm2.weight",
    ),
    "an extra key": (
        state(lambda s: s.update({"backbone.blocks.0.extra": torch.zeros(1)})),
        r"not in the network \(1\): blocks.0.extra",
    ),
    "a key of nobody": (
        state(lambda s: s.update({"noise.sigma": torch.zeros(1)})),
        r"noise.sigma \(outside the backbone\)",
    ),
    "names without backbone.": (
        lightning(
            lambda raw: {
                **raw,
                "state_dict": {
                    k.removeprefix("backbone."): v for k, v in raw["state_dict"].items()
                },
            }
        ),
        "not a network of this family.*It has instead: vocab_embed.embedding",
    ),
    "compiled and plain at once": (
        state(lambda s: s.update({f"_orig_mod.{EMBEDDING}": s[EMBEDDING]})),
        "compiled and plain weights at once",
    ),
    "a transposed weight": (
        state(
            lambda s: s.update(
                {"backbone.blocks.0.mlp.0.weight": s["backbone.blocks.0.mlp.0.weight"].t()}
            )
        ),
        rf"blocks.0.mlp.0.weight \[{WIDTH}, {4 * WIDTH}\] in the file, \[{4 * WIDTH}, {WIDTH}\]",
    ),
    "two weights swapped": (state(swap_halves), "not a network of this family|contradicts itself"),
    "half a vocabulary": (
        state(lambda s: s.update({EMBEDDING: s[EMBEDDING][: len(s[EMBEDDING]) // 2]})),
        "another vocabulary",
    ),
    "a value that is no tensor": (
        state(lambda s: s.update({EMBEDDING: "weights"})),
        f"not tensors in its state_dict: {EMBEDDING}",
    ),
    "whole numbers": (
        state(lambda s: s.update({"backbone.output_layer.linear.bias": torch.zeros(9).long()})),
        "not floating point|of another shape",
    ),
    "NaN": (
        state(lambda s: s["backbone.blocks.1.attn_out.weight"].fill_(torch.nan) is None),
        "NaN or infinite weights: blocks.1.attn_out.weight",
    ),
    "half an interval": (state(lambda s: s.pop("sampling_eps_max") is None), "must be two numbers"),
    # the configuration
    "swapped algorithm": (
        config(lambda c: c["algo"].update(name="sedd")),
        "another algorithm: the file holds sedd weights",
    ),
    "unknown algorithm": (config(lambda c: c["algo"].update(name="gpt")), "trained with algo=gpt"),
    "sizes of another model": (
        config(lambda c: c["model"].update(n_blocks=12)),
        "states n_blocks 12 but weights of",
    ),
    "an empty rotation": (
        state(lambda s: s.update({"backbone.rotary_emb.inv_freq": torch.zeros(0)})),
        "not a network of this family",
    ),
    # the average
    "a short EMA": (
        lightning(lambda raw: raw["ema"]["shadow_params"].clear()),
        r"the EMA has \d+ tensors, the network \d+ parameters",
    ),
    "a shuffled EMA": (
        lightning(lambda raw: raw["ema"]["shadow_params"].reverse()),
        "the EMA does not fit the parameters, first at ",
    ),
    "an EMA of another kind": (
        lightning(lambda raw: {**raw, "ema": raw["ema"]["shadow_params"]}),
        "ema must hold decay, num_updates and shadow_params",
    ),
    "no EMA": (
        lightning(lambda raw: raw.pop("ema") and None),
        "no averaged weights .*eval.disable_ema=true",
    ),
    # hub folders
    "empty folder": (lambda folder: folder, "without config.json .it holds nothing"),
    "config alone": (hub(weights=None), "has config.json but no weights"),
    "weights alone in a folder": (hub(config=None), "a folder without config.json .it holds model"),
    "weights file without config": (drop_config, "needs the config.json"),
    "config cut short": (hub(config='{"model_type": "bd3'), "is not JSON"),
    "config of a list": (hub(config="[1]"), "holds a list, not a JSON object"),
    "another model type": (
        hub(config={**CONFIG, "model_type": "gpt2"}),
        "model_type='gpt2' and architectures=.*; this project reads",
    ),
    "another algo in config": (hub(config={**CONFIG, "algo": "x"}), "algo=x; known"),
    "config of another size": (
        hub(config={**CONFIG, "hidden_dim": 768}),
        "states hidden_size 768 but weights of",
    ),
    "safetensors cut short": (cut("model.safetensors"), "damaged or was cut short"),
    "pickle cut short": (cut("pytorch_model.bin"), "does not start like a torch zip file"),
    "index without a map": (index({"metadata": {}}), "the index has no weight_map"),
    "index to a missing shard": (
        index(lambda t: {"weight_map": dict.fromkeys(t, "two.safetensors")}),
        "names two.safetensors, which is missing",
    ),
    "index out of the folder": (
        index(lambda t: {"weight_map": dict.fromkeys(t, "../one.safetensors")}),
        "a plain file name was expected",
    ),
    "index of fewer keys": (
        index(lambda t: {"weight_map": {EMBEDDING: "one.safetensors"}}),
        "disagree on .* keys",
    ),
    "hub weights with a missing key": (
        hub(lambda tensors, folder: tensors.pop("backbone.blocks.0.norm1.weight")),
        r"missing from the file \(1\): blocks.0.norm1.weight",
    ),
}


def use(source, net, use_ema):
    checkpoint = read_checkpoint(source)
    build_backbone_args(checkpoint)  # algo.backbone=hf_dit takes the sizes from here
    load_into(net, checkpoint, use_ema=use_ema, algo="bamdlm")


@pytest.mark.parametrize("what", BROKEN)
def test_broken_weights_are_refused_with_their_reason(what, tmp_path):
    make, message = BROKEN[what]
    source = make(tmp_path)
    net = network(read_checkpoint(SOURCE))
    before = [value.clone() for value in net.state_dict().values()]
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        use(source, net, "EMA" in what)
    assert source.name in str(caught.value)
    after = net.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_there_are_at_least_thirty_of_them():
    assert len(BROKEN) >= 30
