"""How Lightning reads and writes checkpoints here: whole files only, and nothing in them is run."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import CheckpointIO

import torch_zip
from checkpoints import CheckpointError, canonical


class SafeCheckpointIO(CheckpointIO):
    """Writes to a temporary name and renames: killed at any byte, the last good file is there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO has no storage_options; use an fsspec URL")
        fs, target = url_to_fs(os.fspath(path))
        if isinstance(fs, LocalFileSystem):
            _save_local(checkpoint, Path(target))
        else:
            _save_remote(checkpoint, fs, target)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        """Everything in plain containers, on the CPU, whatever Lightning asks of other readers."""
        fs, source = url_to_fs(os.fspath(path))
        if not fs.exists(source):
            raise CheckpointError(f"checkpoint {path} does not exist")
        with fs.open(source, "rb") as file:
            raw = torch_zip.load(file, str(path))
        if not isinstance(raw, dict) or not isinstance(raw.get("state_dict"), dict):
            raise CheckpointError(f"{path} has no state_dict: not a checkpoint to resume from")
        return canonical(raw, str(path))

    def remove_checkpoint(self, path) -> None:
        fs, target = url_to_fs(os.fspath(path))
        if fs.exists(target):
            fs.rm(target, recursive=True)


def _save_local(checkpoint, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in target.parent.glob(f".{target.name}.*.partial"):  # of a run that was killed
        left_behind.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    try:
        os.fchmod(handle, 0o666 & ~_umask())
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _save_remote(checkpoint, fs, target: str) -> None:
    """Object stores show a file only when it is complete; others get the rename."""
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    partial = f"{target}.partial"
    with fs.open(partial, "wb") as file:
        torch.save(checkpoint, file)
    fs.mv(partial, target)
