"""Random numbers that belong to a place in a text, and draws from a distribution that are right in
its tails.

A stream is named by integers: each is folded into a 64-bit key, and a key gives as many uniform
numbers as are asked for. The hash (models/randomness.py) is int64 arithmetic that wraps, which
every device computes alike and without asking the host.

Gumbel noise in float32 ends at 16.6, which quietly lowers the temperature of masked diffusion
(Zheng et al. 2024, arXiv:2409.02908). `draw` in float32 therefore makes its noise in float64: the
vocabulary is cut into about sqrt(V) groups, a group is drawn by its mass and then a token inside
it, each by Gumbel-max over about sqrt(V) numbers. The only float32 arithmetic is exp and a sum of
positive numbers, so a token's chance is right to a relative error of about 1e-6 however small.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.randomness import GOLDEN_GAMMA, logical_shift, mix

from .nucleus import call
from .params import Warp
from .warping import likeliest_alone, warped

CACHED = 1 << 17  # numbers that a CPU handles at once
AT_ONCE = 1 << 26  # and another device: the nucleus takes about 40 bytes each


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """The key of stream number `value` (>= 0) of the stream `key`; the two broadcast."""
    return mix(key + (torch.as_tensor(value) + 1) * GOLDEN_GAMMA)


def row_keys(seed: int, rows: list[int], tries: list[int]) -> Tensor:
    """One key per text, int64 [B] on the CPU."""
    seed, rows, tries = (torch.tensor(x, dtype=torch.int64) for x in (seed, rows, tries))
    return fold(fold(mix(seed), rows), tries)


def uniform(key: Tensor) -> Tensor:
    """float64 in (0, 1), symmetric and never 0 or 1, one per key."""
    return (logical_shift(key, 12).double() + 0.5) * 2.0**-52


def gumbel(key: Tensor, count: int, apart: Callable = call) -> Tensor:
    """`count` independent Gumbel(0, 1) numbers per key, float64 [..., count]. apart: see
    `nucleus`."""
    lanes = apart(_numbers, count, key.device)
    return -(-uniform(fold(key[..., None], lanes)).log()).log()


def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def sample(
    log_probs: Tensor,
    key: Tensor,
    warp: Warp,
    dtype: str,
    search: bool = False,
    apart: Callable = call,
) -> Tensor:
    """Warp and draw: [..., V] and keys [...] -> tokens [...]. search, apart: see `nucleus`.

    A CPU takes few rows at a time, so that what is made on the way stays in its cache; another
    device takes all but where they would need gigabytes.
    """
    if likeliest_alone(warp):
        return log_probs.argmax(-1)
    rows, keys = log_probs.flatten(0, -2), key.flatten()
    if dtype == "float64":
        rows = rows.double()
    at_once = max(1, (CACHED if rows.device.type == "cpu" else AT_ONCE) // rows.shape[-1])
    tokens = [
        draw(warped(part, warp, search, apart), some, dtype, apart)
        for part, some in zip(rows.split(at_once), keys.split(at_once), strict=True)
    ]
    return torch.cat(tokens).view(key.shape)


@functools.cache
def compiled_sample() -> Callable[..., Tensor]:
    """`sample` in fewer kernels. Two functions run apart from them: torch 2.11 cannot join scans
    over long rows with other reductions, and would count _numbers, times GOLDEN_GAMMA, in int32."""
    apart = torch.compiler.disable(call)  # here: this imports the compiler
    return functools.partial(torch.compile(sample), search=True, apart=apart)


def draw(log_probs: Tensor, key: Tensor, dtype: str = "float32", apart: Callable = call) -> Tensor:
    """One token per distribution, [..., V], not normalised if need be, and keys [...] -> [...]."""
    return DRAWS[dtype](log_probs, key, apart)


def in_groups(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """[..., V] as groups, [..., G, W] with -inf at the end, and their masses float64 [..., G]."""
    vocabulary = log_probs.shape[-1]
    width = 1 << ((vocabulary - 1).bit_length() + 1) // 2
    groups = -(-vocabulary // width)
    padded = F.pad(log_probs, (0, groups * width - vocabulary), value=-torch.inf)
    padded = padded.unflatten(-1, (groups, width))
    return padded, padded.exp().sum(-1).double()


def draw_in_groups(log_probs: Tensor, key: Tensor, apart: Callable = call) -> Tensor:
    """Group first, token second: float64 over about 2 sqrt(V) numbers only."""
    padded, mass = in_groups(log_probs)
    groups, width = padded.shape[-2:]
    noise = gumbel(key, groups + width, apart)
    group = (mass.log() + noise[..., :groups]).argmax(-1, keepdim=True)
    inside = padded.gather(-2, group[..., None].expand(*group.shape, width)).squeeze(-2)
    token = (inside.double() + noise[..., groups:]).argmax(-1)
    return group.squeeze(-1) * width + token


def draw_at_once(log_probs: Tensor, key: Tensor, apart: Callable = call) -> Tensor:
    """Gumbel-max in float64 over the whole vocabulary."""
    return (log_probs.double() + gumbel(key, log_probs.shape[-1], apart)).argmax(-1)


DRAWS = {"float32": draw_in_groups, "float64": draw_at_once}
