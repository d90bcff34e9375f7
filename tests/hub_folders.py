"""Folders in hub format, made for tests from the recordings."""

import json

import torch
from checkpoint_helpers import BY_ALGO, network, path
from conftest import GOLDEN, load_json
from safetensors.torch import load_file, save_file

from checkpointing.layouts import read_checkpoint
from checkpointing.load import load_into

HUB_FOLDER = GOLDEN / "hf_export"
TENSORS = load_file(HUB_FOLDER / "model.safetensors")
CONFIG = load_json("hf_export/config.json")


def hub_config(algo, **changes):
    """config.json as it is published for the algorithm."""
    if algo == "mdlm":
        kept = ("hidden_dim", "cond_dim", "n_blocks", "n_heads", "vocab_size", "model_length")
        return {"model_type": "mdlm", "dropout": 0.1, **{k: CONFIG[k] for k in kept}} | changes
    switches = {
        "bamdlm": {},
        "sedd": {"cross_attn": False, "time_conditioning": True, "var_min": False},
        "ar": {"cross_attn": False, "causal": True, "adaln": False, "var_min": False},
    }[algo]
    return {**CONFIG, **switches, **changes}


def hub_tensors(algo):
    """The averaged weights, under their published names."""
    checkpoint = read_checkpoint(path(BY_ALGO[algo]))
    return {f"backbone.{k}": v for k, v in {**checkpoint.weights, **checkpoint.ema}.items()}


def put(folder, config, tensors=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder, tensors, ending, save):
    """Two shards and the index that names them."""
    names = sorted(tensors)
    stem, halves = ("model", "pytorch_model")[ending == "bin"], (names[::2], names[1::2])
    weight_map = {}
    for number, half in enumerate(halves, 1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        save({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


LAYOUTS = {
    "one file": lambda folder: save_file(TENSORS, folder / "model.safetensors"),
    "shards": lambda folder: shard(folder, TENSORS, "safetensors", save_file),
    "pickled": lambda folder: torch.save(TENSORS, folder / "pytorch_model.bin"),
    "pickled shards": lambda folder: shard(folder, TENSORS, "bin", torch.save),
}


def same_weights(checkpoint, tensors):
    for name, value in checkpoint.weights.items():
        assert torch.equal(value, tensors[f"backbone.{name}"])
    net = network(checkpoint)
    load_into(net, checkpoint, use_ema=True, algo=checkpoint.algo)
