"""What composing may cost: files of configs/ and interpolations are looked at before Hydra is.

A YAML file of one's own may be broken or, through aliases and interpolations that double
themselves, grow without end.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from settings.keys import CONFIGS
from utils import first_line, reason

# A file that sets everything has 350 nodes, at most 4 deep, in 10 000 bytes.
MOST_BYTES, MOST_NODES, DEEPEST = 1 << 16, 1000, 20
MOST_TEXT = 100_000  # characters of a value when its ${...} are written out


def file_problems(chosen: Iterable[tuple[str, str]], own: Path | None = None) -> Iterator[str]:
    """Sentences about the files of configs/ or of --config-dir (own) that are chosen as (group,
    name), and about those that they name in turn."""
    waiting, seen = list(chosen), set()
    while waiting:
        group, name = waiting.pop()
        path = CONFIGS / group / f"{name}.yaml"
        if own is not None and not path.exists():
            path = own / group / f"{name}.yaml"
        if path in seen or not path.exists():  # for the latter Hydra has a sentence
            continue
        seen.add(path)
        try:
            text = _text(path)
            _count(text)
        except (ValueError, OSError, yaml.YAMLError) as error:
            yield f"{group}={name}: {yaml_reason(error, path)}"
        else:
            waiting += re.findall(r"/?(\w+): *[\"']?([\w.-]{1,200})", text)


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError("is no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"has more than {MOST_BYTES:,} bytes: settings are fewer")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error.reason})") from error


def _count(text: str) -> None:
    """ValueError, or an error of YAML, for a text with more nodes than settings can have. An alias
    counts as often as what it stands for."""
    sizes, inside = {}, [[None, 0]]  # of each anchor; (anchor, nodes) of what is not closed yet
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append([event.anchor, 1])
        elif isinstance(event, yaml.NodeEvent):  # an alias of what it stands in never ends
            alias = isinstance(event, yaml.AliasEvent)
            size = sizes.get(event.anchor, MOST_NODES + 1) if alias else 1
            inside[-1][1] += size
            sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = inside.pop()
            inside[-1][1] += size
            sizes[anchor] = size
        if sum(size for _, size in inside) > MOST_NODES or len(inside) > DEEPEST:
            raise ValueError(
                f"has more than {MOST_NODES:,} entries, or {DEEPEST} inside each other, with its"
                " aliases written out"
            )


def yaml_reason(error: Exception, path: Path | str) -> str:
    """An error about a YAML file as `FILE, line 3: what is wrong`; the line if it is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{path}, line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, yaml.YAMLError):
        return f"{path}: {first_line(error)}"
    return f"{path} {reason(error)}"


def text_problem(raw: dict) -> str | None:
    """The sentence about a value of a composed configuration that grows beyond MOST_TEXT.

    raw: with its interpolations. Whatever a text with ${} names counts, so a length is never
    underestimated, and overestimated a little.
    """
    texts = dict(_texts(raw))
    named = defaultdict(set)  # {dotted part of a path: paths of texts}
    for path in texts:
        for start, end in itertools.combinations(range(len(path) + 1), 2):
            named[".".join(path[start:end])].add(path)

    def length(path: tuple[str, ...]) -> int:
        if path not in lengths:
            text = texts[path]
            lengths[path] = 0  # OmegaConf refuses a circle
            words = re.findall(r"[\w.]+", text) if "${" in text else ()
            inner = [length(each) for word in words for each in named.get(word.strip("."), ())]
            lengths[path] = len(text) + sum(inner)
        return lengths[path]

    lengths = {}
    for path in texts:
        if length(path) > MOST_TEXT:
            return (
                f"{'.'.join(path)} has more than {MOST_TEXT:,} characters with its ${{}} filled in"
            )
    return None


def _texts(node: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, text) of every value inside."""
    if not isinstance(node, dict | list):
        yield path, str(node)
        return
    for name, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _texts(child, (*path, str(name)))
