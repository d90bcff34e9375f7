"""Checkpoints in parts, by torch.distributed.checkpoint: a folder to which every rank writes what
it holds.

    index.json        which tensors there are, and where their parts lie (sharded_index.py)
    state.ckpt        all else of the published layout, with None where a tensor was
    __0_0.distcp …    the parts, a file of each rank
    .metadata         the index once more, for torch's own tools; never read here
    link              where the folder is there for a link: its name (replacing.py)

Put together, it is the file that checkpointing.format=file writes, key for key.
"""

import io
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from checkpointing import sharded_index, torch_file
from checkpointing.replacing import put, unfinished
from checkpointing.restricted_pickle import CheckpointError
from checkpointing.sharded_index import STATE
from utils import reason

SECTIONS = ("state_dict", "ema", "optimizer_states")  # of a checkpoint; their tensors are the parts


@dataclass
class Parts:
    """A checkpoint taken apart.

    `state`: without its tensors; `places`: {name: the keys that lead to it}; `tensors`: those that
    this rank writes, whole or cut (DTensor).
    """

    state: dict
    places: dict[str, list]
    tensors: dict[str, Tensor]


def name_of(*keys: str | int) -> str:
    return "/".join(map(str, keys))


def take_apart(
    checkpoint: dict, rank: int = 0, ranks: int = 1, *, before: Parts | None = None
) -> Parts:
    """Copies on the host, which training no longer changes. Of what all ranks hold alike, each
    copies its share. before: of an earlier step; its memory is used again, because fresh memory
    takes several times as long to fill."""
    found: dict[tuple, Tensor] = {}
    state = {
        key: _without_tensors(value, (key,), found if key in SECTIONS else None)
        for key, value in checkpoint.items()
    }
    alike = [keys for keys, tensor in found.items() if not isinstance(tensor, DTensor)]
    alike.sort(key=lambda keys: -found[keys].nbytes)
    others = {keys for number, keys in enumerate(alike) if number % ranks != rank}
    kept = {} if before is None else before.tensors
    tensors = {
        name: _copied(tensor, kept.get(name))
        for name, tensor in ((name_of(*k), t) for k, t in found.items() if k not in others)
    }
    return Parts(state, {name_of(*keys): list(keys) for keys in found}, tensors)


def _copied(tensor: Tensor, into: Tensor | None) -> Tensor:
    """On the host; in the memory of a copy that is no longer needed, where there is one."""
    if into is None or (into.shape, into.dtype) != (tensor.shape, tensor.dtype):
        return tensor.detach().to("cpu", copy=True)
    cut = isinstance(tensor, DTensor)
    (into.to_local() if cut else into).copy_(tensor.to_local() if cut else tensor)
    return into


def _without_tensors(value: Any, keys: tuple, found: dict[tuple, Tensor] | None) -> Any:
    """A copy. found: takes the tensors that are more than one number; None: they are copied."""
    if isinstance(value, Tensor) and value.dim() and found is not None:
        found[keys] = value
        return None
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        made = OrderedDict() if isinstance(value, OrderedDict) else {}
        made.update((k, _without_tensors(v, (*keys, k), found)) for k, v in value.items())
        return made
    if isinstance(value, list | tuple):
        made = [_without_tensors(item, (*keys, i), found) for i, item in enumerate(value)]
        return made if isinstance(value, list) else tuple(made)
    return value


class _Writer(dcp.FileSystemWriter):
    """Once all ranks have written, the first one gives the folder its name."""

    def __init__(self, partial: Path, path: Path, parts: Parts):
        super().__init__(partial, per_thread_copy_ahead=0)  # all is on the host: leave GPUs alone
        self.target, self.parts = path, parts

    def storage_meta(self) -> None:
        """torch would keep the path of this machine."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch's writer hides the OSError of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        sharded_index.write_index(self.path, metadata)
        rest = {"checkpoint": self.parts.state, "places": self.parts.places}
        torch_file.save(rest, str(self.path / STATE))
        put(self.path, self.target, self.parts.state["global_step"])


def write(parts: Parts, path: str, *, group, token: str) -> None:
    """The folder `path`, which appears whole or not at all. OSError or RuntimeError, on all ranks,
    where one of them could not write.

    group: of gloo, over all ranks, that nobody else uses meanwhile; None: of one process. token:
    the same on all ranks, and another in each run, so that nobody who is left of a run that was
    killed writes to the same files.
    """
    target = Path(path)
    partial = target.with_name(unfinished(target.name, token))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _expect_one_process()
    try:
        dcp.save(
            parts.tensors,
            storage_writer=_Writer(partial, target, parts),
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _first(error) from None


class Sharded:
    """A folder that is whole as far as names and sizes say. `checkpoint`: all of it, its tensors on
    the meta device until `load`. CheckpointError where it is damaged."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()  # a link may soon lead elsewhere
        self.entries = sharded_index.read_index(self.folder)
        rest = _read_file(self.folder / STATE)
        try:
            self.checkpoint, self.places = rest["checkpoint"], rest["places"]
            if self.places.keys() != self.entries.keys():
                raise ValueError(f"{STATE} and {sharded_index.NAME} name other tensors")
            for name, entry in self.entries.items():
                self._put(name, torch.empty(entry.size, dtype=entry.dtype, device="meta"))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(error) from error

    def load(self, targets: dict[str, Tensor]) -> None:
        """Read numbers into these tensors, which take their places in `checkpoint`. Of a DTensor
        this rank's part is read. No other rank is asked."""
        _expect_one_process()
        try:
            dcp.load(
                dict(targets),
                storage_reader=_Reader(self.folder, self.entries),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
        except CheckpointException as error:
            first = _first(error)
            known = isinstance(first, CheckpointError | OSError | MemoryError)
            raise first if known else self._damaged(first) from first
        for name, tensor in targets.items():
            self._put(name, tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        *before, last = self.places[name]
        node = self.checkpoint
        for key in before:
            node = node[key]
        node[last] = tensor

    def _damaged(self, error: BaseException) -> CheckpointError:
        return CheckpointError(f"{self.folder} is damaged ({reason(error)}); copy it again")


def read(folder: str | Path, sections: Collection[str] = SECTIONS) -> dict:
    """As torch_file.load would give the file; tensors outside of `sections` on the meta device."""
    stored = Sharded(folder)
    stored.load(
        {
            name: torch.empty(entry.size, dtype=entry.dtype)
            for name, entry in stored.entries.items()
            if name.partition("/")[0] in sections
        }
    )
    return stored.checkpoint


class _Reader(dcp.FileSystemReader):
    """torch's, which unpickles nothing: the index is there, and parts are read by torch_file."""

    def __init__(self, folder: Path, entries: dict[str, sharded_index.Entry]):
        super().__init__(folder)
        self.entries = entries

    def read_metadata(self, *args, **kwargs):
        return sharded_index.metadata_of(self.entries)

    def read_data(self, plan, planner):
        for item in sorted(plan.items, key=lambda item: self._where(item)):
            tensor = self._part(item.storage_index)
            for dim, (begin, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                tensor = tensor.narrow(dim, begin, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done = Future()
        done.set_result(None)
        return done

    def _where(self, item) -> tuple[str, int]:
        place = self.storage_data[item.storage_index]
        return place.relative_path, place.offset

    def _part(self, index) -> Tensor:
        place, entry = self.storage_data[index], self.entries[index.fqn]
        path = self.path / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        tensor = torch_file.load(data, str(path))
        sizes = next(p.sizes for p in entry.parts if p.offsets == tuple(index.offset))
        if not isinstance(tensor, Tensor) or (tensor.dtype, *tensor.shape) != (entry.dtype, *sizes):
            raise CheckpointError(f"{path} is damaged: it holds another part of {index.fqn}")
        return tensor


def _read_file(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            return torch_file.load(file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path.parent} is not whole: {reason(error)}") from error


def _first(error: CheckpointException) -> BaseException:
    """What one of the ranks met."""
    return error.failures[min(error.failures)][0]


def _expect_one_process() -> None:
    """Keep torch from warning that a process reads, or a single one writes, without the others."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
