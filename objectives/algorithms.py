"""The algorithms: which objective each trains, and what its settings may say.

A module of this folder lists its algorithms in a literal dict ALGORITHMS, which settings/tables.py
reads without importing torch: write every keyword but `build` as a literal.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import objectives
from models.adaptation import PLAIN, Adaptation
from noise_schedule import EPS, Schedule

from .loss import Objective
from .sizes import SizeLaw


@dataclass(frozen=True)
class ObjectiveSettings:
    """What objectives are built from; each takes what it needs."""

    mask_id: int
    schedule: Schedule
    block_size: int  # tokens
    length: int  # tokens of a row
    ignore_bos: bool = True
    time_conditioning: bool = True
    resample: bool = False
    full_from: float = EPS
    sizes: SizeLaw | None = None  # of the blocks of a row, in training
    adapt: Adaptation = PLAIN
    ar_loss: float = 0.0


@dataclass(frozen=True)
class Algorithm:
    """One line of a table. The defaults are those of an algorithm without blocks or extras."""

    build: Callable[[ObjectiveSettings], Objective]
    parameterization: str  # algo.parameterization
    sampler: str  # algo.sampler
    writes: str  # how its network is asked: a name of SAMPLERS in samplers/writing.py
    noise: bool = True  # draws noise, so the settings of noise and its times have an effect
    counts: bool = False  # training.noise=counts: its objective has inputs_by_counts
    blocks: bool = False  # trains in blocks: algo.cross_attn, algo.var_min, exact at block_size=1
    causal: bool = False  # predicts each token from those before it; its blocks have one token
    likelihood: str = "counts"  # eval.likelihood where none is given
    time_conditioning: bool = False  # the network may be told the noise level


def get_algorithm(name: str) -> Algorithm:
    """ValueError where no module of this folder has it."""
    known = {}
    for module in pkgutil.iter_modules(objectives.__path__):
        found = importlib.import_module(f"objectives.{module.name}")
        known |= getattr(found, "ALGORITHMS", {})
    if name not in known:
        raise ValueError(f"algo must be one of {sorted(known)}, got {name!r}")
    return known[name]


def build_objective(name: str, settings: ObjectiveSettings) -> Objective:
    return get_algorithm(name).build(settings)
