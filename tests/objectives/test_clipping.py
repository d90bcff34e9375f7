"""The search for the interval of times whose loss varies least."""

import math
import re

import pytest
import torch
from conftest import load_json

from objectives.clipping import BATCHES, Search, candidates, name, variance
from objectives.corruption import EXACT

GRIDS = load_json("metrics/valid_vars.json")
SEARCHES = load_json("metrics/clipped_search.json")
FLOOR = 1e-3
CLOSE = 1e-6  # recorded bounds went through float32


def grid_of(widths, delta):
    return candidates(block_size=4, widths=widths, delta=delta, sampling_eps=FLOOR)


def mended(keys):
    """The recorded candidates without the faults: those that overshoot 1 (their arange runs too
    far), and a second copy of the full interval (width 1) that differs in its float32 bound."""
    kept = [tuple(keys[0])]
    for lo, hi in keys[1:]:
        full = abs(lo - FLOOR) < CLOSE and abs(hi - 1) < CLOSE
        if hi <= 1 + CLOSE and not full:
            kept.append((lo, hi))
    return kept


@pytest.mark.parametrize("key", [k for k, v in GRIDS.items() if "widths" in v])
def test_the_candidates_are_the_recorded_ones_in_their_order(key):
    recorded = mended(GRIDS[key]["keys"])
    ours = grid_of(GRIDS[key]["widths"], GRIDS[key]["delta"])
    assert len(ours) == len(recorded)
    for one, other in zip(ours, recorded, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)


def test_blocks_of_one_have_the_full_interval_and_the_exact_one():
    (key,) = (k for k in GRIDS if k.startswith("block_size=1"))
    ours = candidates(1, [0.5], 0.05, FLOOR)
    assert ours == [tuple(interval) for interval in GRIDS[key]["keys"]]
    assert ours[1] == EXACT


@pytest.mark.parametrize("delta", [0.05, 0.1, 0.03, 0.25])
@pytest.mark.parametrize("widths", [[0.5, 0.6, 0.7, 0.8, 0.9], [0.33], [1 / 3], [0.05], [1.0]])
def test_every_candidate_lies_between_the_floor_and_one(widths, delta):
    grid = grid_of(widths, delta)
    assert grid[0] == (FLOOR, 1)
    assert len(set(grid)) == len(grid)
    for lo, hi in grid:
        assert FLOOR <= lo < hi <= 1
    starts = [lo for lo, hi in grid[1:] if lo > FLOOR]
    for lo in starts:
        assert lo / delta == pytest.approx(round(lo / delta))
    for width in widths:
        last = max(lo for lo, hi in [*grid, (0.0, width)] if hi - lo == pytest.approx(width))
        assert last + delta + width > 1 - 1e-9, "the search stops short of 1"


@pytest.mark.parametrize("case", range(len(SEARCHES)))
def test_the_choice_and_the_figures_are_the_recorded_ones(case):
    """The third recording has an interval without entries, which wins with a variance of 0: a
    mended fault. Here all candidates see the same batches, so none can be empty; the test leaves it
    out of the grid and expects the least of the others."""
    recorded = SEARCHES[case]
    inputs = [entry for entry in recorded["inputs"] if entry["values"]]
    search = Search([tuple(entry["key"]) for entry in inputs])
    for batch in range(len(inputs[0]["values"])):
        search.add([variance(torch.tensor(entry["values"][batch])) for entry in inputs])
    figures = dict(zip((name(i) for i in search.grid), search.means(), strict=True))
    expected = {k: v for k, v in recorded["logged"].items() if not math.isnan(v)}
    assert list(figures) == list(expected)
    assert list(figures.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    if len(inputs) == len(recorded["inputs"]):
        chosen = (recorded["sampling_eps_min"], recorded["sampling_eps_max"])
        assert search.best() == pytest.approx(chosen, abs=CLOSE)
    else:
        assert name(search.best()) == min(figures, key=figures.get)


@pytest.mark.parametrize("case", range(len(SEARCHES)))
def test_our_candidates_are_logged_under_the_recorded_names(case):
    recorded = SEARCHES[case]
    assert [name(i) for i in grid_of(recorded["widths"], 0.05)] == list(recorded["logged"])


def test_names_have_two_digits():
    assert name((0.125, 0.6666)) == "valid_var_0.12 - 0.67"
    assert re.fullmatch(r"valid_var_\S+ - \S+", name(EXACT))


def test_the_first_of_equals_wins():
    search = Search([(FLOOR, 1), (0.1, 0.6), (0.2, 0.7)])
    for figures in ([2.0, 1.0, 1.5], [2.0, 1.0, 0.5]):
        search.add([torch.tensor(v, dtype=torch.float64) for v in figures])
    assert search.best() == (0.1, 0.6)
    assert search.means() == [2.0, 1.0, 1.0]


def test_every_candidate_needs_its_figure_of_every_batch():
    search = Search([(FLOOR, 1), (0.1, 0.6)])
    with pytest.raises(ValueError, match="zip"):
        search.add([torch.tensor(1.0)])


def test_the_search_stops_after_a_hundred_batches():
    search = Search([(FLOOR, 1)])
    for _ in range(BATCHES):
        assert search.wants_more()
        search.add([torch.tensor(1.0)])
    assert BATCHES == 100
    assert not search.wants_more()


def test_the_variance_is_unbiased_and_over_all_blocks():
    blocks = torch.tensor([[1.0, 2.0], [4.0, 7.0]])
    mean = 3.5
    by_hand = sum((x - mean) ** 2 for x in (1, 2, 4, 7)) / 3
    assert float(variance(blocks)) == pytest.approx(by_hand)
