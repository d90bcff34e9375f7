"""How Lightning reads and writes checkpoints here: whole files only, and nothing in them is run."""

import os
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch.plugins.io import CheckpointIO

from checkpointing import torch_file
from checkpointing.layouts import CheckpointError, canonical


class SafeCheckpointIO(CheckpointIO):
    """Writes to a temporary name and renames: killed at any byte, the last good file is there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO has no storage_options; use an fsspec URL")
        torch_file.save(checkpoint, os.fspath(path))

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        """Everything in plain containers, on the CPU, whatever Lightning asks of other readers."""
        fs, source = url_to_fs(os.fspath(path))
        if not fs.exists(source):
            raise CheckpointError(f"checkpoint {path} does not exist")
        with fs.open(source, "rb") as file:
            raw = canonical(torch_file.load(file, str(path)), str(path))
        raw["lr_schedulers"] = [_as_lambda_lr(s, raw) for s in raw.get("lr_schedulers", [])]
        return raw

    def remove_checkpoint(self, path) -> None:
        fs, target = url_to_fs(os.fspath(path))
        if fs.exists(target):
            fs.rm(target, recursive=True)


def _as_lambda_lr(state: dict, raw: dict) -> dict:
    """State of the authors' cosine schedule (timm's, which keeps no step count) for a LambdaLR."""
    if "lr_lambdas" in state or "base_values" not in state:
        return state
    step = raw["global_step"]
    return {
        "base_lrs": list(state["base_values"]),
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [group["lr"] for group in raw["optimizer_states"][0]["param_groups"]],
        "lr_lambdas": [{} for _ in state["base_values"]],
    }
