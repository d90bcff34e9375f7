"""The forward process: when (t), how much (p) and which tokens are masked.

Time is drawn once per block and shared by its tokens. The randomness is a function of (seed, step,
row of the global batch) alone, so a run does not depend on the number of devices it is spread over.
"""

import functools
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from models.document_ids import begins
from models.randomness import uniform
from random_streams import order

from .sizes import SizeLaw, deal

Interval = tuple[float, float]  # the times (eps_min, eps_max) that are drawn
# Everything masked; with blocks of one token the loss is the exact NLL. Ints, as it is logged.
EXACT: Interval = (1, 1)

TIMES, TOKENS, COUNTS, SIZES = range(4)  # independent streams of random numbers


@dataclass(frozen=True)
class Noise:
    """The uniform numbers that corrupt a batch; everything after them is deterministic. Where rows
    differ in the size of their blocks, N is L: each token has the numbers of its block."""

    time: Tensor  # [B, N] in [0, 1): where in the interval, or in the law of counts, each block is
    token: Tensor  # [B, L] in [0, 1): a token is masked where this is <= p
    count: Tensor  # [B, N] in [0, 1): how many tokens of a block are masked, where that is bounded
    sizes: Tensor | None = None  # int64 [B], of the blocks of rows that differ in them


def draw_noise(
    seed: int,
    step: int,
    rows: Tensor,
    *,
    global_batch: int,
    length: int,
    block_size: int,
    antithetic: bool,
    sizes: SizeLaw | None = None,
) -> Noise:
    """The noise of these rows (int64 [B], indices into the global batch) at an optimizer step.

    Antithetic: the B_global * N strata [i, i + 1) / (B_global * N) are dealt to the blocks of the
    global batch in a random permutation, one each, so the times cover the interval evenly and no
    position has a fixed noise level. With `sizes` each row draws the size of its blocks in place of
    `block_size`, and the blocks of each size have strata of their own.
    """
    of_rows = None
    if sizes is None:
        blocks = length // block_size
        place = rows[:, None] * blocks + torch.arange(blocks, device=rows.device)  # [B, N]
    else:
        dealt = deal(sizes, seed, step, global_batch, length, SIZES)
        of_rows, place = dealt.sizes[rows], dealt.blocks(rows, length)
    time = uniform(seed, step, TIMES, place, dtype=torch.float64)
    if antithetic and sizes is None:
        strata = global_batch * blocks
        time = (_dealt(seed, step, strata).to(rows.device)[place] + time) / strata
    elif antithetic:
        stratum, strata = _dealt_by_size(sizes, seed, step, global_batch, length)
        time = (stratum[place] + time) / strata[place]
    tokens = rows[:, None] * length + torch.arange(length, device=rows.device)
    return Noise(
        time=time.float().clamp(max=1 - 2.0**-24),
        token=uniform(seed, step, TOKENS, tokens),
        count=uniform(seed, step, COUNTS, place),
        sizes=of_rows,
    )


@functools.lru_cache(maxsize=2, typed=True)  # an OldSeed is another seed than the equal int
def _dealt(seed: int, step: int, strata: int) -> Tensor:
    """Which stratum each block of the global batch gets; kept for the micro-batches of a step."""
    return torch.from_numpy(order(seed, "strata", step, strata))


@functools.lru_cache(maxsize=2, typed=True)
def _dealt_by_size(
    sizes: SizeLaw, seed: int, step: int, rows: int, length: int
) -> tuple[Tensor, Tensor]:
    """The same where rows differ in size: the stratum of each block, and how many its size has."""
    dealt = deal(sizes, seed, step, rows, length, SIZES)
    return dealt.among_equals(_dealt(seed, step, len(dealt.of_block)))


def draw_example_noise(seed: int, examples: Tensor, *, global_batch: int, **settings) -> Noise:
    """The noise of examples known by their place in the stream (int64 [B]).

    Example e is row e % global_batch of step e // global_batch; settings as for `draw_noise`. A
    batch may reach over several steps (validation, whose batches need not be those of the noise).
    """
    steps, counts = torch.unique_consecutive(examples // global_batch, return_counts=True)
    rows = examples % global_batch
    draw = functools.partial(draw_noise, global_batch=global_batch, **settings)
    parts = [
        draw(seed, step, part)
        for step, part in zip(steps.tolist(), rows.split(counts.tolist()), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return Noise(
        time=torch.cat([part.time for part in parts]),
        token=torch.cat([part.token for part in parts]),
        count=torch.cat([part.count for part in parts]),
        sizes=None if parts[0].sizes is None else torch.cat([part.sizes for part in parts]),
    )


def times(u: Tensor, interval: Interval) -> Tensor:
    """Uniform numbers in [0, 1) -> times in the interval."""
    lo, hi = interval
    return lo + u * (hi - lo)


def per_token(blocks: Tensor, length: int) -> Tensor:
    """A value per block [B, N] -> the same per token [B, L]."""
    return repeat(blocks, "b n -> b (n k)", k=length // blocks.shape[1])


def mask_tokens(
    x0: Tensor, masked: Tensor, mask_id: int, ignore_bos: bool, document_ids: Tensor | None = None
) -> Tensor:
    """x_t: the mask token where `masked`; with `ignore_bos` a text's first token stays visible."""
    if ignore_bos:
        masked = masked & ~begins(x0, document_ids)
    return torch.where(masked, mask_id, x0)


def masked_independently(token: Tensor, p: Tensor) -> Tensor:
    """Each token with its own coin: token [B, L] uniform, p [B, N]."""
    return token <= per_token(p, token.shape[1])


def masked_within_bounds(token: Tensor, count: Tensor, p: Tensor, interval: Interval) -> Tensor:
    """As `masked_independently`, given that every block's masked share lies inside the interval.

    The number of masked tokens of a block is binomial; here it is drawn from its conditional
    distribution by inversion, then that many of the block's tokens with the least `token` are
    masked. Same law as redrawing until it fits, without the loop. Raises ValueError where no share
    k / K fits.
    """
    size = token.shape[1] // p.shape[1]
    most = int(shares_within(size, interval).nonzero().max())
    cdf = count_law(size, p, interval).cumsum(-1)
    # smallest k whose cdf exceeds u; never one outside the bounds, whatever the rounding
    drawn = (cdf <= count.double()[..., None]).sum(-1)
    drawn = drawn.clamp(max=most)
    return (rank_in_block(token, size) < drawn[..., None]).flatten(1)


def rank_in_block(keys: Tensor, size: int) -> Tensor:
    """Where each token stands in its block of `size` when they are ordered by keys [B, L], of equal
    ones the first first: int64 [B, N, S]."""
    return keys.unflatten(1, (-1, size)).argsort(dim=-1, stable=True).argsort(-1)


def count_law(size: int, p: Tensor, interval: Interval = (0.0, 1.0)) -> Tensor:
    """How likely 0 .. size of `size` tokens are masked, each with probability p [...], given that
    their share lies inside the interval: float64 [..., size + 1]."""
    fits = shares_within(size, interval)  # on the CPU, so that nothing here waits for the device
    ways = log_binomial(torch.tensor(size), torch.arange(size + 1)).to(p.device)
    k, p = torch.arange(size + 1, device=p.device), p.double()[..., None]
    log_pmf = ways + torch.xlogy(k, p) + torch.xlogy(size - k, 1 - p)
    return log_pmf.masked_fill(~fits.to(p.device), -torch.inf).softmax(-1)


def log_binomial(n: Tensor, k: Tensor) -> Tensor:
    """log C(n, k) of whole numbers, float64; -inf where k is none of 0 .. n."""
    n, k = n.double(), k.double()
    return torch.lgamma(n + 1) - (torch.lgamma(k + 1) + torch.lgamma(n - k + 1))


def shares_within(block_size: int, interval: Interval) -> Tensor:
    """Which numbers of masked tokens 0..K give a share inside the interval, boolean [K + 1].

    The bounds are widened by 1e-6 of rounding: the buffers of checkpoints hold them in float32.
    """
    lo, hi = interval
    share = torch.arange(block_size + 1, dtype=torch.float64) / block_size
    fits = (share >= lo - 1e-6) & (share <= hi + 1e-6)
    if not fits.any():
        raise ValueError(
            f"training.resample: no share k/{block_size} of a block lies in [{lo:g}, {hi:g}];"
            " widen training.sampling_eps_min / sampling_eps_max or set training.resample=false"
        )
    return fits
