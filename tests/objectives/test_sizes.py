"""Rows of different block sizes: how they are drawn, and that the expected loss of each is the
bound at its own size, whatever the others have."""

import itertools
from dataclasses import replace

import pytest
import torch
from networks import assert_within, chi_square_p, small
from test_identities import enumerated_nelbo, gauss_legendre, masks

from evaluation import estimators
from evaluation.estimators import AskedTexts
from evaluation.network import asker
from models import attention
from models.attention import dense, flex, sdpa
from noise_schedule import EPS, LogLinear
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import SIZES, Noise, draw_example_noise, draw_noise, per_token
from objectives.counts import UNIFORM, masked_by_counts, masked_in_sizes, within
from objectives.sizes import SizeLaw

WORDS, MASK = 3, 3
TEXT = torch.tensor([[2, 0, 1, 1]])
LAW = SizeLaw((1, 2, 4), (0.25, 0.5, 0.25))
ODD = SizeLaw((2, 4, 6, 12), (0.1, 0.2, 0.3, 0.4))  # 4 and 6: neither divides the other


def drawn(law, rows, *, step=0, batch=8, length=12, antithetic=True):
    settings = {"global_batch": batch, "length": length, "block_size": 4, "antithetic": antithetic}
    return draw_noise(1, step, rows, sizes=law, **settings)


# ---- what is drawn


@pytest.mark.parametrize(("law", "batch"), [(LAW, 8), (LAW, 100), (ODD, 40)])
def test_each_size_comes_as_often_as_its_weight_says(law, batch):
    for step in range(5):
        sizes = drawn(law, torch.arange(batch), step=step, batch=batch).sizes
        counts = [int((sizes == size).sum()) for size in law.sizes]
        assert counts == [round(weight * batch) for weight in law.weights]


def test_where_rows_do_not_divide_evenly_each_row_still_has_the_law():
    """Three rows by (.1, .2, .3, .4): no size is off by a whole row, and over many steps every row
    has each size as often as its weight says."""
    sizes = torch.stack([ODD.deal(1, step, 3, SIZES) for step in range(1000)])
    found = torch.stack([(sizes == size).sum(0) for size in ODD.sizes])  # [4, 3]
    weights = torch.tensor(ODD.weights)
    for row in range(3):
        assert chi_square_p(found[:, row], weights * 1000) > 1e-4
    in_step = torch.stack([(sizes == size).sum(1) for size in ODD.sizes], 1)
    assert ((in_step - 3 * weights).abs() < 1 + 1e-6).all()


def test_the_sizes_of_a_step_do_not_tell_those_of_the_next():
    first, second = (drawn(LAW, torch.arange(512), step=i, batch=512).sizes for i in (0, 1))
    table = torch.tensor(
        [[((first == a) & (second == b)).sum() for b in (1, 2, 4)] for a in (1, 2, 4)]
    )
    assert (
        chi_square_p(table, 512 * torch.tensor(LAW.weights).outer(torch.tensor(LAW.weights))) > 1e-4
    )


@pytest.mark.parametrize("antithetic", [True, False])
def test_with_one_size_the_noise_is_that_without_the_setting(antithetic):
    """Bit for bit."""
    rows = torch.tensor([5, 0, 7])
    ours = drawn(SizeLaw((4,), (1.0,)), rows, step=3, antithetic=antithetic)
    plain = drawn(None, rows, step=3, antithetic=antithetic)
    assert ours.sizes.tolist() == [4, 4, 4]
    assert torch.equal(ours.token, plain.token)
    for name in ("time", "count"):
        assert torch.equal(getattr(ours, name), per_token(getattr(plain, name), 12))


@pytest.mark.parametrize("law", [LAW, ODD])
def test_all_tokens_of_a_block_have_one_time_and_each_size_has_strata_of_its_own(law):
    noise = drawn(law, torch.arange(10), batch=10)
    for size in law.sizes:
        times = noise.time[noise.sizes == size].unflatten(1, (-1, size))
        assert torch.equal(times, times[..., :1].expand_as(times))
        blocks = times[..., 0].flatten().double()
        assert (blocks * len(blocks)).floor().sort().values.tolist() == list(range(len(blocks)))


def test_every_count_comes_equally_often_among_the_blocks_of_each_size():
    for step in range(3):
        noise = drawn(ODD, torch.arange(120), step=step, batch=120)
        scored = torch.ones(120, 12, dtype=torch.bool)
        masked, weight = masked_in_sizes(UNIFORM, noise.time, noise.token, scored, noise.sizes)
        for size in ODD.sizes:
            rows = noise.sizes == size
            m = masked[rows].unflatten(1, (-1, size)).sum(-1)
            assert m.flatten().bincount().tolist() == [0] + [m.numel() // size] * size
            torch.testing.assert_close(weight[rows], per_token(size / m.double(), 12))


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("split", [1, 3, 5])
def test_the_noise_of_a_row_does_not_depend_on_how_the_batch_is_split(split, antithetic):
    rows = torch.arange(10)
    whole = drawn(ODD, rows, batch=10, antithetic=antithetic)
    parts = [drawn(ODD, part, batch=10, antithetic=antithetic) for part in rows.split(split)]
    for name, value in vars(whole).items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value), name


def test_a_batch_may_reach_over_several_steps():
    settings = {"length": 12, "block_size": 4, "antithetic": True, "sizes": ODD}
    both = draw_example_noise(1, torch.arange(5, 15), global_batch=10, **settings)
    parts = [
        drawn(ODD, torch.arange(5, 10), batch=10),
        drawn(ODD, torch.arange(5), step=1, batch=10),
    ]
    for name, value in vars(both).items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value), name


# ---- the expected loss of a row is the bound at its size


def enumerated_counts(size):
    """(u, keys, chance) of every count of 1 .. S scored tokens, and every order of a block; all
    blocks of TEXT alike."""
    borders = torch.tensor(sorted({m / n for n in range(1, size + 1) for m in range(n + 1)}))
    orders = torch.tensor(list(itertools.permutations(range(size)))) / size
    u = ((borders[1:] + borders[:-1]) / 2).repeat_interleave(len(orders))
    chance = (borders.diff() / len(orders)).repeat_interleave(len(orders))
    keys = orders.repeat(len(borders) - 1, TEXT.shape[1] // size)
    return u[:, None].expand(-1, TEXT.shape[1]), keys, chance


def of_all_sizes(parts):
    """Tensors of several sizes as one batch, in an order that mixes them; and the sizes."""
    sizes = torch.cat(
        [torch.full((len(part[0]),), s) for s, part in zip(LAW.sizes, parts, strict=True)]
    )
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0))
    return sizes[order], *(torch.cat(each)[order] for each in zip(*parts, strict=True))


def bounds(objective, net, inputs, sizes, chance):
    """Nats of the text at each size: the mean of its rows."""
    with torch.no_grad():
        nll = objective.compute_loss(net, inputs).nll.double().sum(1) * chance
    return [float(nll[sizes == size].sum()) for size in LAW.sizes]


@pytest.mark.parametrize("ignore_bos", [False, True])
def test_the_expected_loss_of_each_row_is_the_exact_bound_at_its_size(ignore_bos):
    """All counts, sets and sizes in one batch. The first token seen: the bound that evaluation
    calls exact, without it."""
    net = small(vocab_size=WORDS + 1)
    objective = MaskedDiffusion(MASK, 4, LogLinear(), ignore_bos=ignore_bos, sizes=LAW)
    sizes, u, keys, chance = of_all_sizes([enumerated_counts(size) for size in LAW.sizes])
    rows = len(sizes)
    noise = Noise(u, keys, u, sizes)
    x0 = TEXT.expand(rows, -1)
    inputs = objective.inputs_by_counts(x0, torch.ones_like(x0), noise, law=UNIFORM)
    found = bounds(objective, net, inputs, sizes, chance)
    for size, ours in zip(LAW.sizes, found, strict=True):
        if ignore_bos:
            scored = torch.tensor([[False, True, True, True]])
            ask = asker(net, TEXT, block_size=size, mask_id=MASK)
            with torch.no_grad():
                asked = AskedTexts(TEXT, scored, size, MASK)
                wanted = float(estimators.exact(ask, asked).sum())
        else:
            with torch.no_grad():
                wanted = enumerated_nelbo(net, TEXT, size)
        assert ours == pytest.approx(wanted, rel=1e-5), size


def test_by_times_the_expected_loss_of_each_row_is_the_exact_bound_at_its_size():
    """Quadrature over the times, all sets of masked tokens, all sizes in one batch."""
    net = small(vocab_size=WORDS + 1)
    objective = MaskedDiffusion(MASK, 4, LogLinear(), ignore_bos=False, sizes=LAW)
    nodes, weights = gauss_legendre(4)
    parts = []
    for size in LAW.sizes:
        rows = [
            (mask * (4 // size), t, weight * t ** sum(mask) * (1 - t) ** (size - sum(mask)))
            for mask in masks(size)
            for t, weight in zip(nodes.tolist(), weights.tolist(), strict=True)
        ]
        masked, t, chance = map(torch.tensor, zip(*rows, strict=True))
        parts.append((masked, t, chance))
    sizes, masked, t, chance = of_all_sizes(parts)
    x0 = TEXT.expand(len(sizes), -1)
    inputs = objective.loss_inputs_at(
        x0,
        torch.where(masked, MASK, x0),
        t[:, None].expand(-1, 4).float(),
        torch.ones(x0.shape),
        interval=(0.0, 1.0),
        block_sizes=sizes,
    )
    with torch.no_grad():
        wanted = [enumerated_nelbo(net, TEXT, size) for size in LAW.sizes]
    assert bounds(objective, net, inputs, sizes, chance) == pytest.approx(wanted, rel=1e-5)


# ---- a row is what it would be among rows of its own size

DOCUMENTS = torch.tensor([[1] * 7 + [0] * 5 + [2] * 9 + [0] * 3, [3] * 12 + [1] * 12] * 2)
BATCHES = {"one text": None, "documents": DOCUMENTS}


def batch(ids):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(WORDS, (4, 24), generator=generator)
    valid = torch.ones_like(x0) if ids is None else (ids > 0).long()
    return x0, valid


def inputs_of(objective, x0, valid, noise, by, ids):
    if by == "counts":
        return objective.inputs_by_counts(x0, valid, noise, law=within(1, 1, 1), document_ids=ids)
    settings = {"interval": (EPS, 1.0), "training": True, "document_ids": ids}
    return objective.loss_inputs(x0, valid, noise, **settings)


@pytest.mark.parametrize("prepare", [dense, sdpa, flex], ids=lambda f: f.__name__)
@pytest.mark.parametrize("of", [(2, 4, 6, 12), (2, 4, 6, 24)], ids=["parts", "with whole rows"])
@pytest.mark.parametrize("by", ["counts", "times"])
@pytest.mark.parametrize("packed", BATCHES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_row_is_as_among_rows_of_its_own_size(packed, by, of, prepare, monkeypatch):
    """Losses, and the gradient of the batch. Chunks of the split form hold whole blocks."""
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 8)
    ids, law = BATCHES[packed], SizeLaw(of, (0.25,) * 4)
    x0, valid = batch(ids)
    noise = drawn(law, torch.arange(4), batch=4, length=24)
    assert sorted(noise.sizes.tolist()) == list(of)
    net, plain = small(WORDS + 1), small(WORDS + 1)
    net.prepare_attention, plain.prepare_attention = prepare, dense
    objective = MaskedDiffusion(MASK, 4, LogLinear(), sizes=law)
    gradients = prepare is not flex  # which has none on a CPU
    with torch.set_grad_enabled(gradients):
        mixed = objective.compute_loss(net, inputs_of(objective, x0, valid, noise, by, ids))
        alone = []
        for row, size in enumerate(noise.sizes.tolist()):
            one = slice(row, row + 1)
            own = Noise(noise.time[one, ::size], noise.token[one], noise.count[one, ::size])
            of_size = replace(objective, block_size=size, sizes=None)
            given = inputs_of(
                of_size, x0[one], valid[one], own, by, None if ids is None else ids[one]
            )
            alone.append(of_size.compute_loss(plain, given))
    assert_within(mixed.nll, torch.cat([loss.nll for loss in alone]).detach(), 1e-5)
    assert torch.equal(mixed.loss_mask, torch.cat([loss.loss_mask for loss in alone]))
    if gradients:
        mixed.per_place.backward()
        (sum(loss.per_place for loss in alone) / 4).backward()
        for (name, p), q in zip(net.named_parameters(), plain.named_parameters(), strict=True):
            if p.grad is not None:
                assert (p.grad - q[1].grad).norm() <= 1e-5 * q[1].grad.norm() + 1e-7, name


def test_with_one_size_the_loss_is_bit_for_bit_that_without_the_setting():
    x0, valid = batch(None)
    net, one = small(WORDS + 1), SizeLaw((4,), (1.0,))
    for by in ("counts", "times"):
        losses = []
        for law in (None, one):
            objective = MaskedDiffusion(MASK, 4, LogLinear(), sizes=law)
            noise = drawn(law, torch.arange(4), batch=4, length=24)
            inputs = inputs_of(objective, x0, valid, noise, by, None)
            losses.append(objective.compute_loss(net, inputs).per_place)
        assert torch.equal(*losses)


def test_masks_by_counts_of_one_size_are_those_of_a_single_one():
    noise = drawn(SizeLaw((4,), (1.0,)), torch.arange(8))
    scored = torch.ones(8, 12, dtype=torch.bool)
    ours = masked_in_sizes(within(1, 1, 1), noise.time, noise.token, scored, noise.sizes)
    plain = masked_by_counts(within(1, 4, 4), noise.time[:, ::4], noise.token, scored)
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.equal(mine, theirs)
