"""The command lines that stand in one with -m, as in Hydra's multirun: `block_size=4,16 seed=1,2`
are four. settings/sweep.py has the settings of one sampling run, which are no command lines.

Swept are values with commas, choice(…), range(…) and, for groups, glob(…), in Hydra's order: the
last one changes fastest.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException

from settings.keys import choices, groups
from settings.overrides import PROSE, by_grammar, nearest
from settings.own_files import CONFIG_DIR, own_folder

MULTIRUN = ("-m", "--multirun")
MOST_RUNS = 1000
LAUNCHERS = ("basic", "submitit_slurm")  # here, one after the other; each as a job of Slurm
# hydra.launcher.NAME of submitit_slurm, with its type: what submitit's AutoExecutor has for any
# cluster, and what it calls slurm_NAME
ON_ANY_CLUSTER = {
    "timeout_min": int,
    "nodes": int,
    "tasks_per_node": int,
    "gpus_per_node": int,
    "cpus_per_task": int,
    "mem_gb": float,
    "name": str,
}
SLURM = ON_ANY_CLUSTER | {
    "partition": str,
    "qos": str,
    "account": str,
    "constraint": str,
    "exclude": str,
    "gres": str,
    "signal_delay_s": int,
}


@dataclass(frozen=True)
class Job:
    """One of the command lines."""

    words: tuple[str, ...]
    swept: tuple[str, ...]  # those of the words that differ between the jobs

    @property
    def name(self) -> str:
        return " ".join(self.swept) or "-"


@dataclass
class Multirun:
    """A command line with -m, in parts."""

    jobs: list[Job] = field(default_factory=list)
    launcher: str = "basic"
    slurm: dict[str, object] = field(default_factory=dict)  # hydra.launcher.NAME: value
    problems: list[str] = field(default_factory=list)


def expand(arguments: list[str]) -> Multirun:
    """The jobs of a command line with -m; whether each can run is for examine() to say."""
    multirun, lists = Multirun(), []
    own = own_folder(arguments)[1]
    words = iter(arguments)
    for word in words:
        if word in MULTIRUN:
            continue
        key, _, value = word.lstrip("+").partition("=")
        if word in CONFIG_DIR:
            lists.append([(word, *itertools.islice(words, 1))])
        elif key == "hydra/launcher" or key.startswith("hydra.launcher."):
            multirun.problems += _launcher_problems(multirun, key, value)
        else:
            try:
                lists.append([(each,) for each in _values(word, key, own)])
            except ValueError as problem:
                multirun.problems.append(str(problem))
    if (count := math.prod(map(len, lists))) > MOST_RUNS:
        multirun.problems.append(f"-m: these are {count:,} runs; at most {MOST_RUNS:,} are allowed")
    if multirun.slurm and multirun.launcher == "basic":
        first = next(iter(multirun.slurm))
        multirun.problems.append(f"hydra.launcher.{first} needs hydra/launcher=submitit_slurm")
    if not multirun.problems:
        several = [len(each) > 1 for each in lists]
        for chosen in itertools.product(*lists):
            swept = itertools.compress(chosen, several)
            flat = itertools.chain.from_iterable
            multirun.jobs.append(Job(tuple(flat(chosen)), tuple(flat(swept))))
    return multirun


def _values(word: str, key: str, own: Path | None) -> list[str]:
    """The word once for each value that it names. ValueError: they cannot be listed."""
    if key in PROSE:
        return [word]
    try:
        override = by_grammar(word)
    except (HydraException, ValueError, RecursionError):
        return [word]  # examine() has a sentence for it
    if not override.is_sweep_override():
        return [word]
    name = override.get_key_element()
    try:
        values = list(itertools.islice(_listed(override, own), MOST_RUNS + 1))
        if not 0 < len(values) <= MOST_RUNS:
            raise ValueError(f"more than {MOST_RUNS:,} values" if values else "no value")
    except (HydraException, ValueError) as error:
        raise ValueError(f"{word}: {error}") from error
    return [f"{name}={value}" for value in values]


def _listed(override: Override, own: Path | None) -> Iterator[str]:
    value, group = override.value(), override.key_or_group
    if override.is_interval_sweep():
        raise ValueError("an interval cannot be listed; write range(begin,end,step)")
    if isinstance(value, Glob):
        if group not in groups():
            raise ValueError(f"glob is for a group ({', '.join(groups())})")
        return iter(value.filter(choices(group, own)))
    shuffled = isinstance(value, RangeSweep) and value.shuffle and value.step
    if shuffled and abs((value.stop - value.start) / value.step) > MOST_RUNS:  # all would be listed
        raise ValueError(f"more than {MOST_RUNS:,} values")
    return override.sweep_string_iterator()


def _launcher_problems(multirun: Multirun, key: str, value: str) -> Iterator[str]:
    """Takes hydra/launcher=… or hydra.launcher.NAME=… into the command."""
    name = key.removeprefix("hydra.launcher.")
    if key == "hydra/launcher":
        multirun.launcher = value
        if value not in LAUNCHERS:
            hint = nearest(value, LAUNCHERS)
            yield f"{key}={value} must be {' or '.join(LAUNCHERS)}{hint and '.'}{hint}"
    elif name not in SLURM:
        yield f"{key} does not exist.{nearest(name, SLURM)} There are: {', '.join(SLURM)}"
    else:
        kind = SLURM[name]
        try:
            multirun.slurm[name] = kind(value)
        except ValueError:
            multirun.slurm[name] = None
        if multirun.slurm[name] in (None, "") or (kind is not str and not multirun.slurm[name] > 0):
            yield f"{key}={value} must be {'a name' if kind is str else 'a number above 0'}"
