"""What a checkpoint holds, whatever file or folder it was read from."""

import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from checkpointing.restricted_pickle import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """What a file or folder holds. The `weights` of a hub folder are averages; it has no `ema`."""

    source: str
    layout: str  # "lightning", "hub" or "transformers"
    algorithms: tuple[str, ...]  # which runs it fits: several where it does not say, or N = 1
    config: dict  # the run's configuration (lightning) or config.json (hub); {} if there is none
    weights: dict[str, Tensor]
    foreign: dict[str, Tensor] = field(default_factory=dict)  # keys no network of ours has
    ema: dict[str, Tensor] | None = None
    ema_problem: str | None = None  # why `ema` is empty
    ema_decay: float | None = None
    ema_updates: int = 0
    interval: tuple[float, float] | None = None  # the clipped schedule, if it was saved
    step: int | None = None
    raw: dict = field(default_factory=dict, repr=False)  # the whole file without optimizer states
    optimizer: Any = field(default=None, repr=False)  # those, their tensors on the meta device

    def __post_init__(self):
        check_whole(self.source, "block_size", self.block_size)
        for size in self.block_sizes:
            check_whole(self.source, "one of its block_sizes", size)
        check_whole(self.source, "the length of the model", self.length)
        check_whole(self.source, "global_step", self.step, least=0)

    @property
    def algo(self) -> str | None:
        """None where the file leaves it open."""
        known = len(self.algorithms) == 1 or self.algorithms[0] == "bamdlm"
        return self.algorithms[0] if known else None

    @property
    def block_size(self) -> int | None:
        return self.config.get("block_size")

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Of training: several where each row drew its own or blocks grew; none where the file does
        not say."""
        of_run = self.config if self.layout == "hub" else section(self.config, "training")
        drawn = of_run.get("block_sizes")
        if not isinstance(drawn, dict | list | type(None)):
            raise CheckpointError(f"{self.source}: its block_sizes are {reprlib.repr(drawn)}")
        grown = of_run.get("block_schedule")
        if not drawn and isinstance(grown, dict):
            drawn = list(grown.values())
            if all(type(size) is int for size in drawn):  # else __post_init__ says so
                drawn = sorted(set(drawn))
        return tuple(drawn or ([] if self.block_size is None else [self.block_size]))

    @property
    def algo_settings(self) -> dict:
        """Those of algo.* by name; config.json of a hub folder has some of them at its top."""
        return self.config if self.layout == "hub" else section(self.config, "algo")

    @property
    def adapt(self) -> dict:
        """Settings of adapt.* that training had other than their defaults, or all."""
        return section(self.config, "adapt")

    @property
    def noise(self) -> str:
        """Name of the noise schedule that it was trained with."""
        lightning = self.layout == "lightning"
        said = section(self.config, "noise").get("type") if lightning else self.config.get("noise")
        return said or "loglinear"

    @property
    def fingerprint(self) -> str:
        """Other weights, other name."""
        return fingerprint(self.weights, self.ema or {})

    @property
    def length(self) -> int | None:
        """Tokens of a training sequence."""
        if self.layout == "transformers":
            return None
        if self.layout == "hub":
            return self.config.get("model_length")
        return section(self.config, "model").get("length")


def fingerprint(*groups: Mapping[str, Tensor]) -> str:
    """A hash of the first numbers of every tensor, 16 hex digits."""
    digest = hashlib.sha256()
    for group in groups:
        for name, value in group.items():
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(str(value.flatten()[:16].tolist()).encode())
    return digest.hexdigest()[:16]


def check_whole(source: str, name: str, value, least: int = 1) -> None:
    """CheckpointError where a value of a file is neither a whole number nor None."""
    if value is not None and not (type(value) is int and least <= value < 1 << 63):
        raise CheckpointError(f"{source}: {name} is {reprlib.repr(value)}, not a whole number")


def section(config: dict, name: str) -> dict:
    """A part of a configuration that may lack it: foreign files hold anything."""
    part = config.get(name)
    return part if isinstance(part, dict) else {}
