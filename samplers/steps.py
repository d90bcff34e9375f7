"""Which masked tokens are revealed by which evaluation: the step rules, one table.

A *planned* rule does not look at the network: its whole plan for a block is made on the host before
the block begins, so nothing has to be asked back from the device. An *adaptive* rule looks at the
distributions of all masked positions, at temperature 1 and before top-k and nucleus, and chooses;
it may look at chance too.

    first_hitting  one position per evaluation, uniformly chosen (arXiv:2409.02908)
    ancestral      T steps from t = 1 to 1e-3: a masked token stays masked with chance p(s) / p(t);
                   the last step reveals all that is left. Steps that reveal nothing ask nothing:
                   the input is unchanged
    remask         ancestral, and in each step a token seen is masked again with chance sigma
                   (ReMDM-cap, arXiv:2503.00307)
    confidence     the k positions of greatest confidence; with an order temperature k are drawn
                   with chances exp(confidence / temperature), as in Dream (arXiv:2508.15487)
    low_confidence the k positions whose tokens, drawn anew in each evaluation, are most probable;
                   the others stay masked (LLaDA, arXiv:2502.09992)
    threshold      all positions whose greatest probability reaches a threshold, at least one
    entropy_bounded
                   the positions of least entropy, as long as the entropies of those before the last
                   one sum to at most a bound (EB-Sampler, arXiv:2505.24857)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .draw import fold, sample, uniform
from .warping import COLDEST

LAST_TIME = 1e-3
ORDER, CHAIN = 0, 1  # numbers of the streams of a position; its draws are numbered from DRAW on
DRAW = 2


@dataclass(frozen=True)
class RevealPlan:
    """Which evaluation of a round reveals which token of which row, int64 [n] each. Every row has
    evaluations 0, 1, 2 … without gaps, and in the end no token is masked."""

    row: Tensor
    position: Tensor
    evaluation: Tensor
    drawn: Tensor  # how often the token was drawn before
    again: tuple[Tensor, Tensor, Tensor] | None = None  # row, position, evaluation masked again for

    def evaluations(self, rows: int) -> list[int]:
        """How many each of `rows` rows is asked in. ValueError where a row has a gap."""
        numbers = (self.evaluation * rows + self.row).bincount()
        asked = F.pad(numbers, (0, -len(numbers) % rows)).view(-1, rows) > 0
        for before, row in (asked[1:] & ~asked[:-1]).nonzero()[:1].tolist():
            raise ValueError(
                f"the plan of the step rule has an evaluation {before + 1} of row {row}, but no"
                f" {before}: number those of a row 0, 1, 2 … without gaps, as asked_until does"
            )
        return asked.sum(0).tolist()

    def check_ends(self, masked: Tensor, rows: int) -> None:
        """ValueError where not all is revealed. masked: the row of each masked token, int64 [m]."""
        again = self.again[0] if self.again else self.row[:0]
        wanted, shown, hidden = (
            each.bincount(minlength=rows) for each in (masked, self.row, again)
        )
        for row in (shown - hidden != wanted).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"the plan of the step rule reveals {shown[row] - hidden[row]} tokens of row {row},"
                f" of which {wanted[row]} are masked: reveal each of them"
            )


def rank_in_group(group: Tensor) -> Tensor:
    """Of each entry the number of earlier ones in its group; group ascending [n]."""
    return torch.arange(len(group)) - torch.searchsorted(group, group)


def asked_until(row: Tensor, step: Tensor, asked: Tensor, steps: int) -> Tensor:
    """How many evaluations a row has had when `step` is over: a step that reveals nothing asks
    nothing. asked: row * steps + step of every evaluation, ascending."""
    first = torch.searchsorted(asked, row * steps)
    return torch.searchsorted(asked, row * steps + step, right=True) - first


def first_hitting(keys: Tensor, row: Tensor, position: Tensor, params) -> RevealPlan:
    order = uniform(fold(keys, ORDER)).argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row, position = row[order], position[order]
    return RevealPlan(row, position, rank_in_group(row), torch.zeros_like(row))


def times(params) -> Tensor:
    """Chance to be masked at the T + 1 times of the ancestral rule, float64 [T + 1], decreasing."""
    t = torch.linspace(1, LAST_TIME, params.num_steps + 1, dtype=torch.float64)
    return params.move_chance(t)


def ancestral(keys: Tensor, row: Tensor, position: Tensor, params) -> RevealPlan:
    """A token is still masked after step i with chance p(t_i) / p(t_0): one number decides when it
    is revealed, and the last step reveals the rest."""
    p = times(params)
    stay = p[1:-1] / p[0]  # [T - 1], decreasing
    step = torch.searchsorted(-stay, -uniform(fold(keys, ORDER)))
    asked = (row * params.num_steps + step).unique()
    evaluation = asked_until(row, step, asked, params.num_steps) - 1
    return RevealPlan(row, position, evaluation, torch.zeros_like(row))


def remask(keys: Tensor, row: Tensor, position: Tensor, params) -> RevealPlan:
    """The chain of a position (masked or seen) does not depend on tokens, so it is run ahead."""
    p, steps = times(params), params.num_steps
    masked = torch.ones(len(keys), dtype=torch.bool)
    drawn = torch.zeros_like(position)
    revealed, masked_again = [], []  # (index, step, drawn before), (index, step)
    for i in range(steps):
        chances = remask_chances(p[i], p[i + 1], params.remask_eta)
        reveal_chance, remask_chance = (1, 0) if i == steps - 1 else chances
        u = uniform(fold(fold(keys, CHAIN), i))
        shown = masked & (u < reveal_chance)
        again = ~masked & (u < remask_chance)
        masked = (masked & ~shown) | again
        index, back = shown.nonzero()[:, 0], again.nonzero()[:, 0]
        revealed.append(torch.stack([index, torch.full_like(index, i), drawn[index]]))
        masked_again.append(torch.stack([back, torch.full_like(back, i)]))
        drawn = drawn + shown
    index, step, before = torch.cat(revealed, 1)
    back, back_step = torch.cat(masked_again, 1)
    shown_row, back_row = row[index], row[back]
    asked = (shown_row * steps + step).unique()
    evaluation = asked_until(shown_row, step, asked, steps) - 1
    masked_again = back_row, position[back], asked_until(back_row, back_step, asked, steps)
    return RevealPlan(shown_row, position[index], evaluation, before, masked_again)


def remask_chances(p_t: Tensor, p_s: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Chances, from t to s < t, that a masked token is revealed and that one seen is masked."""
    sigma = torch.clamp(p_s / (1 - p_t).clamp(min=1e-12), max=1.0).clamp(max=cap)
    reveal = ((1 - p_s) - (1 - sigma) * (1 - p_t)) / p_t
    return reveal, sigma


@dataclass(frozen=True)
class Chance:
    """The random numbers of one evaluation, for an adaptive rule: one stream for each position
    [B, R], a function of the seed, the row, the position and the number of the evaluation in its
    block, whatever the batch. Asked twice in an evaluation, it answers alike."""

    log_probs: Tensor  # [B, R, V]
    keys: Tensor  # of the positions, int64 [B, R]
    evaluation: Tensor | int  # 0, 1, 2 … in the block, int64 []
    params: object

    def uniform(self) -> Tensor:
        """In (0, 1), float64 [B, R]."""
        return uniform(fold(fold(self.keys, CHAIN), self.evaluation))

    def gumbel(self) -> Tensor:
        """Gumbel(0, 1), float64 [B, R]: the k greatest of score + noise are k draws without
        replacement from softmax(score)."""
        return -(-self.uniform().log()).log()

    @cached_property
    def tokens(self) -> Tensor:
        """A token drawn for each position in this evaluation, int64 [B, R]; what is revealed is
        written as it was drawn."""
        return self._sample(self.log_probs, fold(self.keys, DRAW + 1 + self.evaluation))

    def drawn(self, picked: Tensor) -> Tensor:
        """The tokens of picked [B, P], places among the R. Where the rule saw none they are drawn
        for these places only."""
        if "tokens" in vars(self):
            return self.tokens.gather(1, picked)
        chosen = picked[..., None].expand(-1, -1, self.log_probs.shape[-1])
        keys = fold(self.keys.gather(1, picked), DRAW)
        return self._sample(self.log_probs.gather(1, chosen), keys)

    def _sample(self, log_probs: Tensor, keys: Tensor) -> Tensor:
        return sample(log_probs, keys, self.params.warp, self.params.dtype)


def by_probability(log_probs: Tensor) -> Tensor:
    return log_probs.amax(-1)


def by_margin(log_probs: Tensor) -> Tensor:
    first, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second


def by_entropy(log_probs: Tensor) -> Tensor:
    return -torch.special.entr(log_probs.exp()).sum(-1)


CONFIDENCES = {"probability": by_probability, "margin": by_margin, "entropy": by_entropy}


def greatest(score: Tensor, masked: Tensor, k: int) -> Tensor:
    """The k masked positions of greatest score; of equal ones the first. [..., R] all."""
    score = score.masked_fill(~masked, -torch.inf)
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(masked).scatter(-1, best, True) & masked


def most_confident(log_probs: Tensor, masked: Tensor, params, chance: Chance) -> Tensor:
    score = CONFIDENCES[params.confidence](log_probs)
    if params.order_temperature > COLDEST:
        # of the probability itself, whose logarithm tells more of them apart
        score = score.exp() if params.confidence == "probability" else score
        score = score.double() / params.order_temperature + chance.gumbel()
    return greatest(score, masked, params.k)


def low_confidence(log_probs: Tensor, masked: Tensor, params, chance: Chance) -> Tensor:
    score = log_probs.gather(-1, chance.tokens[..., None])[..., 0]
    return greatest(score, masked, params.k)


def above_threshold(log_probs: Tensor, masked: Tensor, params, chance: Chance) -> Tensor:
    return at_least(by_probability(log_probs), masked, params.threshold)


def at_least(log_p: Tensor, masked: Tensor, threshold: float) -> Tensor:
    """The masked positions whose probability reaches the threshold, and always the greatest; of
    equal ones the first. [..., R] all."""
    first = greatest(log_p, masked, 1)
    if threshold >= 1:  # rounding may turn a chance just below 1 into 1: stay sequential
        return first
    return first | ((log_p.exp() >= threshold) & masked)


def entropy_bounded(log_probs: Tensor, masked: Tensor, params, chance: Chance) -> Tensor:
    return within_entropy(-by_entropy(log_probs), masked, params.entropy_bound)


def within_entropy(entropy: Tensor, masked: Tensor, bound: float) -> Tensor:
    """The masked positions of least entropy, of equal ones the first, as long as the sum without
    the last is at most `bound`: one at least. [..., R] all."""
    ordered, order = entropy.double().masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
    before = F.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
    return torch.zeros_like(masked).scatter(-1, order, before <= bound) & masked


@dataclass(frozen=True)
class Planned:
    """`plan(keys, row, position, params)`: of all masked tokens of the batch, row after row,
    int64 [n] each; position counts from the start of the text. `reads`: the fields of
    SamplingParams that it looks at."""

    plan: Callable[[Tensor, Tensor, Tensor, object], RevealPlan]
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adaptive:
    """`choose(log_probs [B, R, V], masked [B, R], params, chance) -> reveal [B, R]`, at least one
    where any is masked.

    `sequential`: exactly `k` are revealed, or as many as are left; exactly one where the rule does
    not read `k`. So the host knows how many are left. `reads`: the fields of SamplingParams that it
    looks at.
    """

    choose: Callable[[Tensor, Tensor, object, Chance], Tensor]
    sequential: bool
    reads: tuple[str, ...] = ()


# settings/ reads this table without importing it: names and keywords are literals. A number that
# `reads` names is the setting sampling.NAME; num_steps is algo.T.
STEPS = {
    "first_hitting": Planned(first_hitting),
    "ancestral": Planned(ancestral, reads=("num_steps",)),
    "remask": Planned(remask, reads=("num_steps", "remask_eta")),
    "confidence": Adaptive(
        most_confident, sequential=True, reads=("k", "confidence", "order_temperature")
    ),
    "low_confidence": Adaptive(low_confidence, sequential=True, reads=("k",)),
    "threshold": Adaptive(above_threshold, sequential=False, reads=("threshold",)),
    "entropy_bounded": Adaptive(entropy_bounded, sequential=False, reads=("entropy_bound",)),
}
