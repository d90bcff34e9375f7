"""Times, strata and masks: their laws, and that no split of the batch changes them."""

import itertools
import math

import pytest
import torch
from conftest import load, load_json
from networks import MASK, chi_square_p

from noise_schedule import LogLinear
from objectives import corruption
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import (
    EXACT,
    Noise,
    draw_example_noise,
    draw_noise,
    mask_tokens,
    masked_independently,
    masked_within_bounds,
    per_token,
    shares_within,
    times,
)

INDEX = load_json("loss/index.json")
FALSE_ALARM = 1e-6  # of every chi-square test here; the seeds are fixed all the same


def noise(step=0, rows=None, *, seed=1, batch=6, length=12, block_size=3, antithetic=True):
    rows = torch.arange(batch) if rows is None else rows
    return draw_noise(
        seed,
        step,
        rows,
        global_batch=batch,
        length=length,
        block_size=block_size,
        antithetic=antithetic,
    )


# ---- times


@pytest.mark.parametrize("case", INDEX["sample_t"])
def test_recorded_draws_give_the_recorded_times_as_a_set(case, monkeypatch):
    """The reference deals the strata in a fixed order, block after block (mended: a random
    permutation). So each recorded draw is fed to the block that holds its stratum, and the sorted
    times are compared."""
    info, golden = INDEX["sample_t"][case], load("loss/sample_t.safetensors")
    u, batch, size = golden[f"{case}.eps_b"], info["batch"], info["block_size"]
    settings = {"batch": batch, "length": info["n"], "block_size": size}
    settings["antithetic"] = info["antithetic"]
    fed = torch.zeros_like(u)
    monkeypatch.setattr(corruption, "uniform", lambda *a, **kw: fed.double())
    strata = (noise(**settings).time * u.numel()).round().long()
    if info["antithetic"]:
        assert sorted(strata.flatten().tolist()) == list(range(u.numel()))
        fed = u.flatten()[strata]
    else:
        fed = u
    interval = (info["eps_min"], info["eps_max"])
    ours = times(noise(**settings).time, interval).flatten().sort().values
    theirs = golden[f"{case}.t"]
    theirs = theirs[:, ::size] if theirs.shape[1] > 1 else theirs
    torch.testing.assert_close(ours, theirs.flatten().sort().values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", range(5))
def test_every_stratum_of_the_global_batch_is_used_once(step):
    time = noise(step).time
    assert sorted((time * time.numel()).long().flatten().tolist()) == list(range(time.numel()))


def test_every_position_sees_the_whole_range_over_the_steps():
    """The reference gives block 0 of row 0 the lowest stratum for ever."""
    steps = 1200
    strata = torch.stack([(noise(s).time * 24).long() for s in range(steps)])  # [steps, B, N]
    for row, block in itertools.product(range(6), range(4)):
        counts = strata[:, row, block].bincount(minlength=24)
        assert chi_square_p(counts, torch.full((24,), steps / 24)) > FALSE_ALARM


def test_inside_a_stratum_times_are_uniform():
    time = torch.cat([noise(s).time.flatten() for s in range(200)]).double()
    inside = (time * 24) % 1
    counts = (inside * 10).long().bincount(minlength=10)
    assert chi_square_p(counts, torch.full((10,), len(time) / 10)) > FALSE_ALARM


def test_without_strata_times_are_independent():
    """Two blocks of a step: every cell of a 6 x 6 table equally likely. Strata would avoid the
    diagonal."""
    pairs = torch.cat([noise(s, batch=100, length=6, antithetic=False).time for s in range(30)])
    cells = (pairs * 6).long()
    counts = (cells[:, 0] * 6 + cells[:, 1]).bincount(minlength=36)
    assert chi_square_p(counts, torch.full((36,), len(pairs) / 36)) > FALSE_ALARM


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("split", [[6], [3, 3], [1, 1, 1, 1, 1, 1], [2, 4]])
def test_draws_do_not_depend_on_how_the_batch_is_split(split, antithetic):
    """Devices and micro-batches take their own rows of the same noise."""
    whole = noise(7, antithetic=antithetic)
    parts = [noise(7, rows, antithetic=antithetic) for rows in torch.arange(6).split(split)]
    for name in ("time", "token", "count"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name))


def test_another_step_or_seed_gives_other_noise():
    one = noise(3)
    for other in (noise(4), noise(3, seed=2)):
        for name in ("time", "token", "count"):
            assert not torch.equal(getattr(one, name), getattr(other, name))


def test_examples_of_the_stream_have_the_noise_of_their_step():
    settings = {"global_batch": 6, "length": 12, "block_size": 3, "antithetic": True}
    found = draw_example_noise(1, torch.arange(18, 24), **settings)
    assert torch.equal(found.time, noise(3).time)
    across = draw_example_noise(1, torch.tensor([5, 6, 19]), **settings)
    for i, (step, row) in enumerate([(0, 5), (1, 0), (3, 1)]):
        assert torch.equal(across.time[i], noise(step).time[row])
        assert torch.equal(across.token[i], noise(step).token[row])
        assert torch.equal(across.count[i], noise(step).count[row])


def test_times_stay_inside_the_interval():
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    for lo, hi in ((1e-3, 1.0), (0.3, 0.8), EXACT):
        t = times(u, (lo, hi))
        assert (t >= torch.tensor(lo)).all()
        assert (t <= torch.tensor(hi)).all()


def test_a_draw_is_below_one_also_where_float32_would_round_up(monkeypatch):
    """Else the last stratum would leave its interval."""
    highest = 1 - 2.0**-53

    def ones(*coordinates, dtype=torch.float32):
        return torch.full((6, 4), highest, dtype=dtype)

    monkeypatch.setattr(corruption, "uniform", ones)
    for antithetic in (True, False):
        assert (noise(antithetic=antithetic).time < 1).all()


# ---- masks


def test_each_token_is_masked_with_probability_p():
    p = torch.tensor([[0.1, 0.5], [0.9, 1.0]])
    steps = 800  # of two rows each, drawn at once
    token = noise(batch=2 * steps, length=8, block_size=4).token
    masked = masked_independently(token, p.repeat(steps, 1)).long().view(steps, 2, 8).sum(0)
    for row in range(2):
        for token in range(8):
            chance = float(p[row, token // 4])
            if chance == 1:
                assert masked[row, token] == steps
                continue
            counts = torch.tensor([masked[row, token], steps - masked[row, token]])
            expected = torch.tensor([chance * steps, (1 - chance) * steps])
            assert chi_square_p(counts, expected) > FALSE_ALARM


def test_a_number_equal_to_p_hides_as_published():
    p = torch.tensor([[0.25]])
    token = torch.tensor([[0.25, 0.25 + 1e-6]])
    assert masked_independently(token, p).tolist() == [[True, False]]


def test_times_tokens_and_counts_are_independent():
    """With blocks of one the three have the same coordinates but for their stream."""
    found = [noise(s, length=400, block_size=1, antithetic=False) for s in range(5)]
    streams = {
        name: (torch.cat([getattr(d, name).flatten() for d in found]) * 8).long()
        for name in ("time", "token", "count")
    }
    for one, other in itertools.combinations(streams.values(), 2):
        counts = (one * 8 + other).bincount(minlength=64)
        assert chi_square_p(counts, torch.full((64,), len(one) / 64)) > FALSE_ALARM


def test_a_block_shares_its_time():
    assert per_token(torch.tensor([[1.0, 2.0]]), 6).tolist() == [[1, 1, 1, 2, 2, 2]]


def test_the_first_token_stays_visible_where_bos_is_ignored():
    x0, everything = torch.arange(6).view(1, 6), torch.ones(1, 6, dtype=torch.bool)
    assert mask_tokens(x0, everything, 9, ignore_bos=True).tolist() == [[0, 9, 9, 9, 9, 9]]
    assert mask_tokens(x0, everything, 9, ignore_bos=False).tolist() == [[9] * 6]
    assert everything.all(), "the caller's tensor was changed"


# ---- masks within bounds


def conditional_law(size, p, interval):
    """P(mask | share inside) over all 2^K masks, by enumeration: what redrawing until it fits
    gives."""
    lo, hi = interval
    law = {}
    for mask in itertools.product([False, True], repeat=size):
        masked = sum(mask)
        if lo - 1e-6 <= masked / size <= hi + 1e-6:
            law[mask] = p**masked * (1 - p) ** (size - masked)
    total = sum(law.values())
    return {mask: chance / total for mask, chance in law.items()}


BOUNDED = [
    (4, 0.3, (0.3, 0.8)),
    (4, 0.55, (0.55, 0.95)),
    (4, 0.05, (0.25, 0.5)),
    (4, 0.9, (0.0, 0.5)),
    (5, 0.6, (0.0, 1.0)),
    (3, 1.0, (0.5, 1.0)),
    (2, 1e-3, (0.5, 0.5)),
]


@pytest.mark.parametrize(("size", "p", "interval"), BOUNDED)
def test_bounded_masks_have_the_law_of_redrawing_until_they_fit(size, p, interval):
    """Exactly: the number hidden over a fine grid of `count`, and which ones over every order of
    the tokens."""
    grid = 20_000
    law = conditional_law(size, p, interval)
    count = (torch.arange(grid) + 0.5)[:, None] / grid
    token = torch.rand(1, size, generator=torch.Generator().manual_seed(0)).expand(grid, size)
    masked = masked_within_bounds(token, count, torch.full((grid, 1), p), interval)
    number = masked.sum(1).bincount(minlength=size + 1).double() / grid
    expected = torch.zeros(size + 1, dtype=torch.float64)
    for mask, chance in law.items():
        expected[sum(mask)] += chance
    torch.testing.assert_close(number, expected, rtol=0, atol=2 / grid)

    orders = torch.tensor(list(itertools.permutations(range(size))))
    for k in expected.nonzero()[:, 0].tolist():
        below = float(expected[:k].sum() + expected[k] / 2)  # a `count` that hides k tokens
        counts = torch.full((len(orders), 1), below)
        masks = masked_within_bounds(
            orders / size, counts, torch.full((len(orders), 1), p), interval
        )
        assert (masks.sum(1) == k).all()
        _, times_seen = masks.unique(dim=0, return_counts=True)
        assert times_seen.tolist() == [len(orders) // math.comb(size, k)] * math.comb(size, k)


def test_bounded_masks_have_that_law_with_the_real_draws_too():
    size, p, interval = 4, 0.4, (0.25, 0.75)
    law = conditional_law(size, p, interval)
    found = [noise(s, batch=64, length=4, block_size=4, antithetic=False) for s in range(100)]
    token, count = (torch.cat([getattr(d, n) for d in found]) for n in ("token", "count"))
    masked = masked_within_bounds(token, count, torch.full((len(token), 1), p), interval)
    cells = (masked * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)
    expected = torch.zeros(16, dtype=torch.float64)
    for mask, chance in law.items():
        expected[sum(mask_tokens << (3 - i) for i, mask_tokens in enumerate(mask))] = chance * len(
            token
        )
    possible = expected > 0
    assert cells[~possible].sum() == 0
    assert chi_square_p(cells[possible], expected[possible]) > FALSE_ALARM


@pytest.mark.parametrize("case", INDEX["resample"])
def test_bounded_masks_lie_where_the_recorded_ones_lie(case):
    """The recorded loop consumes its draws in rounds, so only the support can be compared. A lower
    bound of exactly 1e-3 is none (as recorded); 0.00100000004, the same number from a float32
    buffer, is none here either: a mended fault."""
    info, golden = INDEX["resample"][case], load("loss/resample.safetensors")
    size, interval = info["block_size"], (info["eps_min"], info["eps_max"])
    theirs = (golden[f"{case}.xt"] == MASK).unflatten(1, (-1, size)).sum(-1)
    p = golden[f"{case}.p"][:, ::size]
    lo = 0.0 if interval[0] <= 1e-3 + 1e-6 else interval[0]
    fits = shares_within(size, (lo, interval[1]))
    assert fits[theirs].all()
    objective = MaskedDiffusion(MASK, size, LogLinear(), ignore_bos=False, resample=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lo, hi = interval
        shapes = (p.shape, golden[f"{case}.x"].shape, p.shape)
        _, token, count = (torch.rand(s, generator=generator) for s in shapes)
        u = ((p - lo) / (hi - lo)).clamp(0, 1 - 2.0**-24)
        found, _ = objective.corrupt(golden[f"{case}.x"], Noise(u, token, count), interval)
        ours = (found == MASK).unflatten(1, (-1, size)).sum(-1)
        assert fits[ours].all()
        assert torch.equal(torch.where(found == MASK, MASK, golden[f"{case}.x"]), found)


def test_the_full_interval_forces_no_mask():
    """A forced mask at t near 0 has weight 1/t: it would bias the likelihood bound."""
    t = torch.full((1000, 1), 1e-3)
    generator = torch.Generator().manual_seed(0)
    token, count = (
        torch.rand(1000, 4, generator=generator),
        torch.rand(1000, 1, generator=generator),
    )
    x0 = torch.zeros(1000, 4, dtype=torch.int64)
    for full_from in (1e-3, 0.01):
        objective = MaskedDiffusion(
            1, 4, LogLinear(), ignore_bos=False, resample=True, full_from=full_from
        )
        drawn = Noise(time=torch.zeros_like(t), token=token, count=count)
        x_t, _ = objective.corrupt(x0, drawn, (full_from, 1.0))
        assert (x_t == 1).float().mean() < 4 * full_from
        bounded, _ = objective.corrupt(x0, drawn, (0.25, 1.0))
        assert ((bounded == 1).sum(1) >= 1).all()


@pytest.mark.parametrize(
    ("size", "interval"), [(4, (0.3, 0.45)), (4, (0.8, 0.95)), (16, (0.51, 0.55)), (1, (0.2, 0.9))]
)
def test_bounds_that_no_share_meets_are_refused(size, interval):
    with pytest.raises(ValueError, match=f"no share k/{size} of a block lies in .* widen"):
        shares_within(size, interval)


def test_bounds_from_a_float32_buffer_mean_the_same():
    lo, hi = (float(torch.tensor(x)) for x in (0.45, 0.95))
    for size in (4, 16, 20):
        assert torch.equal(shares_within(size, (lo, hi)), shares_within(size, (0.45, 0.95)))
