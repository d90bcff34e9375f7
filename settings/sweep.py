"""sampling.sweep: several settings in one start. Several starts (-m) are in settings/multirun.py.

Each combination of its values is a point: a sampling run with the settings of a command of its own.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from settings.defaults import fill
from settings.keys import LEAVES, put, unwrap
from settings.overrides import as_typed, limit_problem, nearest, type_problem
from settings.schema import Config
from settings.tables import algorithms, sampling_fields, step_rules

MOST_POINTS = 1000  # each is checked before the first begins
SAME = ("batch_size",)  # fields that change no text
EXAMPLE = "{steps: [first_hitting, threshold], threshold: [0.6, 0.9]}"


@dataclass(frozen=True)
class Point:
    """values: {name: value} of the sweep, without those that the step rule does not read."""

    values: dict[str, object]
    config: Config

    @property
    def text(self) -> str:
        return " ".join(f"{name}={as_typed(value)}" for name, value in self.values.items())

    @property
    def keys(self) -> list[str]:
        return [names(self.config)[name] for name in self.values]


@dataclass
class Sweep:
    """points: each once, in the order of the names and values, the last name changing first.
    combinations: how many there are with those that differ in nothing that is read. problems: one
    sentence for each name or value that cannot be."""

    points: list[Point] = field(default_factory=list)
    combinations: int = 1
    problems: list[str] = field(default_factory=list)


def names(config: Config) -> dict[str, str]:
    """{name in a sweep: the setting}: what SamplingParams reads and texts depend on."""
    entry = algorithms().get(config.algo.name, {})
    fields = [name for name in sampling_fields() if name not in SAME]
    found = {name: f"sampling.{name}" for name in fields if f"sampling.{name}" in LEAVES}
    found |= {"T": "algo.T", "seed": "seed"}
    return found if entry.get("causal") else found | {"block_size": "block_size"}


def sweep(config: Config) -> Sweep:
    """The points of a run; one without values where it has no sweep."""
    alone = copy.deepcopy(config)
    alone.sampling.sweep = None
    if config.sampling.sweep is None:
        return Sweep([Point({}, alone)])
    made, known = Sweep(), names(config)
    axes = dict(_axes(config.sampling.sweep, known, made.problems))
    made.combinations = math.prod(map(len, axes.values()))
    if made.combinations > MOST_POINTS:
        made.problems.append(
            f"sampling.sweep has {made.combinations:,} combinations, more than {MOST_POINTS:,}:"
            " give fewer values, or several commands"
        )
        return made
    points = {}
    for values in itertools.product(*axes.values()):
        point = _point(dict(zip(axes, values, strict=True)), alone, known)
        points.setdefault(point.text, point)
    made.points = list(points.values())
    for name in axes:
        if not any(name in point.values for point in made.points):
            made.problems.append(
                f"sampling.sweep: {name} has no effect in any point, as no step rule of them reads"
                " it: leave it out"
            )
    if len(made.points) > 1 and config.sampling.trajectory is not None:
        made.problems.append(
            f"sampling.trajectory={config.sampling.trajectory} replays one run, and sampling.sweep"
            f" has {len(made.points)}: leave one of them out"
        )
    return made


def _axes(
    asked: dict, known: dict[str, str], problems: list[str]
) -> Iterator[tuple[str, list[object]]]:
    """(name, its values in their types); what cannot be becomes a problem."""
    if not asked:
        problems.append(f"sampling.sweep={asked} names no setting: write {EXAMPLE}")
    for name, values in asked.items():
        if name not in known:
            hint = nearest(str(name), known) or f" Names are {', '.join(known)}"
            problems.append(f"sampling.sweep: there is no {name} to go through.{hint}")
        elif not isinstance(values, list) or not values:
            problems.append(f"sampling.sweep: {name}={values} must be a list of values")
        elif good := [*_values(known[name], values, problems)]:
            yield name, good


def _values(key: str, values: list, problems: list[str]) -> Iterator[object]:
    bare, optional = unwrap(LEAVES[key].hint)
    for value in values:
        if bare is float and type(value) is int:
            value = float(value)
        if bare is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not bare and not (value is None and optional):
            problems.append(f"sampling.sweep: {type_problem(key, value)}")
        elif problem := limit_problem(key, value):
            problems.append(f"sampling.sweep: {problem}")
        else:
            yield value


def _point(values: dict[str, object], config: Config, known: dict[str, str]) -> Point:
    rule = values.get("steps", config.sampling.steps)
    unread = _unread(config, rule)
    values = {name: value for name, value in values.items() if name not in unread}
    config = copy.deepcopy(config)
    for name, value in values.items():
        put(config, known[name], value)
    fill(config)  # steps=null is a choice
    return Point(values, config)


def _unread(config: Config, rule: str | None) -> set[str]:
    """Names of numbers that other step rules read, and this one does not."""
    entry, rules = algorithms().get(config.algo.name, {}), step_rules()
    reads = {"num_steps"} if entry.get("writes") == "sedd" else set()
    if "steps" in entry.get("can", ()):
        reads |= {*rules.get(rule or "first_hitting", {}).get("reads", ())}
    numbers = {name for each in rules.values() for name in each.get("reads", ())}
    return {"T" if name == "num_steps" else name for name in numbers - reads}
