"""Noise by counts: its expected loss and gradient are those of drawn times, that is the bound.

Everything is enumerated: every count, every set of masked tokens, all blocks at once.
"""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from networks import small, texts_of, toy
from test_identities import enumerated_nelbo, gauss_legendre, masks

from evaluation import estimators
from evaluation.estimators import AskedTexts
from evaluation.network import asker
from models.document_ids import begins
from noise_schedule import LogLinear, get_schedule
from objectives.block_diffusion import MaskedDiffusion
from objectives.clipping import count_candidates, law_variances, name_of_counts
from objectives.corruption import Noise, draw_noise, mask_tokens
from objectives.counts import (
    FLOOR,
    PARTS,
    UNIFORM,
    CountLaw,
    SecondMoments,
    complementary,
    least_variance,
    masked_by_counts,
    to_learn,
    within,
)

WORDS, MASK, LENGTH = 3, 3, 8
TEXT = torch.tensor([[2, 0, 1, 1, 0, 2, 2, 1]])
SKEWED = CountLaw(torch.tensor([2.0, 0.5, 0.5, 1.0], dtype=torch.float64))
TWO = torch.tensor([[1, 1, 1, 0, 2, 2, 2, 2]])  # a block with padding at its end, and a second text
SHORT = torch.tensor([[1, 1, 2, 2, 2, 2, 2, 0]])  # texts that begin within a block of eight
CASES = {  # block size, ignore_bos, valid, document_ids
    "bamdlm": (4, False, None, None),
    "bamdlm, first token seen": (4, True, None, None),
    "bamdlm, blocks of two": (2, True, None, None),
    "bamdlm, documents": (4, True, None, TWO),
    "bamdlm, a mask in the text": (4, True, torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]), None),
    "bamdlm, a block of padding": (4, True, torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]), None),
    "mdlm": (4, False, None, None),
    "mdlm, first token seen": (4, True, None, None),
    "mdlm, documents": (8, True, None, SHORT),
}


def case(name):
    """(objective, x0, valid, document_ids)."""
    size, ignore_bos, valid, ids = CASES[name]
    x0 = TEXT[:, :size] if name.startswith("mdlm") else TEXT
    valid = torch.ones_like(x0) if valid is None else valid
    if ids is not None:
        valid = valid * (ids > 0)
    x0 = torch.where(valid > 0, x0, MASK)
    schedule = get_schedule("loglinear")
    return MaskedDiffusion(MASK, size, schedule, ignore_bos=ignore_bos), x0, valid, ids


def of_rows(x, rows):
    return None if x is None else x.expand(rows, -1)


def expectation(objective, net, inputs, chances):
    """(Nats of the text, gradient): the mean over rows of these chances."""
    row = inputs.loss_positions // inputs.loss_mask.shape[1]
    inputs = replace(inputs, weights=inputs.weights * chances[row].float())
    total = objective.compute_loss(net, inputs).per_place * inputs.loss_mask.numel()
    gradients = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
    return float(total.detach()), torch.cat([g.flatten() for g in gradients if g is not None])


def by_counts(name, net, law):
    """Every count of blocks of n scored tokens lies between two borders of the law of u. Sets: by
    all orders of the keys; for blocks of eight, by those of chosen places."""
    objective, x0, valid, ids = case(name)
    size = objective.block_size
    n = torch.arange(1, size + 1)[:, None]
    borders = law.up_to(torch.minimum(torch.arange(size + 1), n), n).flatten().unique()
    middles, widths = (borders[1:] + borders[:-1]) / 2, borders.diff()
    if size < 8:
        orders = torch.tensor(list(itertools.permutations(range(size)))) / size
    else:  # of C(8, m) sets each m first: of each order only which come first matters
        orders = subset_orders(name)
    keys = orders.repeat(len(middles), x0.shape[1] // size)
    u = middles.repeat_interleave(len(orders))[:, None].expand(-1, x0.shape[1] // size)
    chances = widths.repeat_interleave(len(orders)) / len(orders)
    rows = len(keys)
    noise = Noise(u, keys, u)
    inputs = objective.inputs_by_counts(
        of_rows(x0, rows), of_rows(valid, rows), noise, law=law, document_ids=of_rows(ids, rows)
    )
    return expectation(objective, net, inputs, chances)


def subset_orders(name):
    """Orders of the five scored places of SHORT in which every set of m comes first equally often:
    all 120; the others' keys do not matter."""
    _, _, valid, _ = case(name)
    scored = (valid[0] > 0) & torch.tensor([0, 1, 0, 1, 1, 1, 1, 0]).bool()
    orders = torch.zeros(120, 8)
    orders[:, scored] = torch.tensor(list(itertools.permutations(range(5)))) / 5
    return orders


def by_times(name, net):
    """The published loss over all times in (0, 1] by quadrature, and all masks; its integrand is a
    polynomial of degree below S."""
    objective, x0, valid, ids = case(name)
    size = objective.block_size
    blocks = x0.shape[1] // size
    x_t, times, chances = [], [], []
    nodes, weights = gauss_legendre(size)
    for mask in masks(size):
        masked = torch.tensor(mask).repeat(blocks)[None]
        row = mask_tokens(x0, masked, MASK, objective.ignore_bos, ids)
        for t, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            x_t.append(row)
            times.append(t)
            chances.append(weight * t ** sum(mask) * (1 - t) ** (size - sum(mask)))
    rows = len(x_t)
    inputs = objective.loss_inputs_at(
        of_rows(x0, rows),
        torch.cat(x_t),
        torch.tensor(times)[:, None].expand(-1, blocks),
        objective.loss_mask(of_rows(valid, rows), True, of_rows(ids, rows)),
        interval=(0.0, 1.0),
        document_ids=of_rows(ids, rows),
    )
    return expectation(objective, net, inputs, torch.tensor(chances))


@functools.cache
def network():
    return small(vocab_size=WORDS + 1)


@pytest.mark.parametrize("law", [UNIFORM, SKEWED, to_learn(4)], ids=["uniform", "skewed", "parts"])
@pytest.mark.parametrize("name", CASES)
def test_the_expected_loss_and_gradient_are_those_of_the_integral_over_times(name, law):
    ours, gradient = by_counts(name, network(), law)
    theirs, wanted = by_times(name, network())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["bamdlm", "mdlm"])
@torch.no_grad()
def test_the_integral_is_the_enumerated_bound(name):
    objective, x0, _, _ = case(name)
    with torch.enable_grad():
        found, _ = by_counts(name, network(), UNIFORM)
    wanted = enumerated_nelbo(network(), x0, objective.block_size)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["bamdlm, first token seen", "mdlm, first token seen"])
def test_with_the_first_token_seen_it_is_the_bound_that_evaluation_calls_exact(name):
    objective, x0, _, _ = case(name)
    found, _ = by_counts(name, network(), UNIFORM)
    scored = torch.ones_like(x0, dtype=torch.bool)
    scored[:, 0] = False
    with torch.no_grad():
        ask = asker(network(), x0, block_size=objective.block_size, mask_id=MASK)
        asked = AskedTexts(x0, scored, objective.block_size, MASK)
        wanted = float(estimators.exact(ask, asked).sum())
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_range_of_counts_is_not_the_bound():
    """Of the toy the expected loss of counts 2 and 3 is 7.5 % more."""
    (bound, _), (found, _) = moments(UNIFORM), moments(within(2, 3, 4))
    assert found / bound == pytest.approx(1.075, abs=1e-3)


# ---- two views


def by_views(name, net):
    """Every m = 1 .. n and every order of the keys."""
    objective, x0, valid, ids = case(name)
    size, blocks = objective.block_size, x0.shape[1] // objective.block_size
    borders = torch.tensor(sorted({m / n for n in range(1, size + 1) for m in range(n + 1)}))
    middles, widths = (borders[1:] + borders[:-1]) / 2, borders.diff()
    orders = torch.tensor(list(itertools.permutations(range(size)))) / size
    keys = orders.repeat(len(middles), blocks)
    u = middles.repeat_interleave(len(orders))[:, None].expand(-1, blocks)
    chances = widths.repeat_interleave(len(orders)) / len(orders)
    rows = len(keys)
    inputs = objective.inputs_by_views(
        of_rows(x0, rows), of_rows(valid, rows), Noise(u, keys, u), document_ids=of_rows(ids, rows)
    )
    return inputs, chances


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("bamdlm")])
def test_two_complementary_views_have_the_expected_loss_and_gradient_of_one(name):
    net = network()
    inputs, chances = by_views(name, net)
    row = inputs.loss_positions // (2 * inputs.loss_mask.shape[1])
    weighed = replace(inputs, weights=inputs.weights * chances[row].float())
    found = case(name)[0].compute_loss(net, weighed)
    total = found.per_place * inputs.loss_mask.numel()
    ours = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
    ours = torch.cat([g.flatten() for g in ours if g is not None])
    theirs, gradient = by_times(name, net)
    assert float(total.detach()) == pytest.approx(theirs, rel=1e-5)
    assert float(found.nll.double().sum()) == pytest.approx(theirs, rel=1e-5)
    assert (ours - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("bamdlm")])
def test_two_views_predict_every_scored_token_once(name):
    objective, x0, valid, ids = case(name)
    inputs, _ = by_views(name, network())
    length = x0.shape[1]
    places = torch.zeros(len(inputs.tokens) * 2 * length, dtype=torch.int64)
    places[inputs.loss_positions] = 1
    predicted = places.view(-1, 2, length).sum(1)
    scored = (valid > 0) & ~(objective.ignore_bos & begins(x0, ids))
    assert torch.equal(predicted, scored.long().expand_as(predicted))
    first, second, clean = inputs.tokens.split(length, 1)
    assert torch.equal(clean, x0.expand_as(clean))
    both = torch.stack([first, second], 1)
    masked = (both == MASK) & (x0 != MASK)[:, None]
    assert torch.equal(masked.flatten().nonzero()[:, 0], inputs.loss_positions)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("bamdlm")])
def test_the_weights_of_two_views_add_up_to_the_tokens_of_the_block_in_every_draw(name):
    objective, x0, valid, ids = case(name)
    inputs, _ = by_views(name, network())
    weights = torch.zeros(2 * inputs.loss_mask.numel())
    weights[inputs.loss_positions] = inputs.weights
    length = x0.shape[1]
    totals = weights.view(-1, 2, length // objective.block_size, objective.block_size).sum((1, 3))
    scored = (valid > 0) & ~(objective.ignore_bos & begins(x0, ids))
    wanted = scored.unflatten(1, (-1, objective.block_size)).sum(-1).float()
    torch.testing.assert_close(totals, wanted.expand_as(totals))


@torch.no_grad()
def test_rows_to_spare_change_no_loss_of_two_views():
    inputs, _ = by_views("bamdlm, first token seen", network())
    objective = case("bamdlm, first token seen")[0]
    for more in (1, 10**6):
        padded = inputs.padded(len(inputs.loss_positions) + more)
        assert len(padded.loss_positions.unique()) == len(padded.loss_positions)
        assert len(padded.loss_positions) <= 2 * inputs.loss_mask.numel()
        ours, plain = (objective.compute_loss(network(), q) for q in (padded, inputs))
        torch.testing.assert_close(ours.nll, plain.nll, rtol=1e-5, atol=1e-6)


# ---- what is drawn


def drawn(law, rows, *, step=0, batch=12, size=4, ignore_bos=True):
    noise = draw_noise(
        1, step, rows, global_batch=batch, length=16, block_size=size, antithetic=True
    )
    scored = torch.ones(len(rows), 16, dtype=torch.bool)
    scored[:, 0] = not ignore_bos
    masked, weight = masked_by_counts(law, noise.time, noise.token, scored)
    return masked.unflatten(1, (-1, size)).sum(-1), masked, weight


@pytest.mark.parametrize(
    ("law", "shares"),
    [(UNIFORM, [12] * 4), (within(2, 3, 4), [0, 24, 24, 0]), (SKEWED, [24, 6, 6, 12])],
    ids=["uniform", "range", "skewed"],
)
def test_over_the_global_batch_each_count_comes_as_often_as_its_law_says(law, shares):
    for step in range(5):
        m, _, _ = drawn(law, torch.arange(12), step=step, ignore_bos=False)
        assert m.flatten().bincount(minlength=5).tolist() == [0, *shares]


def test_the_first_block_has_a_law_of_its_own_without_its_first_token():
    """One to three of its three scored tokens, each as often, with weights 3 / m."""
    seen = [drawn(UNIFORM, torch.arange(12), step=step) for step in range(60)]
    m = torch.cat([m[:, 0] for m, _, _ in seen])
    masked, weight = (torch.cat(part)[:, :4] for part in list(zip(*seen, strict=True))[1:])
    assert not masked[:, 0].any()
    share = m.bincount(minlength=5) / len(m)
    assert share[[0, 4]].tolist() == [0, 0]
    assert share[1:4].tolist() == pytest.approx([1 / 3] * 3, abs=4 * (2 / 9 / len(m)) ** 0.5)
    torch.testing.assert_close(weight[:, 1], 3 / m.double())


@pytest.mark.parametrize(
    ("n", "q"), [(4, [0, 1 / 2, 1 / 2, 0]), (3, [1 / 6, 2 / 3, 1 / 6]), (1, [1])]
)
def test_a_range_is_one_of_shares_where_fewer_tokens_are_scored(n, q):
    """2 and 3 of 4 are the shares from 1/4 to 3/4."""
    m = torch.arange(1, n + 1)
    found = within(2, 3, 4).chance(m, torch.tensor(n))
    assert found.tolist() == pytest.approx(q, abs=1e-12)


@pytest.mark.parametrize("split", [1, 5, 6])
@pytest.mark.parametrize("law", [UNIFORM, SKEWED, within(2, 3, 4)])
def test_what_is_masked_does_not_depend_on_how_the_batch_is_split(law, split):
    rows = torch.arange(12)
    whole = drawn(law, rows)[1:]
    parts = zip(*(drawn(law, part)[1:] for part in rows.split(split)), strict=True)
    for ours, part in zip(whole, parts, strict=True):
        assert torch.equal(torch.cat(part), ours)


@pytest.mark.parametrize("size", [1, 3, 7, 49, 100])
def test_a_range_never_leaves_itself_whatever_the_rounding(size):
    u = torch.tensor([0.0, 1e-17, 0.5, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    for least, most in {(1, size), (size, size), (1, 1), (size // 2 + 1, size)}:
        m, weight = within(least, most, size).draw(u, torch.full((5,), size), size)
        assert (int(m.min()), int(m.max())) == (least, most)
        torch.testing.assert_close(weight, size / m.double())


# ---- variance, and the law of the least


def toy_losses(x=(0, 1, 1, 0)):
    """(m, sum of a(M, i)) of every set of the recorded toy's four tokens."""
    texts = texts_of([x], 2)
    for mask in masks(4):
        if any(mask):
            masked = torch.tensor([mask])
            yield sum(mask), float(texts.surprisal(toy(2), masked).sum())


def moments(law):
    """First and second of one draw of the toy's loss by the law."""
    first = second = 0.0
    for m, nats in toy_losses():
        m, n = torch.tensor(m), torch.tensor(4)
        chance = float(law.chance(m, n)) / math.comb(4, int(m))
        loss = float(law.weight(m, n)) * nats
        first, second = first + chance * loss, second + chance * loss**2
    return first, second


def learnt():
    """From every set, each count equally often."""
    second = SecondMoments(4, torch.device("cpu"))
    for m, nats in toy_losses():
        times = 12 // math.comb(4, m)
        m = torch.full((times, 1), m)
        second.add(4 / m.double() * nats, m, torch.full_like(m, 4))
    return least_variance(second.sums)


def test_the_toys_loss_varies_seven_times_less_by_counts():
    """.717 and 5.55, as shared/likelihoods.md has them."""
    first, second = moments(UNIFORM)
    assert first == pytest.approx(2.158915787306027, rel=1e-12)
    assert second - first**2 == pytest.approx(0.717, abs=5e-4)
    t = torch.logspace(-3, 0, 100_001, dtype=torch.float64)
    objective = MaskedDiffusion(2, 4, LogLinear())
    level = objective.noise_level(t, (1e-3, 1.0))
    timed = [
        [
            float(torch.trapezoid(level.weight**j * t**m * (1 - t) ** (4 - m), t)) * nats**j
            for j in (1, 2)
        ]
        for m, nats in toy_losses()
    ]
    first, second = map(sum, zip(*timed, strict=True))
    first, second = first / 0.999, second / 0.999
    assert second - first**2 == pytest.approx(5.55, abs=5e-3)


def test_two_views_of_the_toy_vary_less_than_half_of_one():
    """Each m and each order of the keys once, by the draw itself."""
    orders = torch.tensor(list(itertools.permutations(range(4)))) / 4
    u = ((torch.arange(4) + 0.5) / 4).repeat_interleave(len(orders))[:, None]
    keys = orders.repeat(4, 1)
    masked, weight = complementary(u, keys, torch.ones(len(keys), 4, dtype=torch.bool))
    texts = texts_of([(0, 1, 1, 0)] * len(keys), 2)
    views = zip(weight.unbind(1), masked.unbind(1), strict=True)
    loss = sum((w * texts.surprisal(toy(2), m)).sum(1) for w, m in views)
    assert float(loss.mean()) == pytest.approx(2.158915787306027, rel=1e-12)
    assert float(loss.var(correction=0)) == pytest.approx(0.2775, abs=1e-4)
    first, second = moments(UNIFORM)
    assert float(loss.var(correction=0)) < (second - first**2) / 2


def test_the_learnt_law_of_the_toy_is_the_closed_form():
    """q(m) in proportion to the root of the mean square of the sum of a(M, i), over m."""
    squares = torch.zeros(4, dtype=torch.float64)
    for m, nats in toy_losses():
        squares[m - 1] += (nats / m) ** 2 / math.comb(4, m)
    q = squares.sqrt() / squares.sqrt().sum()
    found = learnt()
    m, n = torch.arange(1, 5), torch.tensor(4)
    torch.testing.assert_close(found.chance(m, n), q, rtol=1e-12, atol=0)
    first, second = moments(found)
    assert first == pytest.approx(2.158915787306027, rel=1e-12)
    assert second == pytest.approx(float(squares.sqrt().sum()) ** 2, rel=1e-12)
    assert second < moments(UNIFORM)[1]


def test_no_weight_is_more_than_four_times_the_uniform_one():
    squares = torch.tensor([1e-9, 1.0, 1e6, 4.0], dtype=torch.float64)
    law = least_variance(torch.stack([squares, torch.ones(4, dtype=torch.float64)]))
    density = law.density
    assert float(density.mean()) == pytest.approx(1, rel=1e-12)
    assert density.tolist() == pytest.approx([FLOOR, FLOOR, 4 - 3 * FLOOR, FLOOR])
    m, n = torch.arange(1, 5), torch.tensor(4)
    assert (law.weight(m, n) * m / n <= 1 / FLOOR + 1e-12).all()


def test_parts_that_no_block_told_of_are_drawn_evenly():
    sums = torch.tensor([[4.0, 0, 36, 0], [1, 0, 4, 0]], dtype=torch.float64)
    assert least_variance(sums).density.tolist() == pytest.approx([0.8, 1, 1.2, 1])
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    assert least_variance(nothing).density.tolist() == [1, 1, 1, 1]


def test_a_law_of_many_counts_is_learnt_in_parts():
    """1024 counts of a block of mdlm; a loss that is twice as large above half of them."""
    size = 1024
    second = SecondMoments(len(to_learn(size).density), torch.device("cpu"))
    m = torch.arange(1, size + 1)[:, None]
    loss = torch.where(m > size // 2, 2.0, 1.0)
    second.add(loss, m, torch.full_like(m, size))
    second.add(loss[:1], m[:1], torch.zeros(1, 1, dtype=torch.int64))  # padding tells of nothing
    density = least_variance(second.sums).density
    assert len(density) == PARTS
    assert density.tolist() == pytest.approx([2 / 3] * 16 + [4 / 3] * 16)


# ---- the search for a range


def test_the_ranges_are_those_whose_shares_lie_in_the_intervals():
    assert count_candidates(4, [0.5], 0.25) == [(1, 4), (1, 2), (1, 3), (2, 4)]
    assert count_candidates(16, [0.5], 0.05)[:4] == [(1, 16), (1, 8), (2, 9), (3, 10)]
    assert (5, 12) in count_candidates(16, [0.5], 0.05)
    assert count_candidates(4, [], 0.05) == [(1, 4)]
    assert count_candidates(1, [0.5], 0.05) == [(1, 1)]
    assert count_candidates(4, [0.1], 0.05)[-1] == (4, 4)  # intervals without a share are left out
    assert name_of_counts((2, 3)) == "valid_var_counts_2 - 3"


def test_the_variance_of_a_range_is_that_of_its_draws():
    """From the toy's sets, each count equally often, against the moments of the range itself."""
    laws = [within(*counts, 4) for counts in count_candidates(4, [0.5], 0.25)] + [SKEWED]
    nats = [x for x in toy_losses() for _ in range(12 // math.comb(4, x[0]))]
    m, sums = torch.tensor(nats, dtype=torch.float64).T
    found = law_variances(laws, sums / 4, m, torch.full_like(m, 4))
    expected = [(second - first**2) / 16 for first, second in map(moments, laws)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    padded = law_variances(
        laws, torch.cat([sums / 4, torch.tensor([math.nan])]), torch.cat([m, m[:1] * 0]),
        torch.full((len(m) + 1,), 4.0),
    )  # fmt: skip
    torch.testing.assert_close(padded, found)
