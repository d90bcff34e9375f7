"""Noise by counts: how many tokens of a block are masked is drawn, not a time.

Given that m of a block's n scored tokens are masked, every set of m is equally likely, whatever the
time and the schedule. So the integral of the loss over all times is a sum over m:

    NELBO of a block = sum over m = 1 .. n of E[sum over i in M of a(M, i)] / m, M of m tokens,

where a(M, i) = -log p(x_i | what is not masked) (any-order AR, arXiv:2205.13554). A draw of m with
chance q(m), weighed by 1 / (m q(m)), is an unbiased estimate of it. It varies less than that of a
drawn time, whose weight may be 1 / EPS.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .corruption import Interval, per_token, rank_in_block

PARTS = 32  # most parts of a law that is learnt: with more, few blocks of a validation tell of each
FLOOR = 0.25  # least density of a law that is learnt: no weight is above 4 times that of UNIFORM


@dataclass(frozen=True)
class CountLaw:
    """m = floor(s n) + 1, where s has this density on (0, 1): float64 [P], one value for each of P
    equal parts, of mean 1. With P = S part m is the count m of a block of S scored tokens. Blocks
    of fewer (the first token of a text, padding, masks in the text) have the law of the same s.

    `reweighted`: weights 1 / (m q(m)), which need a density above 0 everywhere; the expected loss
    is the NELBO. Else weights n / m, those of a uniform law: with a range of counts the expected
    loss is no bound.
    """

    density: Tensor
    reweighted: bool = True

    def up_to(self, m: Tensor, n: Tensor) -> Tensor:
        """How likely at most m of n tokens are masked, float64."""
        parts = len(self.density)
        total = F.pad(self.density.cumsum(0) / self.density.sum(), (1, 0)).to(n.device)
        at = m.double() * parts / n
        part = at.long().clamp(max=parts - 1)
        return torch.lerp(total[part], total[part + 1], at - part)

    def chance(self, m: Tensor, n: Tensor) -> Tensor:
        """q(m) of n tokens, float64."""
        return self.up_to(m, n) - self.up_to(m - 1, n)

    def draw(self, u: Tensor, n: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Uniform numbers u [B, N] and how many tokens of a block are scored, of `size`: [B, N] ->
        m int64 and its weight float64, [B, N]. Where nothing is scored m is 1."""
        n = n.clamp(min=1)
        m = torch.minimum(torch.arange(1, size, device=n.device), n[..., None])
        m = torch.minimum(1 + (self.up_to(m, n[..., None]) <= u[..., None]).sum(-1), n)
        return m, self.weight(m, n)

    def weight(self, m: Tensor, n: Tensor) -> Tensor:
        """Of the nll of m masked tokens of n, float64."""
        return 1 / (m * self.chance(m, n)) if self.reweighted else n / m.double()

    @property
    def ends(self) -> Interval:
        """Between which shares of the tokens it draws."""
        held = self.density.nonzero()[:, 0].tolist()
        return held[0] / len(self.density), (held[-1] + 1) / len(self.density)


UNIFORM = CountLaw(torch.ones(1, dtype=torch.float64))


def within(least: int, most: int, size: int) -> CountLaw:
    """Counts least .. most of `size`, each equally likely, not reweighted: the NELBO only where it
    is all of them, as with a clipped interval of times."""
    m = torch.arange(1, size + 1)
    held = ((m >= least) & (m <= most)).double()
    return CountLaw(held / held.mean(), reweighted=False)


def to_learn(size: int) -> CountLaw:
    """What training begins with where the law is learnt: all counts, each equally likely."""
    return CountLaw(torch.ones(min(size, PARTS), dtype=torch.float64))


def masked_by_counts(
    law: CountLaw, u: Tensor, keys: Tensor, scored: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each block the m scored tokens with the least keys: boolean [B, L]; and the weights of
    their nll, float64 [B, L]. u [B, N] in [0, 1) draws m; keys and scored (boolean) are [B, L]."""
    size = scored.shape[1] // u.shape[1]
    m, weight = law.draw(u, scored.unflatten(1, (-1, size)).sum(-1), size)
    rank = rank_in_block(keys.masked_fill(~scored, torch.inf), size)
    return (rank < m[..., None]).flatten(1) & scored, per_token(weight, scored.shape[1])


def masked_in_sizes(
    law: CountLaw, u: Tensor, keys: Tensor, scored: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """As `masked_by_counts` where rows differ in the size of their blocks: sizes [B]; u [B, L] has
    for each token the number of its block."""
    masked = torch.zeros_like(scored)
    weight = torch.zeros(scored.shape, dtype=torch.float64, device=scored.device)
    for size in sizes.unique().tolist():
        rows = sizes == size
        found = masked_by_counts(law, u[rows, ::size], keys[rows], scored[rows])
        masked[rows], weight[rows] = found
    return masked, weight


def complementary(u: Tensor, keys: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Two views of each text that mask complementary parts of the scored tokens, so that each is
    predicted once: masked boolean and weights float64, [B, 2, L]. Arguments as for
    `masked_by_counts`.

    The first masks m = 1 .. n tokens of a block, each as likely, the second the other n - m. Each m
    below n comes with a chance of 2 / n in one of them, n itself with 1 / n. So the weights are
    n / (2 m) and n / (2 (n - m)), and 1 where the first has all: the expected loss is the NELBO,
    and the weights of a block add up to n in every draw.
    """
    size = scored.shape[1] // u.shape[1]
    n = scored.unflatten(1, (-1, size)).sum(-1)
    m, _ = UNIFORM.draw(u, n, size)
    rank = rank_in_block(keys.masked_fill(~scored, torch.inf), size)
    first = (rank < m[..., None]).flatten(1) & scored
    sizes = torch.stack([m, n - m], 1)  # [B, 2, N]
    used = (sizes > 0).sum(1, keepdim=True)
    weight = n[:, None] / (used * sizes.clamp(min=1)).double()
    masked = torch.stack([first, scored & ~first], 1)
    return masked, weight.repeat_interleave(size, -1)


# ---- the law of least variance


class SecondMoments:
    """Of the loss of a block, weighed by n / m, for each part of a law: from blocks whose m was
    drawn uniformly. `sums` float64 [2, P]: of the squares, and of how many blocks they are."""

    def __init__(self, parts: int, device: torch.device):
        self.sums = torch.zeros(2, parts, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, m: Tensor, n: Tensor) -> None:
        """The losses of blocks, sums over their tokens; [B, N] each. Where n is 0 there is none."""
        real, parts = n > 0, self.sums.shape[1]
        m, n, losses = m[real].double()[:, None], n[real][:, None], losses[real].double()
        edge = torch.arange(parts + 1, device=n.device)
        low, high = (m - 1) * parts / n, m * parts / n
        inside = torch.minimum(high, edge[1:]) - torch.maximum(low, edge[:-1])
        inside = inside.clamp(min=0) / (high - low)  # which share of the block tells of each part
        self.sums += torch.stack([losses.square(), torch.ones_like(losses)]) @ inside


def least_variance(sums: Tensor) -> CountLaw:
    """The law of least second moment of the weighed loss, given the sums of SecondMoments: q is
    proportional to the root of the moment (by Cauchy-Schwarz), nowhere below FLOOR. A part that no
    block told of has density 1."""
    squares, blocks = sums.cpu()
    told = blocks > 0
    root = (squares / blocks.clamp(min=torch.finfo(blocks.dtype).tiny)).sqrt()
    density = torch.ones_like(root)
    held = torch.zeros_like(told)
    while bool((free := told & ~held).any()) and float(root[free].sum()) > 0:
        room = told.sum() - FLOOR * held.sum()
        density[free] = root[free] * (room / root[free].sum())
        if not bool((low := free & (density < FLOOR)).any()):
            break
        density[low], held = FLOOR, held | low
    return CountLaw(density / density.mean())
