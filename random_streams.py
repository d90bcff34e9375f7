"""Named streams of random numbers: the order of rows and strata, seeds of noise and dropout.

All follow from the hash of (seed, name, numbers): no library's generator decides, so they stay the
same with every version of torch and numpy. The noise of a step and the draws of a sampler hash
their own coordinates (objectives/corruption.py, samplers/draw.py).
"""

import numpy as np
import torch

from models.randomness import hashed

VERSION = 2  # of these formulae; a checkpoint keeps the one its run began with
TWISTER_WORDS = slice(3, 627)  # of torch.get_rng_state() as int64: torch's generator on CPUs
# Version 1: what told the orders of numpy's generator apart.
OLD_ORDERS = {"rows": (), "parts": (1,), "unit": (2,), "lanes": (3,)}


class OldSeed(int):
    """The seed of a run that began with version 1, and goes on with it: orders by the generators of
    torch and numpy, seeds by addition. As an int it is the same number."""


def seed_of(seed: int, version: int) -> int:
    """The seed of a run that began with this version of the streams."""
    return OldSeed(seed) if version == 1 else seed


def version_of(seed: int) -> int:
    return 1 if isinstance(seed, OldSeed) else VERSION


def key(seed: int, name: str, *numbers: int) -> int:
    """A seed of 64 bits, signed, of the same version. name: `evaluate`, `windows`, `dropout`
    or `prefixes`."""
    if not isinstance(seed, OldSeed):
        return int(hashed(seed, _number(name), *numbers))
    if name == "dropout":
        return int(hashed(seed + 0xD20, *numbers))
    return OldSeed(seed + 0x5EED + (numbers[0] << 32)) if name == "evaluate" else seed


def order(seed: int, name: str, number: int, length: int) -> np.ndarray:
    """A random order of 0 .. length - 1, int64. name: `strata` of step `number`, and `sizes`, which
    came after version 1; `rows` of an epoch; of a streamed text `parts` of an epoch, `lanes` of a
    turn, rows of a `unit`; `halves` of reference texts."""
    if not isinstance(seed, OldSeed):
        places = torch.arange(length)
        size = 1 << length.bit_length()
        # the place is in the low bits: no two are equal, whatever sorts them
        keys = hashed(seed, _number(name), number, places) & -size | places
        return np.sort(keys.numpy()) & (size - 1)
    if name == "strata":
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 62))
        return torch.randperm(length, generator=generator).numpy()
    return np.random.default_rng([seed, *OLD_ORDERS[name], number]).permutation(length)


def seed_dropout(seed: int, row: int, device: torch.device) -> None:
    """Dropout, which takes torch's generators, as a function of the place in the stream."""
    found = key(seed, "dropout", row)
    if device.type == "cpu":  # torch.manual_seed notes who asked, for GPUs that are not in use
        torch.default_generator.manual_seed(found)
    else:
        torch.manual_seed(found)
    if device.type == "cpu" and not isinstance(seed, OldSeed):
        # of a seed it takes 32 bits; its 624 words of 32 bits are set instead
        state = torch.get_rng_state()
        words = hashed(found, torch.arange(624)) & 0xFFFFFFFF
        state.view(torch.int64)[TWISTER_WORDS] = words
        torch.set_rng_state(state)


def _number(name: str) -> int:
    """Its letters, at most 8, as one number: above every step, so that no noise is hashed alike."""
    assert len(name) <= 8, f"of {name} only the last 8 letters would count"
    return int.from_bytes(name.encode(), "big")
