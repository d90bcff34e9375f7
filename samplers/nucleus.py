"""Nucleus filtering by the reference's rule.

Tokens in descending order of probability are kept while the cumulative sum *including* the token is
<= p, and the first is always kept. So the kept mass is below p, unlike the common variant, which
also keeps the token that crosses p. Published numbers depend on it.
"""

import torch
from torch import Tensor


def nucleus(log_probs: Tensor, p: float) -> Tensor:
    """Normalised log-probabilities [..., V] with -inf at the dropped tokens; p = 1 returns the
    argument itself.

    Among equal probabilities the smaller id is kept first.
    """
    if p >= 1:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    dropped = ordered.exp().cumsum(-1) > p
    dropped[..., 0] = False
    kept = log_probs.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return kept - kept.logsumexp(-1, keepdim=True)
