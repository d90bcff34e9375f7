"""What a single setting may be, whatever the others are, and how the schema says so."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from settings.tables import chat_names, sampling_ranges


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


def _of_range(words: str, bounds: dict[str, float]) -> Limit:
    """bounds: {a comparison of `operator`: the number to compare with}."""
    compared = [(getattr(operator, name), bound) for name, bound in bounds.items()]
    inside = bounds.get("le", bounds.get("ge", 1))
    return Limit(words, lambda value: all(holds(value, bound) for holds, bound in compared), inside)


def _between(least: int, most: int) -> Limit:
    words = f"at least {least} and at most {most}"
    return Limit(words, lambda value: least <= value <= most, 2)


BY_WORDS = {words: _of_range(words, bounds) for words, bounds in sampling_ranges().items()}
# what is more would take hours to make, whatever the machine has
BETWEEN = {
    f"at least {least} and at most {most}": _between(least, most)
    for least, most in ((1, 1000), (0, 65_535), (0, 1_000_000), (1, 1_000_000))
}
LIMITS = (
    BY_WORDS
    | BETWEEN
    | {
        "at least 0": Limit("at least 0", lambda value: 0 <= value < math.inf, 0),
        "at least -1": Limit("at least -1", lambda value: value >= -1, 0),
        "above 0": Limit("above 0", lambda value: 0 < value < math.inf, 1.0),
        "in (0, 1)": Limit("in (0, 1)", lambda value: 0 < value < 1, 0.5),
        "in [0, 1)": Limit("in [0, 1)", lambda value: 0 <= value < 1, 0.0),
    }
)
SHARES = Limit("a list of numbers in (0, 1]", lambda value: all(0 < x <= 1 for x in value), [])
COUNTS = Limit(
    "two numbers [least, most] of masked tokens with 1 <= least <= most",
    lambda value: len(value) == 2 and 1 <= value[0] <= value[1],
    [1, 1],
)
CHAT_FIELDS = Limit(
    f"names in your files for some of {', '.join(chat_names())}, such as {{messages:"
    " conversations, user: human}",
    lambda value: all(
        name in chat_names() and isinstance(own, str) and own for name, own in value.items()
    ),
    {},
)
VIEWS = Limit("1 or 2", lambda value: value in (1, 2), 1)
SIZES = Limit(
    "sizes of blocks, at least 1, with their weights above 0, such as {4: 1, 16: 3}",
    lambda value: bool(value) and min(value) >= 1 and all(0 < x < math.inf for x in value.values()),
    {1: 1.0},
)
SCHEDULE = Limit(
    "sizes of blocks, at least 1, by the step from which they are trained, the first 0, such as"
    " {0: 1, 500: 4}",
    lambda value: bool(value) and min(value) == 0 and min(value.values()) >= 1,
    {0: 1},
)
SEED = Limit("from 0 to 4294967295", lambda value: 0 <= value < 2**32, 1)
BATCHES = Limit(
    "a number of batches, at least 1: the training data are an endless stream",
    lambda value: isinstance(value, int) and value >= 1,
    1,
)
BATCHES_OR_SHARE = Limit(
    "a number of batches (0, 1, 2 ...) or a share (0.0 to 1.0)",
    lambda value: value >= 0 and (isinstance(value, int) or value <= 1),
    1.0,
)
DURATION = Limit(
    "DD:HH:MM:SS, such as 01:12:00:00",
    lambda value: re.fullmatch(r"[0-9]{1,6}(:[0-9]{2}){3}", value) is not None,
    "01:00:00:00",
)


def doc(text: str, limit: Limit | str | None = None, default: object = None):
    """A required setting: what --help says about it, and what it may be beside its type (the words
    of LIMITS, or a Limit). With `default` it needs no line in configs/."""
    limit = LIMITS[limit] if isinstance(limit, str) else limit
    return field(metadata={"doc": text, "limit": limit, "default": default})
