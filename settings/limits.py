"""What a single setting may be, whatever the others are, and how the schema says so."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from settings.tables import sampling_ranges


@dataclass(frozen=True)
class Limit:
    """`words` end the sentence "KEY=VALUE must be ...". With `stand_in`, a value inside the limit,
    the rules between settings go on, so that one run of the command shows all problems."""

    words: str
    holds: Callable[[object], bool]
    stand_in: object
    names: tuple[str, ...] = ()  # of a choice


HIDDEN = re.compile("[\0-\b\v-\x1f\x7f\ud800-\udfff]")  # tabs and line breaks are text
MOST = 2**32 - 1  # of any whole number, such as a seed


def unfit(value: object) -> str | None:
    """What no setting may be, as the end of the sentence "KEY=VALUE ..."; None: it may."""
    if isinstance(value, int) and abs(value) > MOST:
        return f"must be at most {MOST}"
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and HIDDEN.search(text):
            return "must be UTF-8 text without control characters"
    return None


def one_of(*names: str) -> Limit:
    return Limit(f"one of {', '.join(names)}", names.__contains__, names[0], names)


def _of_range(words: str, bounds: dict[str, float], inside: float | None = None) -> Limit:
    """bounds: {a comparison of `operator`: the number to compare with}."""
    compared = [(getattr(operator, name), bound) for name, bound in bounds.items()]
    inside = bounds.get("le", bounds.get("ge", 1)) if inside is None else inside
    return Limit(words, lambda value: all(holds(value, bound) for holds, bound in compared), inside)


BY_WORDS = {words: _of_range(words, bounds) for words, bounds in sampling_ranges().items()}
LIMITS = BY_WORDS | {
    words: _of_range(words, bounds, inside)
    for words, bounds, inside in (
        ("at least 0", {"ge": 0, "lt": math.inf}, 0),
        ("at least -1", {"ge": -1}, 0),
        ("above 0", {"gt": 0, "lt": math.inf}, 1.0),
        ("in (0, 1)", {"gt": 0, "lt": 1}, 0.5),
        ("in [0, 1)", {"ge": 0, "lt": 1}, 0.0),
        ("at least 0 and at most 65535", {"ge": 0, "le": 65_535}, 2),
        # what is more would take hours to make, whatever the machine has
        ("at least 1 and at most 1000", {"ge": 1, "le": 1000}, 2),
        ("at least 0 and at most 1000000", {"ge": 0, "le": 1_000_000}, 2),
        ("at least 1 and at most 1000000", {"ge": 1, "le": 1_000_000}, 2),
    )
}
SIZES = Limit(
    "sizes of blocks, at least 1, with their weights above 0, such as {4: 1, 16: 3}",
    lambda value: bool(value) and min(value) >= 1 and all(0 < x < math.inf for x in value.values()),
    {1: 1.0},
)


def doc(text: str, limit: Limit | str | None = None, default: object = None):
    """A required setting: what --help says about it, and what it may be beside its type (the words
    of LIMITS, or a Limit). With `default` it needs no line in configs/."""
    limit = LIMITS[limit] if isinstance(limit, str) else limit
    return field(metadata={"doc": text, "limit": limit, "default": default})
