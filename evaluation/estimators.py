"""Likelihoods of a block diffusion model, as functions of a callable that stands for the network.

    ask(x_t int64 [B, L], read int64 [M], reduce) -> reduce's answers, joined: [M, ...]

`read` are positions of the flattened x_t, all of them masked there. The network makes their
log-probabilities a few at a time and hands them to `reduce(log_probs [m, V], read [m])`, so that
[M, V] never exists. Given the clean text all blocks are independent: one pass asks the same
question of every block.

For a block with n tokens to score and a set M of them masked, a(M, i) = -log p(x_i | the clean
blocks before, the block's tokens outside M). Everything here is made of these numbers. Sources:
MDLM arXiv:2406.07524, Block Diffusion 2503.09573, any-order AR 2205.13554, IWAE 1509.00519, DUEL
2603.01367.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.randomness import uniform
from objectives.corruption import log_binomial, rank_in_block
from objectives.counts import UNIFORM, masked_by_counts
from samplers.steps import (
    at_least,
    by_entropy,
    by_margin,
    by_probability,
    greatest,
    within_entropy,
)

Ask = Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor]

ROWS, BLOCKS, TOKENS, TIMES = range(4)  # independent streams of random numbers
EPS = 1e-3  # where the times of `nelbo` begin, unless told otherwise


@dataclass(frozen=True)
class AskedTexts:
    """`scored` boolean [B, L]: the tokens whose likelihood is asked for. The others (the first of a
    text, a prompt, padding, masks in the text itself) are never masked."""

    x0: Tensor  # int64 [B, L]
    scored: Tensor
    block_size: int
    mask_id: int

    def per_block(self, x: Tensor) -> Tensor:
        """[B, L] -> [B, N, S]."""
        return x.unflatten(1, (-1, self.block_size))

    @property
    def counts(self) -> Tensor:
        """n, the tokens to score of each block, int64 [B, N, 1]."""
        return self.per_block(self.scored).sum(-1, keepdim=True)

    def surprisal(self, ask: Ask, masked: Tensor, about: Tensor | None = None) -> Tensor:
        """a(masked, i) for the tokens `about` (all that are masked), 0 elsewhere: float64 [B, L].
        masked, about: boolean [B, L]."""
        read = (masked if about is None else about).flatten().nonzero()[:, 0]
        x_t = torch.where(masked, self.mask_id, self.x0)
        return self.scatter(read, ask(x_t, read, self.nll).double())

    def nll(self, log_probs: Tensor, read: Tensor) -> Tensor:
        """-log p of the true tokens, [m]."""
        return -log_probs.gather(1, self.x0.flatten()[read][:, None])[:, 0]

    def scatter(self, read: Tensor, values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """values [M] at the places `read`, [B, L]."""
        out = torch.full((self.x0.numel(),), elsewhere, dtype=values.dtype, device=values.device)
        return out.index_copy_(0, read, values).view(self.x0.shape)

    def shared_out(self, of_block: Tensor) -> Tensor:
        """Values of blocks [B, N], of which tokens have no part of their own: equal shares for the
        tokens that are scored, [B, L]."""
        share = of_block[..., None] / self.counts.clamp(min=1)
        return (share * self.per_block(self.scored)).flatten(1)


@dataclass(frozen=True)
class Chance:
    """The random numbers of one draw: functions of the seed and of a text's number `rows` int64
    [B], so they do not depend on the batch. `total`: texts of the evaluation, or of a group of them
    that shares its strata."""

    seed: int
    rows: Tensor
    total: int

    def tokens(self, like: Tensor, *stream: int) -> Tensor:
        """One per token of like [B, L]; `stream` tells draws apart."""
        place = self.rows[:, None], torch.arange(like.shape[1])
        return uniform(self.seed, TOKENS, *stream, *place, dtype=torch.float64).to(like.device)

    def times(self, blocks: Tensor) -> Tensor:
        """One per block, [B, N], of blocks [B, N, S]: independent."""
        place = self.rows[:, None], torch.arange(blocks.shape[1])
        return uniform(self.seed, TIMES, *place, dtype=torch.float64).to(blocks.device)

    def strata(self, blocks: Tensor) -> Tensor:
        """One per block, [B, N], of blocks [B, N, S]. [0, 1) is cut into N parts and these into
        `total` each: every text has all N parts, one for each of its blocks, and over the whole
        evaluation every piece is met once."""
        number = blocks.shape[1]
        place = self.rows[:, None], torch.arange(number)
        part = uniform(self.seed, BLOCKS, *place, dtype=torch.float64).argsort(1).argsort(1)
        group, every = self.rows // self.total, torch.arange(self.total)
        dealt = uniform(self.seed, ROWS, group.unique()[:, None], every, dtype=torch.float64)
        which = torch.searchsorted(group.unique(), group)
        piece = dealt.argsort(1).argsort(1)[which, self.rows % self.total]
        inside = uniform(self.seed, TIMES, *place, dtype=torch.float64)
        found = (part + (piece[:, None] + inside) / self.total) / number
        return found.to(blocks.device)


def rank_of_scored(keys: Tensor, texts: AskedTexts) -> Tensor:
    """Where each token stands in its block when those scored are ordered by keys [B, L]; the others
    stand behind them. int64 [B, N, S]."""
    return rank_in_block(keys.masked_fill(~texts.scored, math.inf), texts.block_size)


# ---- bounds


def nelbo(ask: Ask, texts: AskedTexts, chance: Chance, number=None) -> Tensor:
    """Nats per token [B, L], one draw: a time per block, uniform on [EPS, 1]; weight 1 / t."""
    t = EPS + (1 - EPS) * chance.times(texts.per_block(texts.x0))[..., None]
    masked = texts.per_block(chance.tokens(texts.x0)) <= t
    masked = masked.flatten(1) & texts.scored
    return (texts.per_block(texts.surprisal(ask, masked)) / t).flatten(1)


def counts(ask: Ask, texts: AskedTexts, chance: Chance, number=None) -> Tensor:
    """Nats per token [B, L], one draw: m tokens of a block masked, weight n / m. The bound of
    `nelbo` over all of (0, 1], the time summed out: given the number of masked tokens every set is
    equally likely, whatever the schedule."""
    masked, weight = drawn_counts(texts, chance)
    return weight * texts.surprisal(ask, masked)


def drawn_counts(texts: AskedTexts, chance: Chance) -> tuple[Tensor, Tensor]:
    """Which tokens `counts` masks, boolean [B, L], and its weights n / m, float64 [B, L]."""
    u = chance.strata(texts.per_block(texts.x0))
    return masked_by_counts(UNIFORM, u, chance.tokens(texts.x0), texts.scored)


def exact(ask: Ask, texts: AskedTexts, chance=None, number=None) -> Tensor:
    """The bound itself, nats per token [B, L]: sum over M of sum over i in M of w a(M, i), w = 1 /
    (m C(n, m)). It is the mean over all orders of -log p(x | order)."""
    n, total = texts.counts, 0.0
    for _, masked in subsets(texts):
        m = masked.sum(-1, keepdim=True)
        weight = 1 / (m * log_binomial(n, m).exp().round()).clamp(min=1)
        total = total + weight * texts.per_block(texts.surprisal(ask, masked.flatten(1)))
    return total.flatten(1)


def subsets(texts: AskedTexts) -> Iterator[tuple[int, Tensor]]:
    """(number, masked boolean [B, N, S]) for every set of places of a block but the empty one, a
    set after those inside it. Blocks in which a place of the set is not scored mask nothing."""
    scored, place = texts.per_block(texts.scored), torch.arange(texts.block_size)
    for number in range(1, 1 << texts.block_size):
        chosen = ((number >> place) & 1).bool().to(scored.device)
        possible = (scored | ~chosen).all(-1, keepdim=True)
        yield number, chosen & possible


def importance(ask: Ask, texts: AskedTexts, chance: Chance, number: int) -> Tensor:
    """-log of the mean of p(x | order) over `number` orders drawn for each block; [B, L], a block's
    value in equal shares."""
    found = []
    for draw in range(number):
        place = rank_of_scored(chance.tokens(texts.x0, 1 + draw), texts)
        found.append(-texts.per_block(in_order(ask, texts, place)).sum(-1))
    return texts.shared_out(math.log(number) - torch.stack(found).logsumexp(0))


def in_order(ask: Ask, texts: AskedTexts, place: Tensor) -> Tensor:
    """-log p of each token in the step `place` that reveals it, of its block: [B, L]. place: int64
    [B, N, S]; steps follow each other from 0."""
    total = 0.0
    for step in range(int(place.max()) + 1):
        masked = (place >= step).flatten(1) & texts.scored
        about = (place == step).flatten(1) & texts.scored
        total = total + texts.surprisal(ask, masked, about)
    return total


# ---- laws of samplers


def first_hitting(ask: Ask, texts: AskedTexts, chance=None, number=None) -> Tensor:
    """-log of the chance that first hitting writes the block, all orders together: A(M) = log of
    the mean over i in M of exp(A(M without i) - a(M, i)). [B, L], a block's value in equal shares.
    """
    blocks, size = texts.per_block(texts.x0), texts.block_size
    shape = (1 << size, *blocks.shape[:2])
    log_p = torch.zeros(shape, dtype=torch.float64, device=blocks.device)
    for number, masked in subsets(texts):
        nll = texts.per_block(texts.surprisal(ask, masked.flatten(1)))
        inside = [i for i in range(size) if number >> i & 1]
        ways = [log_p[number ^ 1 << i] - nll[..., i] for i in inside]
        log_p[number] = torch.stack(ways).logsumexp(0) - math.log(len(inside))
    place = torch.arange(size, device=blocks.device)
    every = (texts.per_block(texts.scored).long() << place).sum(-1)
    return texts.shared_out(-log_p.gather(0, every[None])[0])


@dataclass(frozen=True)
class Path:
    """What a rule met on the one way to the text: nll float64 [B, L] of each token in the step that
    reveals it, and whether it was the likeliest token there, boolean [B, L] (true where not
    scored)."""

    nll: Tensor
    likeliest: Tensor


def walk(ask: Ask, texts: AskedTexts, score: Callable, reveal: Callable) -> Path:
    """Reveal the true tokens as a deterministic rule would. The rule sees the canvas alone:
    score(log_probs [m, V]) -> [m]; reveal(scores [B, N, S], -inf where nothing is masked, masked)
    -> boolean [B, N, S], at least one wherever any is masked. ValueError where it reveals none."""
    masked = texts.scored.clone()
    total = torch.zeros(masked.shape, dtype=torch.float64, device=masked.device)
    likeliest = torch.ones_like(masked)

    def reduce(log_probs: Tensor, read: Tensor) -> Tensor:
        parts = score(log_probs), texts.nll(log_probs, read), -log_probs.amax(-1)
        return torch.stack([part.double() for part in parts], -1)

    left = int(masked.sum())
    while left:
        read = masked.flatten().nonzero()[:, 0]
        x_t = torch.where(masked, texts.mask_id, texts.x0)
        scores, nll, least = ask(x_t, read, reduce).unbind(-1)
        scores = texts.scatter(read, scores.float(), -math.inf)
        now = reveal(texts.per_block(scores), texts.per_block(masked)).flatten(1)
        total = torch.where(now, texts.scatter(read, nll), total)
        likeliest &= ~now | texts.scatter(read, (nll == least).double()).bool()
        masked &= ~now
        before, left = left, int(masked.sum())
        if left == before:
            raise ValueError(f"the rule reveals none of {left:,} masked places")
    return Path(total, likeliest)


def greedy_path(ask: Ask, texts: AskedTexts, number: int = 1) -> Path:
    return walk(ask, texts, by_probability, lambda s, masked: greatest(s, masked, number))


def greedy(ask: Ask, texts: AskedTexts, chance=None, number: int = 1) -> Tensor:
    """The law of revealing the `number` places of greatest probability at a time, [B, L]."""
    return greedy_path(ask, texts, number).nll


def margin(ask: Ask, texts: AskedTexts, chance=None, number: int = 1) -> Tensor:
    """The same by the distance of the two greatest probabilities."""
    return walk(ask, texts, by_margin, lambda s, masked: greatest(s, masked, number)).nll


def threshold(ask: Ask, texts: AskedTexts, chance=None, number: float = 0.9) -> Tensor:
    """The law of revealing all places whose greatest probability is at least `number`, or else the
    greatest one; with 1 always one."""
    return walk(ask, texts, by_probability, lambda s, masked: at_least(s, masked, number)).nll


def entropy_bounded(ask: Ask, texts: AskedTexts, chance=None, number: float = 0.0) -> Tensor:
    """The law of revealing the places of least entropy that the bound `number`, in nats, lets pass
    together, [B, L]."""
    return walk(ask, texts, by_entropy, lambda s, masked: within_entropy(-s, masked, number)).nll


def left_to_right(ask: Ask, texts: AskedTexts, chance=None, number: int = 1) -> Tensor:
    """The law of revealing the first `number` masked places of a block at a time, [B, L]."""
    even = torch.zeros(texts.x0.shape, dtype=torch.float64, device=texts.x0.device)
    return in_order(ask, texts, rank_of_scored(even, texts) // number)
