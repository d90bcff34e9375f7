"""What the tests of checkpoints share."""

from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_json

from checkpointing import torch_file
from checkpointing.layouts import CheckpointError, read_checkpoint
from checkpointing.load import build_backbone_args, load_into
from models.dit import DiT
from models.masks import BlockDiffusion, Causal, Full

MANIFEST = load_json("manifest.json")
NAMES = [entry["name"] for entry in MANIFEST["checkpoints"]]
BY_ALGO = {
    entry["algo"].replace("bd3lm", "bamdlm"): entry["name"] for entry in MANIFEST["checkpoints"]
}
INFO = load_json("checkpoints/info.json")


def path(name):
    return GOLDEN / f"checkpoints/{name}.ckpt"


def network(checkpoint, **changes):
    torch.manual_seed(0)
    return DiT(**{**build_backbone_args(checkpoint), **changes}).eval()


def loaded(name, *, use_ema):
    checkpoint = read_checkpoint(path(name))
    net = network(checkpoint)
    load_into(net, checkpoint, use_ema=use_ema, algo=checkpoint.algo)
    return net, checkpoint


def close(found, recorded):
    scale = recorded.abs().max()
    assert (found - recorded).abs().max() <= 1e-5 * scale


def logits(net, checkpoint, tokens, sigma):
    mask = {
        "bamdlm": BlockDiffusion(checkpoint.block_size),
        "mdlm": Full(),
        "sedd": Full(),
        "ar": Causal(),
    }[checkpoint.algo]
    sigma = None if checkpoint.algo == "ar" else sigma
    with torch.no_grad():
        return net.logits(net.hidden(tokens, sigma, attention_mask=mask), sigma)


def variant(tmp_path, name, change):
    """A copy of a golden checkpoint after `change(raw)`."""
    raw = read_checkpoint(path(name)).raw
    change(raw)
    torch.save(raw, tmp_path / "variant.ckpt")
    return tmp_path / "variant.ckpt"


def renamed(raw, rename):
    raw["state_dict"] = {rename(key): value for key, value in raw["state_dict"].items()}


def unchanged_by(net, action):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        action()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    return str(caught.value)


def recorded_file(name: str, folder) -> str:
    """A recorded checkpoint that says where its tokenizer lies now."""
    with path(name).open("rb") as file:
        raw = torch_file.load(file, name)
    raw["hyper_parameters"]["config"]["data"]["tokenizer_name_or_path"] = str(GOLDEN / "tokenizer")
    target = Path(folder) / f"{name}.ckpt"
    torch.save(raw, target)
    return str(target)
