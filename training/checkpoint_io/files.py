"""How a checkpoint is written to a file and read, and what happens where it cannot be written."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import CheckpointIO

from checkpointing import replacing, sharded, torch_file
from checkpointing.hub import in_parts
from checkpointing.layouts import canonical
from checkpointing.restricted_pickle import CheckpointError
from utils import plain_errors


class SafeCheckpointIO(CheckpointIO):
    """Writes to a temporary name and renames: killed at any byte, the last good file is there.
    Reads checkpoints in parts as well."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO has no storage_options; use an fsspec URL")
        fs, target = url_to_fs(os.fspath(path))
        local = isinstance(fs, LocalFileSystem)
        with replacing.making_way(Path(target)) if local else nullcontext():
            torch_file.save(checkpoint, os.fspath(path))

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        """Everything in plain containers, on the CPU, whatever Lightning asks of other readers."""
        fs, source = url_to_fs(os.fspath(path))
        if not fs.exists(source):
            raise CheckpointError(f"checkpoint {path} does not exist")
        if in_parts(fs, source):
            raw = sharded.read(source)
        else:
            with fs.open(source, "rb") as file:
                raw = torch_file.load(file, str(path))
        raw = canonical(raw, str(path))
        raw["lr_schedulers"] = [_as_lambda_lr(s, raw) for s in raw.get("lr_schedulers", [])]
        return raw

    def remove_checkpoint(self, path) -> None:
        fs, target = url_to_fs(os.fspath(path))
        if isinstance(fs, LocalFileSystem):
            replacing.remove(Path(target))
        elif fs.exists(target):
            fs.rm(target, recursive=True)


class CarefulIO(SafeCheckpointIO):
    """Prints why a file could not be written and keeps the line in `failure`.

    Only the first rank writes. If it raised an exception, the others would wait for it. So the run
    reads `failure` and decides.
    """

    def __init__(self):
        self.failure: str | None = None
        self.missing: dict[str, str] = {}  # path: the line of a file that was to be written

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        write = partial(super().save_checkpoint, checkpoint, path, storage_options)
        if self.attempt(path, write):
            self.failure = None

    def remove_checkpoint(self, path) -> None:
        self.attempt(path, partial(super().remove_checkpoint, path), "deleted")

    def afterwards(self, act: Callable[[], object]) -> None:
        """On the first rank: do it once what was saved last is on the disk, and only then."""
        if self.failure is None:
            act()

    def wait(self) -> None:
        """Until nothing is being written any more."""

    def attempt(self, path, write: Callable[[], None], done: str = "written") -> bool:
        try:
            with plain_errors(os.fspath(path)):
                write()
        except (OSError, RuntimeError) as error:  # torch's writer hides the OSError of a full disk
            hidden = error.__cause__ if isinstance(error, OSError) else error.__context__
            cause = hidden or error
            why = cause.strerror if isinstance(cause, OSError) else None
            self.failure = (
                f"{path} could not be {done} ({why or f'{type(cause).__name__}: {cause}'});"
                " the checkpoint before it is as it was"
            )
            print(self.failure, file=sys.stderr, flush=True)
            if done == "written":
                self.missing[os.fspath(path)] = self.failure
            return False
        self.missing.pop(os.fspath(path), None)
        return True

    def failed(self, *paths: str) -> str | None:
        """Why the last file could not be written, or else one of these: training may have gone on,
        and another file may have been written since."""
        missing = (self.missing.get(path) for path in paths)
        return self.failure or next(filter(None, missing), None)

    def lost(self) -> list[str]:
        """Of files that no later save replaces: those of best checkpoints."""
        return [line for path, line in self.missing.items() if "/step=" not in path]


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
