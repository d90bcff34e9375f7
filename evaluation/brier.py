"""BrierLM: how well a model that can only be sampled predicts what comes next (arXiv:2510.27688).

The Brier score of a law p at the outcome y is 2 p(y) - sum over x of p(x)^2: at most 1, and
greatest in the mean where p is the truth. For independent draws x1, x2 of p

    1[x1 = y] + 1[x2 = y] - 1[x1 = x2]

has that mean, so no probability is needed. Brier-n takes the n tokens behind a prefix for one
outcome. BrierLM is the geometric mean of Brier-1 .. Brier-4, times 100.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.quality import Figure, mean
from models.randomness import uniform
from random_streams import key
from samplers.params import SamplingParams
from samplers.request import TextRequest
from samplers.writing import SAMPLERS, generate

ORDERS = (1, 2, 3, 4)
TOKENS = max(ORDERS)  # that are written behind a prefix


@dataclass(frozen=True)
class BrierLM:
    """`orders`: Brier-1 .. Brier-4, each a mean over prefixes. `value`: nan where one of them is
    not above 0, as where the prefixes are too few for it."""

    value: Figure
    orders: dict[int, Figure]
    prefixes: int


def estimates(drawn: Tensor, truth: Tensor) -> Tensor:
    """Unbiased estimates of Brier-1 .. Brier-4 of each prefix, float64 [B, 4], of continuations
    drawn [D, B, 4] (D at least 2, independent) and the true ones [B, 4]. With D = 2 the formula
    above; else the mean over all pairs of draws."""
    draws = len(drawn)
    right = agreement(drawn, truth).mean(0)
    same = torch.zeros_like(right)
    for i in range(1, draws):
        same += agreement(drawn[i:], drawn[:-i]).sum(0)
    return 2 * right - same / math.comb(draws, 2)


def agreement(x: Tensor, y: Tensor) -> Tensor:
    """Whether the first 1, 2, 3, 4 tokens are the same, 0 or 1: float64 [..., 4]."""
    return (x == y).cumprod(-1).double()


def closed_form(log_probs: Tensor, truth: Tensor) -> Tensor:
    """Brier-1 of laws log_probs [B, V] at the tokens truth [B], float64 [B]."""
    p = log_probs.double().exp()
    return 2 * p.gather(1, truth[:, None])[:, 0] - p.square().sum(1)


def brier_lm(found: Tensor) -> BrierLM:
    """Of estimates [B, 4] of independent prefixes. The error is that of the delta method."""
    orders = {n: mean(found[:, n - 1].tolist()) for n in ORDERS}
    means = torch.tensor([orders[n].value for n in ORDERS], dtype=torch.float64)
    if len(found) < 2 or not bool((means > 0).all()):
        return BrierLM(Figure(math.nan), orders, len(found))
    value = 100 * float(means.log().mean().exp())
    moved = (found / means).mean(1)  # what each prefix adds to the logarithm
    error = value * float(moved.std()) / math.sqrt(len(found))
    return BrierLM(Figure(value, error), orders, len(found))


def cut(rows: Sequence[Sequence[int]], bos_id: int, length: int, seed: int = 1):
    """A prefix of each row, BOS first, and the tokens behind it: lists of ids and int64 [B, 4]. The
    places are uniform, the same for every model with these tokens. Rows that are too short for one
    are left out; length: most tokens of a prefix with its continuation."""
    prefixes, truth = [], []
    chances = uniform(key(seed, "prefixes"), torch.arange(len(rows)), dtype=torch.float64)
    for row, chance in zip(rows, chances.tolist(), strict=True):
        ids = [*(() if list(row[:1]) == [bos_id] else (bos_id,)), *row][:length]
        if len(ids) > TOKENS:
            place = 1 + int(chance * (len(ids) - TOKENS))
            prefixes.append(tuple(ids[:place]))
            truth.append(ids[place : place + TOKENS])
    return prefixes, torch.tensor(truth, dtype=torch.int64).view(-1, TOKENS)


def continuations(
    writes: str,
    denoise: Callable,
    prefixes: Sequence[tuple[int, ...]],
    params: SamplingParams,
    *,
    draws: int = 2,
    device="cpu",
    tick: Callable[[int], object] = lambda texts: None,
) -> Tensor:
    """`draws` independent continuations of each prefix, int64 [D, B, 4]: what the sampler writes
    behind them, cut off after four tokens. bamdlm writes up to the end of a block and ar four
    tokens; mdlm and sedd write the whole text, as the network was trained."""
    texts = []
    for number, prefix in enumerate(prefixes):
        total = written(writes, len(prefix) + TOKENS, params)
        texts += [TextRequest(number * draws + draw, prefix, total=total) for draw in range(draws)]
    # texts of one length side by side wait for nobody
    texts.sort(key=lambda text: text.total)
    found = torch.empty(draws, len(prefixes), TOKENS, dtype=torch.int64)
    for group in generate(writes, denoise, texts, params, device=device):
        for sample in group:
            number, draw = divmod(sample.row, draws)
            place = len(prefixes[number])
            found[draw, number] = sample.tokens[place : place + TOKENS]
        tick(len(group))
    return found


def written(writes: str, needed: int, params: SamplingParams) -> int:
    """Tokens of a text of which `needed` are read."""
    if "cache" not in SAMPLERS[writes].can:  # all positions are seen at once
        return params.length
    size = params.block_size if writes == "bamdlm" else 1
    return -(-needed // size) * size
