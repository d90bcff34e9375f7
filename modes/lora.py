"""lora.*: adapters on a network that begins with the weights of training.from_pretrained."""

import dataclasses
from pathlib import Path

import torch

from checkpointing.checkpoint import Checkpoint, section
from checkpointing.load import load_pretrained
from checkpointing.restricted_pickle import CheckpointError
from checkpointing.vocabulary import has_words
from data.tokenizer import Tokenizer
from models.lora import Adapter, adapt
from models.network import Network
from modes.build import read_weights
from objectives.algorithms import get_algorithm
from settings import Config
from training.optimizers import trained
from utils import say


def build_adapter(config: Config, tokenizer: Tokenizer) -> Adapter | None:
    """None: all weights are trained."""
    lora = config.lora
    if lora.rank is None:
        return None
    masks = lora.mask_row and not get_algorithm(config.algo.name).causal
    return Adapter(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        modules=None if lora.modules is None else tuple(lora.modules),
        mask_id=tokenizer.mask_id if masks else None,
    )


def start_adapter(
    config: Config,
    backbone: Network,
    adapter: Adapter,
    pretrained: Checkpoint | None,
    resume: Checkpoint | None,
    tokenizer: Tokenizer,
) -> dict:
    """Gives the network its adapters, on top of the base's weights where the run begins; where it
    goes on, the checkpoint has all of them. Returns what checkpoints say about it."""
    if resume is None:
        _take_base(config, backbone, pretrained)
        base = {"source": pretrained.source, "fingerprint": pretrained.fingerprint}
    else:
        base = section(section(section(resume.raw, "hyper_parameters"), "lora"), "base")
        _check_base(config, base, tokenizer)
    say(put_adapters(backbone, adapter))
    return {**dataclasses.asdict(adapter), "base": base}


def put_adapters(backbone: Network, adapter: Adapter) -> str:
    """Into the network; what there is to say."""
    adapt(backbone, adapter)
    own = sum(p.numel() for _, p in trained(backbone))
    every = sum(p.numel() for p in backbone.parameters())
    return f"LoRA of rank {adapter.rank}: {own:,} of {every:,} parameters are trained"


def _take_base(config: Config, backbone: Network, base: Checkpoint) -> None:
    """The averaged weights, where the base has them: they are what it is evaluated by."""
    taken = load_pretrained(backbone, base, algo=config.algo.name)
    new = [name for name in taken.new_keys if name.startswith("backbone.")]
    if new:
        raise CheckpointError(
            f"{base.source} lacks {new[0]} and {len(new)} weights in all, which algo="
            f"{config.algo.name} adds and adapters do not train: set lora.rank=null"
        )
    if taken.ema is not None:
        with torch.no_grad():
            for name, p in backbone.named_parameters():
                p.copy_(taken.ema[name])
    say(f"starting from the weights of {base.source}")


def _check_base(config: Config, base: dict, tokenizer: Tokenizer) -> None:
    """CheckpointError where training.from_pretrained has other weights than when the run began."""
    start = config.training.from_pretrained
    place = Path(start)
    gone = not place.exists() or (has_words(place) and not (place / "config.json").exists())
    if not base or gone:  # of a hub id, or a tokenizer alone, the checkpoint is enough
        return
    if read_weights(config, start, tokenizer).fingerprint != base.get("fingerprint"):
        raise CheckpointError(
            f"training.from_pretrained={start} has other weights than when this run began: put"
            " those back, or begin anew in another checkpointing.save_dir"
        )
