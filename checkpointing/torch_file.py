"""Files of torch.save: a zip archive of one pickle, and one uncompressed record for each storage.

Read through `zipfile`, which checks every record's checksum, and `restricted_pickle`, which runs
nothing. Tensors land on the CPU.
"""

import zipfile
from collections.abc import Collection
from typing import Any, BinaryIO

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from checkpointing.bounded_pickle import MOST_BYTES
from checkpointing.restricted_pickle import FAILURES, STORAGES, CheckpointError, unpickle
from utils import atomic_file


class _Archive:
    def __init__(self, file: BinaryIO):
        self.zip = zipfile.ZipFile(file)
        names = self.zip.namelist()
        pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError("it is a TorchScript program; save a state_dict instead")
        if len(pickles) != 1:
            raise CheckpointError("it is a zip file that torch.save did not write (no data.pkl)")
        self.prefix = pickles[0].removesuffix("data.pkl")
        if f"{self.prefix}byteorder" in names and self.record("byteorder", 16) != b"little":
            raise CheckpointError("a big-endian machine wrote it; save it again on another")
        self.storages: dict[tuple, torch.Tensor] = {}

    def record(self, name: str, most: int) -> bytes:
        info = self.zip.getinfo(self.prefix + name)
        if info.file_size > most:
            raise ValueError(f"its {name} has {info.file_size:,} bytes, more than {most:,}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(f"its record {name} is compressed, as torch.save's never are")
        return self.zip.read(info)

    def storage(self, kind: str, key: str, numel: int) -> torch.Tensor:
        """One-dimensional, over the whole storage; the same object whenever it is asked for."""
        dtype = STORAGES[kind]
        if (key, dtype) not in self.storages:
            data = bytearray(self.record(f"data/{key}", numel * dtype.itemsize))
            if len(data) != numel * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(data)} bytes, not {numel} of {dtype}")
            empty = torch.empty(0, dtype=dtype)
            self.storages[key, dtype] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self.storages[key, dtype]

    def describe(self, kind: str, key: str, numel: int) -> torch.Tensor:
        """The same without its numbers."""
        return torch.empty(numel, dtype=STORAGES[kind], device="meta")


def load(
    file: BinaryIO, name: str, *, described: Collection[str] = (), numbers: bool = True
) -> Any:
    """What torch.save wrote to `file`, in plain containers; `name` is for the messages.

    Of the top-level keys `described`, or of all without `numbers`, no tensor is read: theirs are on
    the meta device. CheckpointError where it is another file, is damaged, or its pickle is refused.
    """
    start = file.read(4)
    file.seek(0)
    if not start:
        raise CheckpointError(f"{name} is empty (0 bytes); copy or download it again")
    if not start.startswith(b"PK"):
        raise CheckpointError(
            f"{name} is no checkpoint: it does not start like a torch zip file. If a torch before"
            " 1.6 wrote it, torch.load it where you trust it and torch.save it again"
        )
    try:
        archive = _Archive(file)
        data = archive.record("data.pkl", MOST_BYTES)
        read = archive.storage if numbers else archive.describe
        return unpickle(data, read, describe=archive.describe, described=described)
    except CheckpointError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from None
    except (zipfile.BadZipFile, *FAILURES) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}, "
        raise CheckpointError(
            f"{name} is damaged or was cut short ({kind}{error}); copy or download it again"
        ) from error


def save(checkpoint: dict, path: str) -> None:
    """torch.save under a temporary name, then a rename: `path` is never half a file.

    One process at a time writes to a path: what a killed one has left is removed first.
    """
    fs, target = url_to_fs(path)
    if isinstance(fs, LocalFileSystem):
        with atomic_file(target, "wb", alone=True) as file:
            torch.save(checkpoint, file)
        return
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    partial = f"{target}.partial"
    with fs.open(partial, "wb") as file:
        torch.save(checkpoint, file)
    fs.mv(partial, target)
