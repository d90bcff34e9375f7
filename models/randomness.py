"""Random numbers as a function of where they are used: uniform(seed, step, row, position).

A counter-based generator: every number is a hash of its own coordinates, so it does not depend on
the batch size, the number of devices, the device, or what was drawn before, and nothing has to be
stored to resume. The hash is the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied
once per coordinate.
"""

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def mix(key: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors (arithmetic modulo 2^64)."""
    key = (key ^ logical_shift(key, 30)) * MULTIPLIERS[0]
    key = (key ^ logical_shift(key, 27)) * MULTIPLIERS[1]
    return key ^ logical_shift(key, 31)


def hashed(seed: int, *coordinates: int | Tensor, device: torch.device | None = None) -> Tensor:
    """One 64-bit hash per place; integer coordinates broadcast against each other."""
    if device is None:
        device = next((c.device for c in coordinates if isinstance(c, Tensor)), None)
    key = mix(torch.as_tensor(_signed(seed), dtype=torch.int64, device=device) + GOLDEN_GAMMA)
    for coordinate in coordinates:
        if not isinstance(coordinate, Tensor):
            coordinate = torch.as_tensor(_signed(coordinate), dtype=torch.int64, device=device)
        key = mix((key ^ mix(coordinate * GOLDEN_GAMMA)) + GOLDEN_GAMMA)
    return key


def uniform(
    seed: int,
    *coordinates: int | Tensor,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform on [0, 1): float32 on a grid of 2^-24, float64 of 2^-53. Coordinates as for
    `hashed`."""
    bits = 24 if dtype == torch.float32 else 53
    return (
        logical_shift(hashed(seed, *coordinates, device=device), 64 - bits).to(dtype) * 2.0**-bits
    )


def logical_shift(key: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own copies the sign bit."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
