"""The likelihood of a mixture over block sizes: of a model that draws a size S with chance w_S for
each text and writes the text at it.

    -log p(x) = -log sum over S of w_S exp(-n_S),    n_S = -log p(x | S) of the whole text

Where n_S is a bound, so is the result. Where it is estimated without bias from draws, the estimate
put into this formula is too low in expectation: minus the log-sum-exp is concave. How much cannot
be told from a small-noise expansion: the n_S of a long text vary by several nats. So the figure is
the other side. For all chances q that do not depend on the draw itself,

    -log p(x) <= sum over S of q_S (n_S + log(q_S / w_S)),

with equality at the posterior q_S ~ w_S exp(-n_S) (Gibbs' variational principle), and the right
side is linear in n_S: unbiased. Here q is the posterior by all other draws, for each draw in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Of R texts, float64. The expectation of `nll` is at least, that of `low` at most what the
    exact n_S give; without draws all are equal."""

    nll: Tensor  # [R] nats
    low: Tensor  # [R] nats, by the means over draws
    share: Tensor  # [R, S] posterior chances of the sizes


def mixture(nll: Sequence[Tensor], weights: Sequence[float]) -> Mixture:
    """nll: for each size that of the texts in each draw, [R, K] float64; K is 1 where there is
    nothing to draw, else the same number, at least 2. weights: of sum 1."""
    log_w = torch.tensor(weights, dtype=torch.float64).log()
    draws = max(each.shape[1] for each in nll)
    values = torch.stack([each.expand(-1, draws) for each in nll], -1)  # [R, K, S]
    mean = values.mean(1)
    others = mean[:, None]
    if draws > 1:
        others = (draws * others - values) / (draws - 1)
    log_q = (log_w - others).log_softmax(-1)
    found = (log_q.exp() * (values + log_q - log_w)).sum(-1).mean(1)
    posterior = log_w - mean
    return Mixture(found, -posterior.logsumexp(-1), posterior.softmax(-1))
