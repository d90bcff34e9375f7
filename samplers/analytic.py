"""SEDD: T analytic steps of the absorbing process, then one denoising step (arXiv:2310.16834,
section 4).

A step from time t to s < t takes the ratios p_t(y) / p_t(x) that the network gives and moves every
position at once: a masked token becomes y, or stays masked. Temperature, top-k and nucleus act on
the chances of the tokens among each other; the chance to stay masked is not touched.
"""

from itertools import pairwise

import torch
from torch import Tensor

from noise_schedule import total_noise

from .draw import fold, sample
from .params import Warp
from .sending import to_device
from .steps import DRAW
from .texts import ActiveTexts
from .warping import warped

LAST_TIME = 1e-5


def staggered(score: Tensor, dsigma: Tensor, mask_id: int) -> Tensor:
    """The score [B, L, V] at the noise level lower by dsigma [B], as far as it follows."""
    grown = dsigma.exp()[:, None, None]
    out = score * grown
    out[..., mask_id] += ((1 - grown) * score.sum(-1, keepdim=True))[..., 0]
    return out


def transition(tokens: Tensor, dsigma: Tensor, vocab_size: int, mask_id: int) -> Tensor:
    """Chance that y becomes `tokens` under the noise dsigma, [B, L, V] over y."""
    keep = (-dsigma).exp()[:, None, None]
    edge = keep * torch.nn.functional.one_hot(tokens, vocab_size)
    return edge + (1 - keep) * (tokens == mask_id)[..., None]


def reverse_chances(
    log_score: Tensor, tokens: Tensor, dsigma: Tensor, mask_id: int, last: bool
) -> Tensor:
    """What each position becomes, unnormalised [B, L, V]; the last step leaves nothing masked."""
    chances = staggered(log_score.exp(), dsigma, mask_id)
    chances = chances * transition(tokens, dsigma, log_score.shape[-1], mask_id)
    if last:
        chances[..., mask_id] = 0
    return chances


def next_log_probs(chances: Tensor, warp: Warp, mask_id: int) -> Tensor:
    """Normalised; an imperfect score may make staying masked negative, which counts as 0."""
    log = chances.clamp(min=0).log()
    if warp != Warp():
        tokens = log.clone()
        tokens[..., mask_id] = -torch.inf
        mass = tokens.logsumexp(-1, keepdim=True)
        kept = warped(tokens - mass, warp).log_softmax(-1) + mass
        kept[..., mask_id] = log[..., mask_id]
        log = kept
    return log.log_softmax(-1)


def one_round(texts: ActiveTexts) -> int:
    """Every text from its first step to its last."""
    params, canvas = texts.params, texts.canvas
    for slot in texts.slots:
        slot.filled, slot.nfe = params.length, params.num_steps + 1
    t = torch.linspace(1, LAST_TIME, params.num_steps + 1, dtype=torch.float64)
    sigma = total_noise(params.move_chance(t)).float().tolist()
    steps = [*pairwise(sigma), (sigma[-1], 0.0)]
    row, position = torch.arange(len(texts)), torch.arange(params.length)
    keys = to_device(texts.keys(row[:, None], position), canvas.device)
    for number, (now, then) in enumerate(steps):
        tokens = canvas.x[:, :-1]
        level = torch.full((len(texts),), now, device=canvas.device)
        log_score, last = canvas.ask(tokens, level), number == len(steps) - 1
        chances = reverse_chances(log_score, tokens, level - then, canvas.mask_id, last)
        log_probs = next_log_probs(chances, params.warp, canvas.mask_id)
        new = sample(log_probs, fold(keys, DRAW + number), Warp(), params.dtype)
        canvas.x[:, :-1] = new.where(tokens == canvas.mask_id, tokens)
        texts.show()
    return len(texts) * params.length
