"""Which hidden tokens are revealed by which evaluation: the step rules, one table.

A *planned* rule does not look at the network: its whole plan for a block follows from the random
numbers of the positions, so it is made on the host before the block begins, a step knows the
positions it reveals before the head runs, and nothing has to be asked back from the device. An
*adaptive* rule looks at the distributions of all hidden positions and chooses.

    first_hitting  one position per evaluation, uniformly chosen (arXiv:2409.02908)
    ancestral      T steps from t = 1 to 1e-3: a hidden token stays hidden with chance p(s) / p(t);
                   the last step reveals all that is left. Steps that reveal nothing ask nothing:
                   the input is unchanged
    remask         ancestral, and in each step a token seen is hidden again with chance sigma
                   (ReMDM-cap, arXiv:2503.00307)
    confidence     the k positions of greatest confidence
    threshold      all positions whose greatest probability reaches a threshold, at least one
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .draw import fold, uniform

LAST_TIME = 1e-3
ORDER, CHAIN = 0, 1  # numbers of the streams of a position; its draws are numbered from DRAW on
DRAW = 2


@dataclass(frozen=True)
class Event:
    """One evaluation of one text: positions hidden before it, and (position, how often it was drawn
    before).
    """

    reveal: list[tuple[int, int]]
    hide: list[int] = field(default_factory=list)


Plan = list[Event]


def first_hitting(keys: Tensor, fills: list[list[int]], settings) -> list[Plan]:
    order = iter(uniform(fold(keys, ORDER)).tolist())
    ordered = [sorted((next(order), position) for position in fill) for fill in fills]
    return [[Event([(position, 0)]) for _, position in fill] for fill in ordered]


def times(settings) -> Tensor:
    """Chance to be hidden at the T + 1 times of the ancestral rule, float64 [T + 1], decreasing."""
    t = torch.linspace(1, LAST_TIME, settings.num_steps + 1, dtype=torch.float64)
    return settings.move_chance(t)


def ancestral(keys: Tensor, fills: list[list[int]], settings) -> list[Plan]:
    """A token is still hidden after step i with chance p(t_i) / p(t_0): one number decides when it
    is revealed, and the last step reveals the rest."""
    p = times(settings)
    stay = p[1:-1] / p[0]  # [T - 1], decreasing
    step = iter(torch.searchsorted(-stay, -uniform(fold(keys, ORDER))).tolist())
    plans = []
    for fill in fills:
        found = {}
        for position in fill:
            found.setdefault(next(step), []).append((position, 0))
        plans.append([Event(found[i]) for i in sorted(found)])
    return plans


def remask(keys: Tensor, fills: list[list[int]], settings) -> list[Plan]:
    """The chain of one position (hidden or seen) does not depend on the tokens, so it is run
    ahead."""
    p = times(settings)
    place = [(row, position) for row, fill in enumerate(fills) for position in fill]
    hidden = torch.ones(len(place), dtype=torch.bool)
    drawn = [0] * len(place)
    plans, hide = [[] for _ in fills], [[] for _ in fills]
    for i in range(settings.num_steps):
        chances = remask_chances(p[i], p[i + 1], settings.remask_eta)
        reveal_chance, hide_chance = (1, 0) if i == settings.num_steps - 1 else chances
        u = uniform(fold(fold(keys, CHAIN), i))
        shown = hidden & (u < reveal_chance)
        again = ~hidden & (u < hide_chance)
        hidden = (hidden & ~shown) | again
        events = {}
        for j in shown.nonzero().flatten().tolist():
            row, position = place[j]
            events.setdefault(row, []).append((position, drawn[j]))
            drawn[j] += 1
        for row, reveal in events.items():
            plans[row].append(Event(reveal, hide[row]))
            hide[row] = []
        for j in again.nonzero().flatten().tolist():
            row, position = place[j]
            hide[row].append(position)
    return plans


def remask_chances(p_t: Tensor, p_s: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(chance that a hidden token is revealed, chance that one seen is hidden) in the step from t
    to s < t.
    """
    sigma = torch.clamp(p_s / (1 - p_t).clamp(min=1e-12), max=1.0).clamp(max=cap)
    reveal = ((1 - p_s) - (1 - sigma) * (1 - p_t)) / p_t
    return reveal, sigma


def by_probability(log_probs: Tensor) -> Tensor:
    return log_probs.amax(-1)


def by_margin(log_probs: Tensor) -> Tensor:
    first, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second


def by_entropy(log_probs: Tensor) -> Tensor:
    return -torch.special.entr(log_probs.exp()).sum(-1)


CONFIDENCES = {"probability": by_probability, "margin": by_margin, "entropy": by_entropy}


def most_confident(log_probs: Tensor, hidden: Tensor, settings) -> Tensor:
    score = CONFIDENCES[settings.confidence](log_probs).masked_fill(~hidden, -torch.inf)
    best = score.argsort(dim=-1, descending=True, stable=True)[:, : settings.k]
    return torch.zeros_like(hidden).scatter(1, best, True) & hidden


def above_threshold(log_probs: Tensor, hidden: Tensor, settings) -> Tensor:
    score = by_probability(log_probs).masked_fill(~hidden, -torch.inf)
    first = torch.zeros_like(hidden).scatter(1, score.argmax(1, keepdim=True), True)
    if settings.threshold >= 1:  # rounding may turn a chance just below 1 into 1: stay sequential
        return first & hidden
    return (first | (score.exp() >= settings.threshold)) & hidden


@dataclass(frozen=True)
class Planned:
    """`plan(keys [n], fills, settings)`: fills[b] are row b's hidden positions, n in all, with a
    key each.
    """

    plan: Callable[[Tensor, list[list[int]], object], list[Plan]]


@dataclass(frozen=True)
class Adaptive:
    """`choose(log_probs [B, R, V], hidden [B, R], settings) -> reveal [B, R]`, at least one where
    any is hidden.

    `sequential`: exactly `k` are revealed, so the host knows how many are left
    without asking.
    """

    choose: Callable[[Tensor, Tensor, object], Tensor]
    sequential: bool


STEPS = {
    "first_hitting": Planned(first_hitting),
    "ancestral": Planned(ancestral),
    "remask": Planned(remask),
    "confidence": Adaptive(most_confident, sequential=True),
    "threshold": Adaptive(above_threshold, sequential=False),
}
