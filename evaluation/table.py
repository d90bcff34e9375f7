"""Which likelihoods there are, what each is, and how many passes over a text it takes.

A name may carry a number: iw:8 (orders), threshold:0.9, greedy:4 (positions revealed at a time).
A step rule that looks at the drawn token (low_confidence) or at chance has no likelihood here: the
way to a text is not known from the text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from evaluation import estimators
from samplers.params import in_range

BOUND = "upper bound (NELBO)"
NO_LIKELIHOOD = "a step rule that looks at the drawn token or at chance has no likelihood"


@dataclass(frozen=True)
class Kind:
    """`estimate(ask, texts, chance, number)` -> nats per token float64 [B, L]; `law`: whose
    likelihood that is. `passes(S, number)`: over the noised half, for each draw. `number`: what the
    name may carry, with its type, its limit (a key of RANGES) and its default; None: it must be
    given."""

    estimate: Callable
    passes: Callable[[int, float | None], int]
    law: str
    sampled: bool = False
    number: str = ""
    type: type = int
    limit: str = "at least 1"
    default: float | None = None


def one(size: int, number) -> int:
    return 1


def sets(size: int, number) -> int:
    return (1 << size) - 1


def rule(estimate: Callable, law: str) -> Kind:
    """Of a step rule that reveals a given number of positions at a time."""
    passes, number = lambda size, number: -(-size // int(number)), "positions at a time"
    return Kind(estimate, passes, f"exact for {law}", number=number, default=1)


LIKELIHOODS = {
    "nelbo": Kind(estimators.nelbo, one, BOUND, sampled=True),
    "counts": Kind(estimators.counts, one, BOUND, sampled=True),
    "exact": Kind(estimators.exact, sets, BOUND),
    "first_hitting": Kind(estimators.first_hitting, sets, "exact for steps=first_hitting"),
    "iw": Kind(
        estimators.importance,
        lambda size, number: size * int(number),
        "upper bound (IW)",
        sampled=True,
        number="orders drawn",
    ),
    "left_to_right": rule(estimators.left_to_right, "revealing from the left"),
    "greedy": rule(estimators.greedy, "steps=confidence by probability"),
    "margin": rule(estimators.margin, "steps=confidence by margin"),
    "threshold": Kind(
        estimators.threshold,
        lambda size, number: size,  # at most
        "exact for steps=threshold",
        number="a probability",
        type=float,
        limit="in (0, 1]",
    ),
    "entropy_bounded": Kind(
        estimators.entropy_bounded,
        lambda size, number: size,  # at most
        "exact for steps=entropy_bounded",
        number="a bound in nats",
        type=float,
        limit="at least 0",
    ),
}


@dataclass(frozen=True)
class Chosen:
    """A likelihood as it was asked for."""

    name: str
    number: float | None
    label: str  # as typed

    @property
    def kind(self) -> Kind:
        return LIKELIHOODS[self.name]

    def passes(self, block_size: int, draws: int = 1) -> int:
        """Over the noised half of a text; the clean half is one more, for all together."""
        return self.kind.passes(block_size, self.number) * (draws if self.kind.sampled else 1)

    def estimate(self, ask, texts, chance=None):
        return self.kind.estimate(ask, texts, chance, self.number)


def parse_likelihood(label: str) -> Chosen:
    """The likelihood of a name, such as iw:8. ValueError says what is wrong with it."""
    name, colon, text = label.partition(":")
    if name not in LIKELIHOODS:
        raise ValueError(
            f"eval.likelihood={label} must be one of {', '.join(LIKELIHOODS)}; {NO_LIKELIHOOD}"
        )
    kind = LIKELIHOODS[name]
    if colon and not kind.number:
        raise ValueError(f"eval.likelihood={label}: {name} takes no number")
    if not colon and kind.number and kind.default is None:
        raise ValueError(f"eval.likelihood={label} needs a number, {kind.number}: {name}:NUMBER")
    if not colon:
        return Chosen(name, kind.default, label)
    try:
        number = kind.type(text)
    except ValueError:
        number = math.nan  # which is in no range
    if not in_range(kind.limit, number):
        whole = "a whole number, " if kind.type is int else ""
        allowed = f"{kind.number} must be {whole}{kind.limit}"
        raise ValueError(f"eval.likelihood={label}: {allowed}, got {text!r}")
    return Chosen(name, number, label)


def check_training(wanted: list[Chosen], *, exact: bool) -> None:
    """ValueError where training cannot validate by it. exact: one pass gives every likelihood."""
    single = [each for each in wanted if each.kind.passes is one]
    if len(wanted) > 1 or (not single and not exact):
        names = ",".join(each.label for each in wanted)
        raise ValueError(
            f"eval.likelihood={names}: training validates by one likelihood that takes one pass,"
            " nelbo or counts; the others are for mode=ppl_eval"
        )


def check_likelihoods(
    wanted: list[Chosen], *, algo: str, block_size: int, draws: int, most: int
) -> None:
    """ValueError where the algorithm has no such likelihood, or where it would take too long.
    block_size: L for mdlm, 1 for ar. most: passes over a text that are allowed."""
    for each in wanted:
        if algo == "sedd" and each.name != "nelbo":
            raise ValueError(
                f"eval.likelihood={each.label}: algo=sedd tells its network the noise level, so a"
                " set of masked tokens has no probability of its own: only nelbo is defined"
            )
        passes = 1 if algo in ("ar", "sedd") else each.passes(block_size, draws)
        if passes > most:
            endless = each.kind.passes is sets and passes > 10**12
            many = f"2^{block_size} - 1" if endless else f"{passes:,}"
            raise ValueError(
                f"eval.likelihood={each.label} takes {many} passes over every text, more than"
                f" eval.max_passes={most:,}; counts takes one"
            )
