"""The words of a command line: which settings and groups exist, and what is wrong with an override.

Every problem becomes one sentence; nothing here raises for what a user got wrong.
"""

import dataclasses
import difflib
import re
import shlex
import typing
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from settings.keys import LEAVES, SCHEMA, choices, groups, unwrap
from settings.limits import unfit
from settings.own_files import OWN_FILE, own_folder
from settings.tables import known_corpora
from utils import first_line

# Keys of the authors' configs that nothing in their code read.
DEAD = {
    "model.tie_word_embeddings",
    "model.scale_by_sigma",
    "model.type",
    "algo.dropout",
    "algo.causal_attention",
    "training.coeff_clip",
    "sampling.noise_removal",
    "noise.sigma_min",
    "noise.sigma_max",
    "diffusion",
    "eval.compute_perplexity_on_sanity",
    "eval.generate_samples",
}
# Keys that people try, and what does the same here.
INSTEAD = {
    "algo.block_size": "block_size",
    "model.name": "the group, model=small",
    "trainer.max_epochs": "trainer.max_steps: the training data are one endless stream",
    "hydra.run.dir": "checkpointing.save_dir",
    "sampling.top_p": "sampling.nucleus_p",
    "tokenizer": "data.tokenizer_name_or_path",
}
PROSE = {"sampling.prompt", "wandb.notes", "data.tokenizer_name_or_path"}
PRINT = "`--cfg job` prints the settings that a command has"
# Options of Hydra that are not offered: what to do instead.
OPTIONS = {
    ("-m", "--multirun"): "python main.py -m starts one run after the other, and nothing else does",
    ("-r", "--run"): "leave it out, a command runs without it",
    ("-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info"): PRINT,
    ("-cp", "--config-path", "-cn", "--config-name"): OWN_FILE,
    ("-sc", "--shell-completion", "--hydra-help", "--version"): "--help lists all settings",
    ("--experimental-rerun",): "the same command goes on with its run",
}
TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    list[float]: "a list like [0.5,0.6]",
    list[int]: "a list like [2,3]",
    list: "a list like [a,b]",  # of others
    dict[int, float]: "weights by size, like {4: 1, 16: 3},",
    dict[int, int]: "sizes by step, like {0: 1, 500: 4},",
    dict: "lists of values by name, like {temperature: [0.8, 1]},",
}


def nearest(word: str, candidates, before: str = "", cutoff: float = 0.6) -> str:
    """' Did you mean X?', or '' when nothing is near. before: stands before each candidate."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return f" Did you mean {before}{found[0]}?" if found else ""


def unknown_key(key: str) -> str:
    """The sentence about a key that is not in the schema."""
    if key in DEAD:
        return f"{key} had no effect in the original code and does not exist here: leave it out"
    if key in INSTEAD:
        return f"{key} does not exist: use {INSTEAD[key]}"
    if key.startswith(("hydra/launcher", "hydra.launcher.")):
        return f"{key} has no effect without -m, which starts several runs"
    if key.startswith("hydra."):
        return f"{key} does not exist: the run folder is checkpointing.save_dir"
    if key in groups():
        return f"a file of the group {key} must begin with the line `# @package _global_`"
    same_name = [known for known in LEAVES if known.split(".")[-1] == key.split(".")[-1]]
    if same_name and difflib.SequenceMatcher(None, key, same_name[0]).ratio() < 0.95:
        return f"{key} is not a setting. Did you mean {' or '.join(same_name)}?"
    section, _, name = key.rpartition(".")
    if section in SCHEMA:  # which alone makes its settings near
        prefix = f"{section}."
        inside = [each.removeprefix(prefix) for each in SCHEMA if each.startswith(prefix)]
        hint = nearest(name, inside, before=prefix, cutoff=0.7)
    else:
        hint = nearest(key, [*SCHEMA, *groups()])
    return f"{key} is not a setting.{hint or ' python main.py --help lists them all'}"


def type_problem(key: str, value: object, typed: str | None = None) -> str:
    """The sentence about a value of a leaf that is of another type. typed: the value as it stands
    on the command line."""
    bare, optional = unwrap(LEAVES[key].hint)
    wanted = TYPE_NAMES.get(bare) or TYPE_NAMES.get(typing.get_origin(bare), "a number")
    way_out = f"; as text: {spelled(key, typed)}" if bare is str and typed is not None else ""
    return f"{key}={as_typed(value)} must be {wanted}{' or null' if optional else ''}{way_out}"


def limit_problem(key: str, value: object) -> str | None:
    """The sentence about a value that is of the right type, and not what its setting may be."""
    limit = LEAVES[key].limit
    if end := unfit(value):
        return f"{key}={value} {end}"
    if limit is None or value is None or limit.holds(value):
        return None
    hint = nearest(value, limit.names) if limit.names else ""
    return f"{key}={value} must be {limit.words}{hint and '.'}{hint}"


def as_typed(value: object) -> object:
    return "null" if value is None else value


def spelled(key: str, text: str) -> str:
    """The word to type in a shell that gives a setting exactly this text."""
    return shlex.quote(f"{key}={QuotedString(text, Quote.double).with_quotes()}")


def _check_group(group: str, value, own: Path | None) -> None:
    known, several = choices(group, own), isinstance(value, list)
    if group == "experiment" and value is None:
        return
    if isinstance(value, dict) or (several and (group != "callbacks" or not value)):
        raise ValueError(f"{group}={value} must be one of: {', '.join(known)}")
    for choice in map(str, map(as_typed, value if several else [value])):
        if choice not in known:
            problem = f"does not exist.{nearest(choice, known)}"
            if choice in _entries(group):
                problem = f"needs the file configs/{group}/{choice}.yaml, which is missing."
            raise ValueError(f"{group}={choice} {problem} Choices: {', '.join(known)}")


def _entries(group: str) -> Collection[str]:
    """What the code has of this kind, with or without a file in configs/."""
    if group == "data":
        return known_corpora()
    limits = (LEAVES[key].limit for key in (f"{group}.name", f"{group}.type") if key in LEAVES)
    return [name for limit in limits if limit for name in limit.names]


@dataclass
class ParsedOverrides:
    """A command line in parts: what Hydra gets, and what cannot be read."""

    groups: dict[str, str]  # {group: override}
    values: list[tuple[str, object]]  # (key, value), in the order given
    problems: list[str]
    own: Path | None = None  # the folder of --config-dir

    def without(self, keys) -> "ParsedOverrides":
        values = [
            (key, value)
            for key, value in self.values
            if not any(f"{bad}.".startswith(f"{key}.") for bad in keys)
        ]
        return dataclasses.replace(self, values=values)

    def chosen(self) -> Iterator[tuple[str, str]]:
        """(group, name) of every file of settings that the command names."""
        for group, override in self.groups.items():
            yield from ((group, name) for name in re.findall(r"[\w.-]+", override)[1:])


@lru_cache(maxsize=1000)
def by_grammar(argument: str) -> Override:
    """What Hydra makes of a word. That is a quarter of what a command line costs, and of many in
    one process most words are the same."""
    return OverridesParser.create().parse_override(argument)


def _read(argument: str) -> tuple[str, object, str]:
    """(key, value, the value as typed); ValueError says what is wrong with the form."""
    if argument.startswith("-"):
        option = argument.partition("=")[0]
        ways_out = (f"; {way}" for names, way in OPTIONS.items() if option in names)
        advice = next(ways_out, ", see python main.py --help")
        raise ValueError(f"{argument} is not an option: settings are key=value{advice}")
    key, equals, text = argument.lstrip("+~").partition("=")
    if not key and (equals or argument.startswith("~")):
        raise ValueError(f"{argument!r} names no setting: write key=value, without spaces")
    if not equals and not argument.startswith("~"):
        raise ValueError(f"{argument!r} is not key=value")
    if key in PROSE and text != "null" and "~" not in argument.partition("=")[0]:
        # taken as it stands, commas and brackets too
        quoted = re.fullmatch(r"'.*'|\".*\"", text, re.S)
        return key, text[1:-1] if quoted else text, text
    try:
        override = by_grammar(argument)
    except (HydraException, ValueError, RecursionError) as error:
        if "=" in text:  # a path such as step=100.ckpt is a text
            with suppress(ValueError):
                if isinstance(_read(f"{key}={text.replace('=', '_')}")[1], str):
                    return key, text, text
        raise ValueError(_unreadable(argument, key, text, error)) from error
    if override.is_sweep_override():
        raise ValueError(f"{argument!r} names several values: {_one_value(key, text)}")
    if override.package is not None:
        raise ValueError(f"{argument!r}: packages (@) are not offered")
    if override.is_delete():
        return override.key_or_group, None, "null"
    return override.key_or_group, override.value(), override.input_line.partition("=")[2]


def _unreadable(argument: str, key: str, text: str, error: Exception) -> str:
    """The sentence about a word that Hydra's grammar does not have."""
    if key not in LEAVES:
        known = key in SCHEMA or key in groups()
        return f"{argument!r} cannot be read ({first_line(error)})" if known else unknown_key(key)
    bare, _ = unwrap(LEAVES[key].hint)
    if bare is str and (end := unfit(text)):
        return f"{key}={text} {end}"
    if bare is str:
        home = text.startswith("~/") and f"{key}=$HOME{text[1:]}"
        return f"{argument!r} cannot be read as it stands: write {home or spelled(key, text)}"
    return type_problem(key, text)


def _one_value(key: str, text: str) -> str:
    bare = unwrap(LEAVES[key].hint)[0] if key in LEAVES else None
    if typing.get_origin(bare) is list:
        return f"write {shlex.quote(f'{key}=[{text}]')}"
    quotes = f": {spelled(key, text)}" if bare is str else ""
    return f"give one, or put quotes round a comma{quotes}; with -m each is a run of its own"


def _check_value(key: str, value: object, text: str) -> None:
    if key not in SCHEMA:
        raise ValueError(unknown_key(key))
    if key in LEAVES:
        kind = typing.get_origin(unwrap(LEAVES[key].hint)[0])
        if isinstance(value, dict | list) and type(value) is not kind:
            raise ValueError(type_problem(key, value, text))
    elif value is not None and not (isinstance(value, dict) and full(value)):
        raise ValueError(section_problem(key, value))


def full(value: object) -> bool:
    """Whether it is not an empty section and has none: that would change nothing."""
    return value != {} and (not isinstance(value, dict) or all(map(full, value.values())))


def section_problem(key: str, value: object) -> str:
    names = ", ".join(field.name for field in dataclasses.fields(SCHEMA[key]))
    chosen = f", and its files {', '.join(choices(key))}" if key in groups() else ""
    wrong = "sets nothing" if isinstance(value, dict) else "must be a section"
    return f"{key}={as_typed(value)} {wrong}; its settings are {names}{chosen}"


def parse(overrides: list[str]) -> ParsedOverrides:
    """Sorts a command line into groups and values; a leading + or ++ makes no difference."""
    known_groups = groups()
    words, own, lost = own_folder(overrides)
    parsed, last = ParsedOverrides({}, [], [*lost], own), {}
    for argument in words:
        try:
            key, value, text = _read(argument)
            section = key.partition(".")[0]
            if key in known_groups and not (isinstance(value, dict) and key in SCHEMA):
                if lost and str(value) not in choices(key):
                    continue  # it may lie in the folder that cannot be used
                _check_group(key, value, own)
                if value is None:  # experiment=null takes an earlier choice back
                    parsed.groups.pop(key, None)
                else:
                    parsed.groups[key] = f"{key}={text}"
            elif key in SCHEMA and key != section and last.get(section, "set") is None:
                raise ValueError(f"{argument} comes after {section}=null: leave one of them out")
            else:
                _check_value(key, value, text)
                parsed.values.append((key, value))
                last[key] = value
        except ValueError as problem:
            parsed.problems.append(str(problem))
    return parsed
