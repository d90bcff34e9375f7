"""Named streams: that no two coincide, that they stay as they are, that old runs keep theirs."""

import itertools

import numpy as np
import pytest
import torch

from models.randomness import hashed
from objectives.corruption import draw_noise
from random_streams import VERSION, OldSeed, key, order, seed_dropout, seed_of, version_of

CPU = torch.device("cpu")
SEEDS = (0, 1, 2, 3, 2**31, 2**32 - 1)
STEPS = (0, 1, 2, 4, 2**20, 1_000_003, 2_000_006, 2**32 - 1)
ORDERS = ("strata", "rows", "parts", "lanes", "unit")


def dropout_of(seed, row):
    seed_dropout(seed, row, CPU)
    return torch.rand(8).tolist()


def test_no_two_coordinates_share_a_key():
    places = list(itertools.product(SEEDS, ("evaluate", "dropout"), STEPS))
    keys = [key(*place) for place in places] + [key(seed, "windows") for seed in SEEDS]
    # and none is a number of the noise of a step: (seed, step, stream, place)
    noise = [int(hashed(*place)) for place in itertools.product(SEEDS, STEPS, range(3), range(4))]
    assert len(set(keys + noise)) == len(keys) + len(noise)


def test_no_two_coordinates_share_an_order():
    places = list(itertools.product(SEEDS, ORDERS, STEPS))
    found = {tuple(order(*place, 24).tolist()) for place in places}
    assert len(found) == len(places)


def test_strata_differ_where_version_1_dealt_them_alike():
    assert (order(OldSeed(1), "strata", 1_000_003, 64) == order(OldSeed(2), "strata", 0, 64)).all()
    assert (order(1, "strata", 1_000_003, 64) != order(2, "strata", 0, 64)).any()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 1000])
def test_an_order_has_every_place_once(length):
    found = order(5, "rows", 3, length)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(length))


def test_all_orders_of_three_are_equally_likely():
    """To 5 standard errors of 6 000 orders."""
    found = [tuple(order(seed, "rows", 0, 3).tolist()) for seed in range(6000)]
    counts = [found.count(way) for way in itertools.permutations(range(3))]
    assert max(abs(count - 1000) for count in counts) < 5 * (1000 * 5 / 6) ** 0.5


def test_dropout_takes_all_64_bits_of_its_seed(monkeypatch):
    """torch's generator on CPUs takes 32 of them."""
    first, again = torch.manual_seed(7).get_state(), torch.manual_seed(7 + (1 << 32)).get_state()
    assert first[8:].equal(again[8:])
    monkeypatch.setattr("random_streams.key", lambda seed, name, row: 7 + (row << 32))
    assert dropout_of(1, 0) != dropout_of(1, 1)
    assert dropout_of(1, 0) == dropout_of(1, 0)


def test_the_words_of_the_generator_are_where_they_are_written():
    """The Mersenne twister begins with its seed."""
    words = torch.manual_seed(7).get_state().view(torch.int64)[3:627].tolist()
    assert words[0] == 7
    assert all(0 <= word < 1 << 32 for word in words)
    assert len(set(words)) == 624


# ---- the versions


RECORDED = {
    "strata": [1, 5, 2, 4, 0, 3],
    "rows": [2, 3, 4, 0, 1, 5],
    "parts": [1, 0, 4, 3, 2, 5],
    "lanes": [2, 0, 5, 4, 1, 3],
    "unit": [1, 4, 3, 0, 2, 5],
    "evaluate": -4138685407886129592,
    "dropout": -1920791614192436001,
    "windows": -997829838540222617,
    "evaluated": [2, 4, 3, 1, 0, 5],
    "stratum": [7, 0, 2, 1],
    "token": [404, 285, 716, 122],
    "mask": [668, 428, 44, 746],
}
RECORDED_OF_VERSION_1 = {
    "strata": [2, 5, 0, 3, 4, 1],
    "rows": [1, 2, 5, 0, 4, 3],
    "parts": [3, 5, 1, 2, 4, 0],
    "lanes": [0, 5, 4, 3, 1, 2],
    "unit": [4, 2, 5, 1, 0, 3],
    "evaluate": 8589958894,
    "dropout": 781707481490614599,
    "windows": 1,
    "evaluated": [3, 0, 1, 2, 5, 4],
    "stratum": [2, 6, 4, 5],
    "token": [404, 285, 716, 122],
    "mask": [304, 8, 320, 390],
}


def recorded(seed):
    noise = draw_noise(
        seed, 3, torch.arange(2), global_batch=4, length=4, block_size=2, antithetic=True
    )
    return {
        **{name: order(seed, name, 5, 6).tolist() for name in ORDERS},
        **{name: key(seed, name, 2) for name in ("evaluate", "dropout")},
        "windows": key(seed, "windows"),
        "evaluated": order(key(seed, "evaluate", 2), "strata", 5, 6).tolist(),
        "stratum": (noise.time * 8).long().flatten().tolist(),
        "token": (noise.token[0] * 1000).long().tolist(),
        "mask": [int(x * 1000) for x in dropout_of(seed, 9)][:4],
    }


def test_the_streams_stay_as_recorded():
    """Another number here is another version: VERSION is one more, and runs of this one keep it."""
    assert VERSION == 2
    assert recorded(1) == RECORDED


def test_version_1_stays_as_recorded():
    """numpy's and torch's own generators decide here: an old run goes on as long as they agree."""
    assert recorded(OldSeed(1)) == RECORDED_OF_VERSION_1


def test_a_run_keeps_its_version():
    assert version_of(seed_of(3, 1)) == 1
    assert version_of(seed_of(3, 2)) == 2
