"""Random numbers as a function of their coordinates: the published hash, and its quality.

Every statistical test fails by chance with probability FALSE_ALARM; the numbers are fixed.
"""

import itertools

import pytest
import torch
from networks import chi_square_p

from models.randomness import GOLDEN_GAMMA, hashed, mix, uniform

FALSE_ALARM = 1e-6
WORD = (1 << 64) - 1


def mix_by_hand(key: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB & WORD
    return key ^ (key >> 31)


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def test_the_hash_is_splitmix64():
    """The first outputs of SplitMix64 from seed 0, as published with the generator."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = torch.tensor([signed((i + 1) * 0x9E3779B97F4A7C15 & WORD) for i in range(3)])
    assert [x & WORD for x in mix(states).tolist()] == published


def test_integers_wrap_as_they_do_in_c():
    keys = [0, 1, WORD, 1 << 63, 0x0123456789ABCDEF, 0xFEDCBA9876543210]
    found = mix(torch.tensor([signed(k) for k in keys]))
    assert [x & WORD for x in found.tolist()] == [mix_by_hand(k) for k in keys]
    assert GOLDEN_GAMMA & WORD == 0x9E3779B97F4A7C15


def test_coordinates_broadcast():
    rows, columns = torch.arange(3)[:, None], torch.arange(5)
    table = uniform(1, 2, rows, columns)
    assert table.shape == (3, 5)
    for r, c in itertools.product(range(3), range(5)):
        assert table[r, c] == uniform(1, 2, r, c)


def test_a_number_depends_on_its_coordinates_alone():
    many = uniform(7, 1, torch.arange(1000))
    assert torch.equal(many[500:510], uniform(7, 1, torch.arange(500, 510)))
    assert torch.equal(many.flip(0), uniform(7, 1, torch.arange(1000).flip(0)))


def test_the_order_of_coordinates_matters():
    one = hashed(1, torch.arange(50)[:, None], torch.arange(50))
    assert not (one == one.T).logical_and(~torch.eye(50, dtype=torch.bool)).any()
    assert one.unique().numel() == 2500


def test_negative_and_huge_seeds_are_seeds():
    found = [int(hashed(seed, 0)) for seed in (0, 1, -1, 2**40, 2**64 - 2, 2**63)]
    assert len(set(found)) == len(found)
    assert int(hashed(-1, 0)) == int(hashed(2**64 - 1, 0))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_numbers_lie_on_their_grid_in_zero_to_one(dtype, bits):
    numbers = uniform(3, torch.arange(100_000), dtype=dtype)
    assert numbers.dtype == dtype
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    scaled = numbers.double() * 2.0**bits
    assert torch.equal(scaled, scaled.round())


def bins(numbers, count):
    return (numbers.double() * count).long().clamp(max=count - 1)


def assert_even(cells, count):
    observed = cells.flatten().bincount(minlength=count)
    expected = torch.full((count,), cells.numel() / count)
    assert chi_square_p(observed, expected) > FALSE_ALARM


@pytest.mark.parametrize("axis", range(3))
def test_numbers_are_uniform_along_every_coordinate(axis):
    if axis == 0:
        numbers = torch.stack([uniform(seed, 6, 7) for seed in range(3000)])
    else:
        coordinates = [5, 6, 7]
        coordinates[axis] = torch.arange(200_000)
        numbers = uniform(*coordinates)
    assert_even(bins(numbers, 50), 50)


@pytest.mark.parametrize("lag", [1, 2, 64, 1024])
def test_neighbours_are_independent(lag):
    numbers = bins(uniform(0, 0, torch.arange(150_000)), 8)
    assert_even(numbers[:-lag] * 8 + numbers[lag:], 64)


def test_streams_and_steps_are_independent():
    place = torch.arange(100_000)
    reference = bins(uniform(1, 10, 0, place), 8)
    for other in ((1, 10, 1), (1, 11, 0), (2, 10, 0)):
        assert_even(reference * 8 + bins(uniform(*other, place), 8), 64)


def test_the_low_end_is_as_fine_as_the_rest():
    """p(t) near 0 is decided there: among a million numbers about a thousand lie below 1e-3."""
    numbers = uniform(9, torch.arange(1_000_000))
    low = numbers[numbers < 1e-3]
    assert_even(bins(low * 1000, 10), 10)
    observed = torch.tensor([len(low), 1_000_000 - len(low)])
    assert chi_square_p(observed, torch.tensor([1000, 999_000])) > FALSE_ALARM
