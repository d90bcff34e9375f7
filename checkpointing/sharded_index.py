"""index.json of a checkpoint in parts: which tensors it holds, how each is cut, and where the bytes
of a part lie.

torch.distributed.checkpoint keeps the same in `.metadata`, which is a pickle and grows with the
number of ranks. That file is written too, for torch's own tools, and never read here.

Whoever reads a checkpoint asks here whether it is in parts. So torch.distributed.checkpoint, which
takes half a second to import, is imported where it is needed.
"""

import json
import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpointing.restricted_pickle import MOST_DIMENSIONS, STORAGES, CheckpointError
from utils import atomic_file, read_json, reason

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

NAME = "index.json"
STATE = "state.ckpt"  # beside it: all of the checkpoint that is no tensor
VERSION = 1
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
LARGEST = 1 << 62


@dataclass(frozen=True)
class Part:
    """Of a tensor: where it begins in it and its size; the file, its first byte there, and how many
    bytes it takes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    dtype: torch.dtype
    size: tuple[int, ...]
    parts: tuple[Part, ...]


def is_in_parts(path: str | Path) -> bool:
    """Whether a checkpoint in parts lies there, or what is left of one."""
    folder = Path(path)
    marks = (NAME, STATE, ".metadata", "__0_0.distcp")
    return "://" not in str(path) and any((folder / name).is_file() for name in marks)


def write_index(folder: Path, metadata: "Metadata") -> None:
    """From what torch.distributed.checkpoint knows once all ranks have written."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    tensors = {}
    for name, about in metadata.state_dict_metadata.items():
        parts = []
        for chunk in about.chunks:
            where = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            place = (where.relative_path, where.offset, where.length)
            parts.append([list(chunk.offsets), list(chunk.sizes), *place])
        dtype = str(about.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(about.size), "parts": parts}
    with atomic_file(folder / NAME) as file:
        json.dump({"version": VERSION, "tensors": tensors}, file)


def read_index(folder: Path) -> dict[str, Entry]:
    """{name: what is known of it}. CheckpointError where a part is missing, is shorter than it was,
    or belongs nowhere."""
    path = folder / NAME
    try:
        index = read_json(path)
        if not isinstance(index, dict) or index.get("version") != VERSION:
            raise ValueError(f"{path} is no index of version {VERSION}")
        entries = {name: _entry(name, each) for name, each in index["tensors"].items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no whole checkpoint in parts: it has no {NAME}; copy it again"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} cannot be read: its {NAME} is damaged ({reason(error)}); copy it again"
        ) from error
    _check_files(folder, entries)
    return entries


def metadata_of(entries: dict[str, Entry]) -> "Metadata":
    """What torch.distributed.checkpoint plans a reading by."""
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors, places = {}, {}
    for name, entry in entries.items():
        chunks = []
        for part in entry.parts:
            offsets = torch.Size(part.offsets)
            chunks.append(metadata.ChunkStorageMetadata(offsets, torch.Size(part.sizes)))
            where = _StorageInfo(part.file, part.start, part.length)
            places[metadata.MetadataIndex(name, offsets)] = where
        kind = metadata.TensorProperties(dtype=entry.dtype)
        tensors[name] = metadata.TensorStorageMetadata(kind, torch.Size(entry.size), chunks)
    return metadata.Metadata(tensors, storage_data=places)


def _entry(name: str, told: dict) -> Entry:
    size = _numbers(told["size"])
    parts = []
    for offsets, sizes, file, start, length in told["parts"]:
        if not isinstance(file, str) or re.fullmatch(r"__\d+_\d+\.distcp", file) is None:
            raise ValueError(f"it names the file {reprlib.repr(file)}")
        place = _numbers([start, length])
        parts.append(Part(_numbers(offsets), _numbers(sizes), file, *place))
    entry = Entry(DTYPES[told["dtype"]], size, tuple(parts))
    if not _covered(entry):
        raise ValueError(f"the parts of {name} are not all of it")
    for part in parts:
        if part.length < math.prod(part.sizes) * entry.dtype.itemsize:
            raise ValueError(f"a part of {name} is too short for its numbers")
    return entry


def _numbers(found: list) -> tuple[int, ...]:
    if not isinstance(found, list) or len(found) > MOST_DIMENSIONS:
        raise ValueError(f"{reprlib.repr(found)} is no list of sizes")
    if not all(type(number) is int and 0 <= number < LARGEST for number in found):
        raise ValueError(f"{reprlib.repr(found)} are no whole numbers")
    return tuple(found)


def _covered(entry: Entry) -> bool:
    """Whether the parts, cut along one dimension, are the tensor: none missing, none twice."""
    rank = len(entry.size)
    parts = [part for part in entry.parts if math.prod(part.sizes)]
    if any((len(part.offsets), len(part.sizes)) != (rank, rank) for part in parts):
        return False
    if math.prod(entry.size) == 0:
        return not parts
    cut = {d for part in parts for d in range(rank) if part.sizes[d] != entry.size[d]}
    if len(cut) > 1 or not parts:
        return False
    along = cut.pop() if cut else None
    if any(part.offsets[d] for part in parts for d in range(rank) if d != along):
        return False
    if along is None:
        return len(parts) == 1
    end = 0
    for part in sorted(parts, key=lambda part: part.offsets[along]):
        if part.offsets[along] != end:
            return False
        end += part.sizes[along]
    return end == entry.size[along]


def _check_files(folder: Path, entries: dict[str, Entry]) -> None:
    ends: dict[str, int] = {}
    for entry in entries.values():
        for part in entry.parts:
            ends[part.file] = max(ends.get(part.file, 0), part.start + part.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is not whole: {name} is missing ({len(ends)} files belong to it); copy"
                " it again"
            )
        if (size := path.stat().st_size) < end:
            raise CheckpointError(
                f"{folder} is not whole: {name} was cut short ({size:,} of {end:,} bytes); copy it"
                " again"
            )
