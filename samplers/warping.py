"""What is done to a distribution before a token is drawn: temperature, then top-k, then nucleus.

Each works on what the one before it left, brought back to a sum of 1. The mask token, whose
log-probability is -inf, takes no part.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .nucleus import call, nucleus, running_sum
from .params import Warp

COLDEST = (
    1e-30  # below it float32 would divide by 0; tokens that differ at all are apart long before
)


def likeliest_alone(warp: Warp) -> bool:
    """Whether only the likeliest token is left (of equal ones the smallest id)."""
    return warp.temperature < COLDEST or warp.top_k == 1


def warped(log_probs: Tensor, warp: Warp, search: bool = False, apart: Callable = call) -> Tensor:
    """Log-probabilities [..., V] with -inf at the dropped tokens, not renormalised in the end.
    search, apart: see `nucleus`."""
    k = 1 if likeliest_alone(warp) else warp.top_k
    if warp.temperature not in (0, 1) and k != 1:
        peak = log_probs.amax(-1, keepdim=True)
        log_probs = ((log_probs - peak) / warp.temperature).log_softmax(-1)
    if 0 < k < log_probs.shape[-1]:
        log_probs = top_k(log_probs, k, apart).log_softmax(-1)
    return nucleus(log_probs, warp.nucleus_p, search, apart)


def top_k(log_probs: Tensor, k: int, apart: Callable = call) -> Tensor:
    """Log-probabilities [..., V] with -inf at all but the k greatest; of equal ones the smaller ids
    are kept."""
    least = log_probs.topk(k, dim=-1).values[..., -1:]
    above, equal = log_probs > least, log_probs == least
    number = apart(running_sum, equal, torch.int32)
    kept = above | (equal & (number <= k - above.sum(-1, keepdim=True)))
    return log_probs.masked_fill(~kept, -torch.inf)
