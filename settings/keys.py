"""The settings by their dotted keys: what there is, and the value that a configuration has."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from settings.limits import Limit
from settings.schema import Config

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class Leaf:
    """One setting of the schema."""

    hint: object
    doc: str
    limit: Limit | None
    default: object  # None: configs/ have it


def unwrap(hint) -> tuple[object, bool]:
    """X | None -> (X, True); X -> (X, False); int | float | None -> (int | float, True)."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    bare = members[0] if len(members) == 1 else typing.Union[tuple(members)]  # noqa: UP007
    return bare, len(members) < len(typing.get_args(hint))


def walk(section: type = Config, prefix: str = "") -> Iterator[tuple[str, type | Leaf]]:
    """Every key of the schema in order: ("loader", Loader), ("loader.batch_size", Leaf(...)) ..."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key, (bare, _) = prefix + field.name, unwrap(hints[field.name])
        if dataclasses.is_dataclass(bare):
            yield key, bare
            yield from walk(bare, key + ".")
        else:
            yield key, Leaf(hints[field.name], **field.metadata)


SCHEMA = dict(walk())
LEAVES = {key: entry for key, entry in SCHEMA.items() if isinstance(entry, Leaf)}


def choices(group: str, own: Path | None = None) -> list[str]:
    """What may stand behind `group=`, in alphabetical order. own: the folder of --config-dir."""
    found = [*(CONFIGS / group).glob("*.yaml"), *((own / group).glob("*.yaml") if own else ())]
    return sorted(path.stem for path in found if path.stem[0] != "_")


def groups() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def get(config: Config, key: str):
    """The value of a setting; None where its section is left out."""
    value = config
    for name in key.split("."):
        value = None if value is None else getattr(value, name)
    return value


def nested(node: object, key: str) -> object:
    """What dictionaries inside each other have for a setting; None where there is nothing."""
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def changed(config: Config, usual: dict[str, object]) -> dict[str, object]:
    """{setting: its value} of those of `usual` that have another value than it has for them."""
    found = {key: get(config, key) for key in usual}
    return {key: value for key, value in found.items() if value != usual[key]}


def put(config: Config, key: str, value) -> None:
    """Changes a setting of a section that is not left out."""
    section, _, name = key.rpartition(".")
    setattr(get(config, section) if section else config, name, value)
