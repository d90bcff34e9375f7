"""SSD-LM decoding: text by diffusion on the vocabulary simplex, one block of tokens at a time.

A block starts as Gaussian logits of standard deviation K. At t = T, T-1 … 1 the model reads the
block's softmax, its logits are projected to one token per position (top-p, then a draw) written as
±K, and the next input is

    x = sqrt(abar(t-1)) * (±K one-hot) + sqrt(1 - abar(t-1)) * K * z,      z ~ N(0, 1).

The block's tokens are the argmax of the logits at t = 1, and the next block sees this block alone.
So a sample takes blocks × T evaluations of the network, whatever its tokens.

Shapes: B samples at once, C context tokens, K tokens of a block (25), V vocabulary, R = B * K rows.
Source: Han, Kumar, Tsvetkov 2023, SSD-LM, arXiv:2210.17432.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from ssd_model import rows_at_once
from torch import Tensor

from samplers.draw import draw, fold, row_keys

OFFSET = 1e-4  # s of the cosine schedule
TRIES = 8  # draws before a position's nucleus is sorted out in full


def alpha_bar(t: int, total_t: int) -> float:
    """Share of the signal's variance left at step t of total_t; 1 at t = 0, 0 at t = total_t."""

    def f(u: float) -> float:
        return math.cos((u + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    return f(t / total_t) / f(0.0)


def nucleus(logits: Tensor, top_p: float, *, stable: bool = True) -> Tensor:
    """The common nucleus, bool [..., V]: the fewest tokens, likeliest first, that reach top_p.

    The token that crosses top_p is kept (unlike in samplers/). Of tied tokens the lower id comes
    first; stable=False leaves ties to torch.sort, as the reference does.
    """
    order = logits.sort(dim=-1, descending=True, stable=stable).indices
    probs = logits.softmax(-1).gather(-1, order)
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < top_p)


def draw_from_nucleus(logits: Tensor, top_p: float, keys: Tensor) -> Tensor:
    """One token per row out of `nucleus(logits, top_p)`, [R, V] and keys [R] -> [R].

    Without sorting V: a token drawn from all of V is kept if the mass of likelier tokens is below
    top_p, and drawn again otherwise, which is a draw from the nucleus. A row that was refused TRIES
    times has its nucleus computed.
    """
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    pending = torch.arange(len(logits), device=logits.device)
    for attempt in range(TRIES):
        drawn = draw(log_probs, fold(keys[pending], attempt))
        tokens[pending] = drawn
        refused = _mass_above(probs, drawn) >= top_p
        pending = pending[refused]
        if not len(pending):
            return tokens
        log_probs, probs = log_probs[refused], probs[refused]
    kept = log_probs.masked_fill(~nucleus(log_probs, top_p), -torch.inf).log_softmax(-1)
    tokens[pending] = draw(kept, fold(keys[pending], TRIES))
    return tokens


def _mass_above(probs: Tensor, tokens: Tensor) -> Tensor:
    """Probability that sorts before each row's token, [R]; ties in order of id."""
    own = probs.gather(1, tokens.unsqueeze(1))  # [R, 1]
    ids = torch.arange(probs.shape[1], device=probs.device)
    above = (probs == own).logical_and_(ids < tokens.unsqueeze(1)).logical_or_(probs > own)
    return (probs * above).sum(-1)


class Noise(Protocol):
    """Where a batch's randomness comes from; a test replays recorded draws through it."""

    def gaussian(self, out: Tensor | None = None) -> Tensor:
        """Standard normal [B, K, V], in `out` where that is given; the caller may overwrite it."""

    def choose(self, logits: Tensor, top_p: float) -> Tensor:
        """A token out of each position's nucleus, [B, K, V] -> [B, K]."""


class RowNoise:
    """A stream of its own for every sample and block, set by (seed, sample index, block) alone.

    So a sample does not depend on which others share its batch, and a run that was cut short goes
    on with the same samples. The Gaussians are torch's, which differ between kinds of device.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], block: int, size: tuple[int, int], device
    ):
        self.shape = (len(indices), *size)  # B, K, V
        keys = fold(row_keys(seed, list(indices), [0] * len(indices)), block)  # [B]
        self.generators = [
            torch.Generator(device).manual_seed(key & ((1 << 63) - 1)) for key in keys.tolist()
        ]
        self.keys = keys.to(device)
        self.draws = 0

    def gaussian(self, out: Tensor | None = None) -> Tensor:
        noise = torch.empty(self.shape, device=self.keys.device) if out is None else out
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def choose(self, logits: Tensor, top_p: float) -> Tensor:
        positions = torch.arange(self.shape[1], device=self.keys.device)
        keys = fold(fold(self.keys, self.draws)[:, None], positions)  # [B, K]
        self.draws += 1
        parts = logits.flatten(0, 1).split(rows_at_once(logits))
        drawn, done = [], 0
        for part in parts:
            own = keys.flatten()[done : done + len(part)]
            drawn.append(draw_from_nucleus(part, top_p, own))
            done += len(part)
        return torch.cat(drawn).view(keys.shape)


@dataclass(frozen=True)
class Block:
    tokens: list[list[int]]  # [B][K]
    seconds: float  # the whole batch shares them


@dataclass(frozen=True)
class Decoded:
    blocks: list[Block]
    nfe: int  # network evaluations of a sample

    @property
    def tokens(self) -> list[list[int]]:
        """One row a sample, [B][blocks * K]."""
        rows = zip(*(block.tokens for block in self.blocks), strict=True)
        return [[token for part in row for token in part] for row in rows]

    @property
    def seconds(self) -> float:
        return sum(block.seconds for block in self.blocks)


@torch.no_grad()
def decode(
    model,
    contexts: Sequence[Sequence[int]],
    noise_of_block: Callable[[int], Noise],
    *,
    blocks: int,
    total_t: int,
    top_p: float,
    one_hot_value: float,
    done: Sequence[Block] = (),
    on_step: Callable[[], None] = lambda: None,
    on_block: Callable[[list[Block]], None] = lambda blocks: None,
) -> Decoded:
    """`blocks` blocks after each context; a context may be empty, and lengths may differ.

    model: as ssd_model.SSDLM: `.context(ids)`, `.embed(x, time)`, `.logits(context, embedded)`.
    done: the first blocks, from a run that was cut short; the rest is what it would have been.
    """
    decoded = list(done)
    for number in range(len(decoded), blocks):
        started = time.perf_counter()
        context = model.context(decoded[-1].tokens if decoded else contexts)
        logits = decode_block(
            model,
            context,
            noise_of_block(number),
            total_t=total_t,
            top_p=top_p,
            one_hot_value=one_hot_value,
            on_step=on_step,
        )
        tokens = logits.argmax(-1).tolist()
        decoded.append(Block(tokens, time.perf_counter() - started))
        on_block(decoded)
    return Decoded(decoded, nfe=blocks * total_t)


def decode_block(model, context, noise: Noise, *, total_t, top_p, one_hot_value, on_step) -> Tensor:
    """The logits at t = 1 of one block, [B, K, V]."""
    x = noise.gaussian().mul_(one_hot_value)
    for t in range(total_t, 0, -1):
        embedded = model.embed(x, t / total_t)
        z = noise.gaussian(out=x)
        logits = model.logits(context, embedded)
        tokens = noise.choose(logits, top_p)
        signal = alpha_bar(t - 1, total_t)
        # ±K * sqrt(signal) without its constant -K * sqrt(signal), which the softmax cannot see.
        peak = torch.full_like(tokens, 2 * one_hot_value * math.sqrt(signal), dtype=z.dtype)
        x = z.mul_(one_hot_value * math.sqrt(1 - signal))
        x.scatter_add_(2, tokens.unsqueeze(2), peak.unsqueeze(2))
        on_step()
    return logits
