"""SSD-LM decoding: text by diffusion on the vocabulary simplex, one block of tokens at a time.

A block starts as Gaussian logits of standard deviation K. At t = T, T-1 … 1 the model reads the block's softmax, its
logits are projected to one token per position (top-p, then a draw) written as ±K, and the next input is

    x = sqrt(abar(t-1)) * (±K one-hot) + sqrt(1 - abar(t-1)) * K * z,      z ~ N(0, 1).

The block's tokens are the argmax of the logits at t = 1, and the next block sees this block alone. So a sample takes
blocks × T evaluations of the network, whatever its tokens.

Shapes: B samples at once, C context tokens, K tokens of a block (25), V vocabulary, R = B * K rows.
Source: Han, Kumar, Tsvetkov 2023, SSD-LM, arXiv:2210.17432.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

OFFSET = 1e-4  # s of the cosine schedule
TRIES = 8  # draws before a position's nucleus is sorted out in full
CHUNK = 256  # tokens whose probabilities are summed before the cumulative sum


def alpha_bar(t: int, total_t: int) -> float:
    """Share of the signal's variance left at step t of total_t; 1 at t = 0, 0 at t = total_t."""

    def f(u: float) -> float:
        return math.cos((u + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    return f(t / total_t) / f(0.0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The tokens of the common nucleus, bool [..., V]: the fewest, likeliest first, that reach top_p.

    The token that crosses top_p is kept (unlike this project's nucleus of samplers/); of tied tokens the lower id is
    the likelier one.
    """
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < top_p)


def draw_from_nucleus(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """One token per row out of `nucleus(logits, top_p)`, [R, V] -> [R], without sorting the vocabulary.

    A token drawn from all of V is kept if the mass of likelier tokens is below top_p, and drawn again otherwise: that
    is a draw from the nucleus. A row that was refused TRIES times has its nucleus computed. uniform: float64 in
    [0, 1), [R, TRIES + 1].
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()  # [R, V], 1 at the likeliest
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    pending = torch.arange(len(logits), device=logits.device)
    for attempt in range(TRIES):
        drawn = _inverse_cdf(weights, uniform[pending, attempt])
        tokens[pending] = drawn
        refused = _mass_above(weights, drawn) >= top_p
        pending = pending[refused]
        if not len(pending):
            return tokens
        weights = weights[refused]
    kept = weights * nucleus(logits[pending], top_p)
    tokens[pending] = _inverse_cdf(kept, uniform[pending, TRIES])
    return tokens


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative weight first exceeds uniform * total, [R, V] and [R] -> [R].

    Sums are float64, chunk by chunk, so that a vocabulary of 50 000 loses no tail.
    """
    rows, vocabulary = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -vocabulary % CHUNK)).view(rows, -1, CHUNK)
    ends = padded.sum(-1, dtype=torch.float64).cumsum(-1)  # [R, V / CHUNK]
    target = (uniform * ends[:, -1]).unsqueeze(1)  # [R, 1]
    chunk = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    start = ends.gather(1, (chunk - 1).clamp(min=0)).masked_fill_(chunk == 0, 0.0)
    inside = padded.gather(1, chunk.unsqueeze(2).expand(-1, -1, CHUNK)).squeeze(1).double()
    cumulative = inside.cumsum(-1)
    # Rounding of the two sums may put the target past the chunk's end: then its last token that can be drawn.
    target = torch.minimum(target - start, torch.nextafter(cumulative[:, -1:], target.new_zeros(())))
    place = torch.searchsorted(cumulative, target, right=True)
    return (chunk * CHUNK + place).squeeze(1)


def _mass_above(weights: Tensor, tokens: Tensor) -> Tensor:
    """Share of the weight that comes before each row's token when sorted, [R]; ties in order of id."""
    own = weights.gather(1, tokens.unsqueeze(1))  # [R, 1]
    ids = torch.arange(weights.shape[1], device=weights.device)
    tie_first = torch.nextafter(own, own.new_zeros(()))
    floor = torch.where(ids < tokens.unsqueeze(1), tie_first, own)
    return (weights * (weights > floor)).sum(-1) / weights.sum(-1)


class Noise(Protocol):
    """Where a batch's randomness comes from; a test replays recorded draws through it."""

    def gaussian(self) -> Tensor:
        """Standard normal [B, K, V]; the caller may overwrite it."""

    def choose(self, logits: Tensor, top_p: float) -> Tensor:
        """A token out of each position's nucleus, [B, K, V] -> [B, K]."""


class RowNoise:
    """A stream of its own for every sample and block, set by (seed, sample index, block) alone.

    So a sample does not depend on which others share its batch, and a run that was cut short goes on with the same
    samples.
    """

    def __init__(self, seed: int, indices: Sequence[int], block: int, size: tuple, device):
        self.size = (len(indices), *size)  # B, K, V
        self.generators = [
            torch.Generator(device).manual_seed(stream_seed(seed, index, block)) for index in indices
        ]
        self.device = device

    def gaussian(self) -> Tensor:
        noise = torch.empty(self.size, device=self.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def choose(self, logits: Tensor, top_p: float) -> Tensor:
        batch, length, _ = self.size
        uniform = torch.empty(
            batch, length, TRIES + 1, dtype=torch.float64, device=self.device
        )
        for row, generator in zip(uniform, self.generators, strict=True):
            row.uniform_(generator=generator)
        drawn = draw_from_nucleus(logits.flatten(0, 1), top_p, uniform.flatten(0, 1))
        return drawn.view(batch, length)


def stream_seed(seed: int, index: int, block: int) -> int:
    """63 bits that belong to one block of one sample."""
    name = f"ssd-lm {seed} {index} {block}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Decoded:
    tokens: Tensor  # int64 [B, blocks * K]
    nfe: int  # network evaluations of a sample
    block_seconds: list[float]  # one per block; the whole batch shares them


@torch.no_grad()
def decode(
    model,
    contexts: Sequence[Sequence[int]],
    noise_of_block: Callable[[int], Noise],
    *,
    blocks: int,
    block_size: int,
    total_t: int,
    top_p: float,
    one_hot_value: float,
    on_step: Callable[[], None] = lambda: None,
) -> Decoded:
    """`blocks` blocks after each context; a context may be empty, and lengths may differ.

    model: as ssd_model.SSDLM: `.context(ids)` and `.block_logits(context, x, time)`.
    """
    context, decoded, seconds = list(contexts), [], []
    for block in range(blocks):
        started = time.perf_counter()
        logits = decode_block(
            model,
            model.context(context),
            noise_of_block(block),
            total_t=total_t,
            top_p=top_p,
            one_hot_value=one_hot_value,
            on_step=on_step,
        )
        context = logits.argmax(-1)  # [B, K]
        decoded.append(context.cpu())
        seconds.append(time.perf_counter() - started)
    tokens = torch.cat(decoded, 1) if decoded else torch.empty(len(contexts), 0, dtype=torch.int64)
    return Decoded(tokens, nfe=blocks * total_t, block_seconds=seconds)


def decode_block(model, context, noise: Noise, *, total_t, top_p, one_hot_value, on_step) -> Tensor:
    """The logits at t = 1 of one block, [B, K, V]."""
    x = noise.gaussian().mul_(one_hot_value)
    for t in range(total_t, 0, -1):
        z = noise.gaussian()
        logits = model.block_logits(context, x, t / total_t)
        tokens = noise.choose(logits, top_p)
        signal = alpha_bar(t - 1, total_t)
        # ±K times sqrt(signal), less its constant -K * sqrt(signal): the softmax that reads x cannot tell.
        peak = torch.full_like(tokens, 2 * one_hot_value * math.sqrt(signal), dtype=z.dtype)
        x = z.mul_(one_hot_value * math.sqrt(1 - signal))
        x.scatter_add_(2, tokens.unsqueeze(2), peak.unsqueeze(2))
        on_step()
    return logits
