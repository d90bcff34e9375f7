"""From a command line to typed values: Hydra composes configs/, the schema says what each must be.

Every problem becomes one sentence, and composing goes on without the override that caused it, so
that one run of the command shows them all. Only this file sees Hydra's composed objects.
"""

import copy
import dataclasses
import typing
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from settings.overrides import (
    CONFIGS,
    LEAVES,
    SCHEMA,
    Leaf,
    ParsedOverrides,
    parse,
    unknown_key,
    unwrap,
)
from settings.schema import Config

# Stands for ${cwd:} until the run folder is known, which depends on the other settings.
RUN_FOLDER = "<run folder>"

TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


@cache
def _chosen(groups: tuple[str, ...]) -> DictConfig:
    """The configuration of these groups, before any single setting is changed."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(groups))


def _hydra(parsed: ParsedOverrides) -> DictConfig:
    OmegaConf.register_new_resolver("cwd", lambda: RUN_FOLDER, replace=True)
    cfg = copy.deepcopy(_chosen(tuple(parsed.groups.values())))
    for key, value in parsed.values:
        OmegaConf.update(cfg, key, value, force_add=True)
    if OmegaConf.select(cfg, "algo.name") == "ar":
        cfg.block_size = 1
    return cfg


def composed_yaml(overrides: list[str]) -> str:
    """What --cfg job prints: the composed settings before null is filled in."""
    return OmegaConf.to_yaml(_hydra(parse(overrides)[0]))


@cache
def _typed(section: type) -> DictConfig:
    """A node of the section's types; what is assigned to it is checked and converted."""
    return OmegaConf.structured(section)


def _convert(leaf: Leaf, value):
    """The value in the type of the schema; raises ValidationError."""
    bare, _ = unwrap(leaf.hint)
    whole = isinstance(value, float) and value.is_integer()  # 1e6 steps
    if whole and (bare is int or (int in typing.get_args(bare) and abs(value) > 1)):
        value = int(value)
    node = _typed(leaf.section)
    node[leaf.name] = value
    converted = node[leaf.name]
    return OmegaConf.to_object(converted) if OmegaConf.is_config(converted) else converted


def _type_problem(key: str, leaf: Leaf, value, chosen_later) -> str:
    bare, optional = unwrap(leaf.hint)
    optional = optional or key in chosen_later
    if typing.get_origin(bare) is list:
        wanted = "a list like [0.5,0.6]" if float in typing.get_args(bare) else "a list like [a,b]"
    else:
        wanted = TYPE_NAMES.get(bare, "a number")
    return f"{key}={value} must be {wanted}{' or null' if optional else ''}"


def _left_open(key: str, value, chosen_later) -> bool:
    return (value is None and key in chosen_later) or (key, value) == ("trainer.devices", "auto")


def _read(cfg: DictConfig, chosen_later) -> tuple[dict, dict[str, str]]:
    """Flat {key: typed value} and {key: problem} of a composed configuration."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    values, problems, absent = {}, {}, []

    def unknown(node, prefix):
        for name, child in node.items():
            if prefix + name not in SCHEMA:
                problems[prefix + name] = unknown_key(prefix + name)
            elif isinstance(child, dict) and prefix + name not in LEAVES:
                unknown(child, f"{prefix}{name}.")

    unknown(raw, "")
    for key, entry in SCHEMA.items():
        if any(key.startswith(f"{section}.") for section in absent):
            continue
        try:
            value = OmegaConf.select(cfg, key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            problems[key] = f"{key}: {str(error).splitlines()[0]}"
            continue
        if not isinstance(entry, Leaf):
            if value is None and (key == "wandb" or key.startswith("callbacks.")):
                values[key] = None
                absent.append(key)
            elif not isinstance(value, dict):
                names = ", ".join(field.name for field in dataclasses.fields(entry))
                problems[key] = f"{key}={value} must be a section; its settings are {names}"
                absent.append(key)
        elif _left_open(key, value, chosen_later):
            values[key] = None
        else:
            try:
                values[key] = _convert(entry, value)
            except (ValidationError, ValueError):
                problems[key] = _type_problem(key, entry, value, chosen_later)
    return values, problems


def compose_values(overrides: list[str], chosen_later) -> tuple[dict | None, list[str], list[str]]:
    """Flat {key: value} of a command line, the problems, and warnings.

    The values are None where configs/ themselves are broken. chosen_later: keys that may be null
    although their type says otherwise.
    """
    parsed, problems = parse(overrides)
    try:
        values, wrong = _read(_hydra(parsed), chosen_later)
        problems += wrong.values()
        if wrong:
            values, wrong = _read(_hydra(parsed.without(wrong)), chosen_later)
    except (HydraException, OmegaConfBaseException) as error:
        return None, [*problems, str(error).splitlines()[0]], []
    if wrong:
        return None, problems, []
    asked = dict(parsed.values).get("block_size", 1)
    same = str(asked).startswith("$") or asked in (1, values["model.length"])
    forced = values["algo.name"] == "ar" and not same
    return values, problems, [f"block_size={asked} has no effect: ar has blocks of 1"] * forced


def build(values: dict, section: type = Config, prefix: str = ""):
    """The dataclasses from flat values."""
    hints = typing.get_type_hints(section)

    def entry(name):
        key, (bare, _) = prefix + name, unwrap(hints[name])
        if dataclasses.is_dataclass(bare) and not (key in values and values[key] is None):
            return build(values, bare, key + ".")
        return values[key]

    return section(**{field.name: entry(field.name) for field in dataclasses.fields(section)})


def flatten(config) -> dict:
    """{dotted key: value} of a Config; the sections that are None as themselves."""
    flat = {}

    def visit(node, prefix):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                visit(value, f"{prefix}{field.name}.")
            else:
                flat[prefix + field.name] = value

    visit(config, "")
    return flat
