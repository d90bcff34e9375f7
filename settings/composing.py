"""From a command line to the settings of a run, in one path.

    parse          the words become groups and values (overrides.py)
    _hydra         Hydra puts configs/ and the values together
    _read          they become the dataclasses of the schema, with its types
    fill           null and auto are replaced (defaults.py)
    place          ${cwd:} becomes the run folder (run_folder.py)

Every problem becomes one sentence, and composing goes on without the override that caused it, so
that one run of the command shows them all. Only this file sees Hydra's composed objects.
"""

import copy
import re
import typing
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, KeyValidationError, OmegaConfBaseException

from settings.bounds import file_problems, text_problem, yaml_reason
from settings.defaults import fill
from settings.keys import CONFIGS, LEAVES, SCHEMA, Leaf, nested, unwrap
from settings.overrides import ParsedOverrides, parse, section_problem, type_problem, unknown_key
from settings.run_folder import RUN_FOLDER, place, take_newest_checkpoint
from settings.schema import Config
from settings.tables import algorithms
from utils import CIRCUMSTANCES, first_line, reason, shown

# Hydra's own settings: to read their files is a fifth of the time
UNUSED = "env", "help", "hydra_help", "hydra_logging", "job_logging", "launcher", "sweeper"
REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, *CIRCUMSTANCES)


class ConfigError(ValueError):
    """A run that cannot start; .problems holds one sentence for each reason."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n  - ".join(["this run cannot start:", *map(shown, problems)]))


def load(overrides: list[str]) -> Config:
    """The settings of a command line, every null filled in; ConfigError for what cannot be read.

    Whether the settings fit together is for check() to say.
    """
    config, problems, _ = read(parse(overrides))
    if problems:
        raise ConfigError(problems)
    return config


def read(parsed: ParsedOverrides) -> tuple[Config | None, list[str], list[str]]:
    """The Config (None where it cannot be made), the problems of composing, and notes."""
    problems = list(parsed.problems)
    try:
        config, wrong = _read(_hydra(parsed))
        problems += wrong.values()
        if wrong:
            config, wrong = _read(_hydra(parsed.without(wrong)))
    except ConfigError as error:
        return None, problems + error.problems, []
    except REFUSALS as error:
        return None, [*problems, _composing_problem(error, parsed)], []
    if wrong:
        return None, problems, []
    fill(config)
    place(config)
    return config, problems, _forced(parsed, config) + take_newest_checkpoint(config)


def _composing_problem(error: BaseException, parsed: ParsedOverrides) -> str:
    """What Hydra, OmegaConf or PyYAML say, without the lines about their own objects."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return yaml_reason(error, error.problem_mark.name)
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    text, _, _ = str(error).partition("Config search path:")
    about = re.compile(r"\s*(object_type=|full_key:\s*$)")
    lines = [line.strip() for line in text.splitlines() if not about.match(line)]
    text = " ".join(lines[:3]).strip()
    if not text or (isinstance(error, CIRCUMSTANCES) and not isinstance(error, HydraException)):
        text = reason(error)
    chosen = list(parsed.groups.values())
    if not chosen or any(name.partition("=")[2] in text for name in chosen):
        return text
    return f"{', '.join(chosen)}: {text}"


def composed_yaml(overrides: list[str]) -> str:
    """What --cfg job prints: the composed settings before null is filled in."""
    return OmegaConf.to_yaml(_hydra(parse(overrides)))


def composed_defaults(*groups: str) -> dict:
    """The composed settings of a command line of groups alone (algo=mdlm), nested, before null is
    filled in."""
    return OmegaConf.to_container(_chosen(groups), resolve=False)


def _hydra(parsed: ParsedOverrides) -> DictConfig:
    OmegaConf.register_new_resolver("cwd", lambda: RUN_FOLDER, replace=True)
    if problems := list(file_problems(parsed.chosen(), parsed.own)):
        raise ConfigError(problems)
    cfg = copy.deepcopy(_chosen(tuple(parsed.groups.values()), parsed.own))
    for key, value in parsed.values:
        try:
            OmegaConf.update(cfg, key, value, force_add=True, merge=key not in LEAVES)
        except (GrammarParseError, KeyValidationError) as error:
            raise ConfigError([f"{key}={value}: {first_line(error)}"]) from error
    _refuse_growth(cfg)
    if _is_causal(OmegaConf.select(cfg, "algo.name")):
        cfg.block_size = 1
    return cfg


def _is_causal(algorithm) -> bool:
    return algorithms().get(str(algorithm), {}).get("causal", False)


@cache
def _chosen(groups: tuple[str, ...], own: Path | None = None) -> DictConfig:
    """The configuration of these groups, before any single setting is changed. own: the folder of
    --config-dir."""
    found = QuotedString(f"file://{own}", Quote.single).with_quotes()
    more = [] if own is None else [f"hydra.searchpath=[{found}]"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [*groups, *more, *(f"~hydra/{name}" for name in UNUSED)])
    _refuse_growth(cfg)
    for key, leaf in LEAVES.items():
        whole = OmegaConf.is_dict(OmegaConf.select(cfg, key.rpartition(".")[0]))
        if leaf.default is not None and whole and OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, leaf.default, force_add=True)
    return cfg


def _refuse_growth(cfg: DictConfig) -> None:
    if problem := text_problem(OmegaConf.to_container(cfg, resolve=False)):
        raise ConfigError([problem])


def _read(cfg: DictConfig) -> tuple[Config | None, dict[str, str]]:
    """The settings in their types, None with {key: problem} of a composed configuration."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    resolved = None
    with suppress(OmegaConfBaseException):  # where one value cannot be told, each is asked for
        resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    problems, values = dict(_unknown(raw)), {}
    absent = ()  # sections, as beginnings of keys
    for key, entry in SCHEMA.items():
        if key.startswith(absent):
            continue
        try:
            value = _selected(cfg, key, entry) if resolved is None else nested(resolved, key)
        except OmegaConfBaseException as error:
            said = re.sub(r"^\w+ raised while resolving interpolation: ", "", first_line(error))
            said = said.strip("\"'")  # what the error of a resolver says
            problems[key] = f"{key}: {said}"
            absent += (f"{key}.",)
            continue
        if isinstance(entry, Leaf):
            try:
                values[key] = _converted(key, _prepared(key, entry, value))
            except ValueError:
                problems[key] = type_problem(key, value)
        elif not isinstance(value, dict) or not isinstance(nested(raw, key), dict):
            value = nested(raw, key)
            absent += (f"{key}.",)
            if value is None and (key == "wandb" or key.startswith("callbacks.")):
                values[key] = None
            else:
                problems[key] = section_problem(key, value)
    problems = _begun(problems, raw)
    return None if problems else _built(Config, values), problems


def _selected(cfg: DictConfig, key: str, entry: Leaf | type) -> object:
    """One value where others cannot be told."""
    value = OmegaConf.select(cfg, key)
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=isinstance(entry, Leaf))
    return value


def _converted(key: str, value: object) -> object:
    """The value in the type that the schema has for it; ValueError where it has no such form.

    What was converted before is looked up: composing is most of what a refused command costs.
    """
    name = key, repr(value)
    if name not in _CONVERTED:
        section, _, field = key.rpartition(".")
        typed = _typed(SCHEMA[section] if section else Config)
        OmegaConf.update(typed, field, value, merge=False)
        found = OmegaConf.select(typed, field)
        _CONVERTED[name] = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    return copy.deepcopy(_CONVERTED[name])


_CONVERTED: dict[tuple[str, str], object] = {}
_typed = cache(OmegaConf.structured)  # of a section: checks and converts what is put into it


def _built(section: type, values: dict[str, object], prefix: str = "") -> object:
    """The dataclass of a section with those below it; a section may be None in `values`."""
    keys = {field.name: prefix + field.name for field in fields(section)}
    return section(
        **{
            name: values[key] if key in values else _built(SCHEMA[key], values, f"{key}.")
            for name, key in keys.items()
        }
    )


def _begun(problems: dict[str, str], raw: dict) -> dict[str, str]:
    """Without those that a setting takes over from another, through ${...}."""
    taken = {key for key in problems if "${" in str(nested(raw, key))}
    first = {}
    for key in sorted(problems, key=taken.__contains__):
        first.setdefault(problems[key].removeprefix(key), key)
    sections = any(key not in LEAVES for key in problems)
    kept = [key for key in problems if key in first.values()]
    return {k: problems[k] for k in kept if not (sections and "is not a container" in problems[k])}


def _unknown(node: dict, prefix: str = ""):
    """(key, problem) of what the schema does not have."""
    for name, child in ((str(name), child) for name, child in node.items()):
        if prefix + name not in SCHEMA:
            yield prefix + name, unknown_key(prefix + name)
        elif isinstance(child, dict) and prefix + name not in LEAVES:
            yield from _unknown(child, f"{prefix}{name}.")


def _prepared(key: str, leaf: Leaf, value):
    """What is typed in another form than the schema has it. ValueError for a text whose ${...} were
    filled in, and which has others now."""
    if "${" in str(value):
        raise ValueError
    bare, _ = unwrap(leaf.hint)
    whole = isinstance(value, float) and value.is_integer()  # 1e6 steps
    if whole and (bare is int or (int in typing.get_args(bare) and abs(value) > 1)):
        return int(value)
    if bare == list[str] and isinstance(value, str):
        return [value]
    return None if (key, value) == ("trainer.devices", "auto") else value


def _forced(parsed: ParsedOverrides, config: Config) -> list[str]:
    """The note that the block size asked for is not that of the run, or none."""
    name, asked = config.algo.name, dict(parsed.values).get("block_size", 1)
    same = str(asked).startswith("$") or asked in (1, config.model.length)
    forced = _is_causal(name) and not same
    return [f"block_size={asked} has no effect: {name} has blocks of 1"] * forced
