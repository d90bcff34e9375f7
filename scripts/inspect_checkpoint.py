"""Say what is inside a checkpoint: layout, algorithm, sizes, steps, average, interval, keys.

    python scripts/inspect_checkpoint.py PATH [--keys] [--config]

PATH: a .ckpt file, a hub folder, an fsspec URL or a hub id. Nothing in the file is run.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from checkpointing.checkpoint import Checkpoint, section
from checkpointing.layouts import BUFFERS, read_checkpoint
from checkpointing.load import build_backbone_args
from checkpointing.restricted_pickle import CheckpointError
from scripts.support.command import answered, new_parser
from utils import escaped, listed

LAYOUTS = {
    "lightning": "Lightning checkpoint",
    "hub": "hub folder",
    "transformers": "model of transformers",
}


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("path", metavar="PATH", help="file, folder, fsspec URL or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--keys", action="store_true", help="list every tensor")
    parser.add_argument("--config", action="store_true", help="print the configuration as JSON")
    options = parser.parse_args(arguments)
    return answered("inspect_checkpoint", lambda: inspect(options))


def inspect(options: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(options.path, revision=options.revision)
    for name, value in facts(checkpoint).items():
        print(f"{name:<18}{escaped(value)}")
    if options.keys:
        prefix = "" if checkpoint.layout == "transformers" else "backbone."
        tensors = {f"{prefix}{name}": value for name, value in checkpoint.weights.items()}
        for name, value in {**tensors, **checkpoint.foreign}.items():
            dtype = str(value.dtype).removeprefix("torch.")
            print(f"  {escaped(name):<56}{dtype:<10}{list(value.shape)}")
    if options.config:
        print(json.dumps(checkpoint.config, indent=2, default=str))


def facts(checkpoint: Checkpoint) -> dict[str, str]:
    """{what: its value}, one line each."""
    weights = [value for name, value in checkpoint.weights.items() if name not in BUFFERS]
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in weights})
    trained, interval = "not stored", "none"
    if checkpoint.layout != "lightning":
        trained = "not stored (hub folders hold the network only)"
    elif data := section(checkpoint.config, "data"):
        trained = f"{data.get('train')}, tokenizer {data.get('tokenizer_name_or_path')}"
    if checkpoint.interval is not None:
        interval = "{:.6g} to {:.6g} (sampling_eps_min/max)".format(*checkpoint.interval)
    merged = {}
    if lora := section(section(checkpoint.raw, "hyper_parameters"), "lora"):
        base = section(lora, "base").get("source")
        merged["adapters"] = (
            f"merged here: rank {lora.get('rank')}, alpha {lora.get('alpha')}, of {base}"
        )
    return {
        "source": checkpoint.source,
        "layout": LAYOUTS[checkpoint.layout],
        "algorithm": " or ".join(checkpoint.algorithms),
        "block size": block_size(checkpoint),
        "trained length": str(checkpoint.length or "not stored"),
        "network": network(checkpoint),
        "parameters": f"{sum(value.numel() for value in weights):,} ({', '.join(dtypes)})",
        **merged,
        "finite": finite(checkpoint),
        "optimizer steps": "not stored" if checkpoint.step is None else f"{checkpoint.step:,}",
        "trained on": trained,
        "average (EMA)": average(checkpoint),
        "clipped interval": interval,
        "other contents": ", ".join(k for k in checkpoint.raw if k != "state_dict") or "none",
        "keys": f"{len(checkpoint.weights)} of the network"
        + (f", {len(checkpoint.foreign)} of nobody" if checkpoint.foreign else ""),
    }


def block_size(checkpoint: Checkpoint) -> str:
    trained = checkpoint.block_sizes
    several = f" (trained at {listed(trained)})" if len(trained) > 1 else ""
    return str(checkpoint.block_size or "not stored") + several


def network(checkpoint: Checkpoint) -> str:
    try:
        sizes = build_backbone_args(checkpoint)
    except CheckpointError as error:
        return f"unknown: {error}"
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def finite(checkpoint: Checkpoint) -> str:
    averages = {f"EMA of {name}": value for name, value in (checkpoint.ema or {}).items()}
    tensors = checkpoint.weights | averages
    odd = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    return f"NO: {', '.join(odd[:10])}" if odd else "all weights"


def average(checkpoint: Checkpoint) -> str:
    if checkpoint.layout == "transformers":
        return "none (a model of transformers)"
    if checkpoint.layout == "hub":
        return "the weights are averages already"
    if checkpoint.ema_problem:
        return f"broken: {checkpoint.ema_problem}"
    if checkpoint.ema is None:
        return "none"
    ema, weights = checkpoint.ema, checkpoint.weights
    far = math.hypot(*((weights[name].double() - each).norm() for name, each in ema.items()))
    return (
        f"decay {checkpoint.ema_decay}, {checkpoint.ema_updates:,} updates, {len(ema)} tensors, at"
        f" distance {far:.4g} from the weights"
    )


if __name__ == "__main__":
    sys.exit(main())
