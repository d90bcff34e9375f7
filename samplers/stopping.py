"""When a text of variable length ends, and where it is cut.

At the first EOS generated after position 0, which is kept; or where the last 256 tokens have an
entropy below 4 nats, which are then cut away (a sign that the text has begun to repeat itself). The
earlier cut counts.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

ENTROPY_TOKENS = 256
ENTROPY_NATS = 4.0
MOST_TRIES = 10  # of sampling.reject_low_entropy


class Stop(NamedTuple):
    length: int  # tokens kept
    seen: int  # tokens that existed when it was noticed
    reason: str


def entropy(tokens: Tensor) -> float:
    """Entropy of the ids' frequencies in nats, of tokens [n]; 0 for none."""
    counts = tokens.unique(return_counts=True)[1].double()
    p = counts / max(len(tokens), 1)
    return -(p * p.log()).sum().item() + 0.0


def low_entropy(tokens: Tensor) -> bool:
    """Of the last 256 tokens; False where there are fewer."""
    return len(tokens) >= ENTROPY_TOKENS and entropy(tokens[-ENTROPY_TOKENS:]) < ENTROPY_NATS


def find_stop(tail: Tensor, end: int, looks: Iterable[int], fresh: int, given: int, eos_id: int):
    """The Stop of a text of `end` tokens whose last ones are `tail` [n] (on the CPU), or None.

    `looks`: the lengths at which the rules are applied, ascending. `fresh`: the first position that
    was not looked at before. The first `given` tokens are the user's: no EOS there ends the text,
    and no cut enters them.
    """
    offset, first = end - len(tail), max(fresh, given, 1)
    found = (tail[first - offset :] == eos_id).nonzero()
    eos = first + int(found[0]) + 1 if len(found) else math.inf
    for seen in looks:
        cuts = [Stop(int(eos), seen, "eos")] if eos <= seen else []
        if low_entropy(tail[: seen - offset]):
            cuts.append(Stop(max(seen - ENTROPY_TOKENS, given), seen, "entropy"))
        if cuts:
            return min(cuts)
    return None
