"""The likelihood of a mixture over block sizes: its law, and what draws do to it."""

import itertools
import math

import pytest
import torch
from networks import small

from evaluation import estimators
from evaluation.estimators import AskedTexts
from evaluation.mixture import mixture
from evaluation.network import asker

V, LENGTH = 2, 4
WEIGHTS = {1: 0.25, 2: 0.45, 4: 0.3}
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))


def nll_at(size, estimate, texts=TEXTS):
    """[R, 1] of whole texts."""
    net = small(vocab_size=V + 1)
    scored = torch.ones_like(texts, dtype=torch.bool)
    with torch.no_grad():
        ask = asker(net, texts, block_size=size, mask_id=V)
        return estimate(ask, AskedTexts(texts, scored, size, V)).sum(1, keepdim=True)


@pytest.mark.parametrize("name", ["first_hitting", "greedy", "left_to_right"])
def test_the_law_of_a_mixture_sums_to_one_over_all_texts(name):
    nll = [nll_at(size, getattr(estimators, name)) for size in WEIGHTS]
    mixed = mixture(nll, list(WEIGHTS.values()))
    assert float((-mixed.nll).exp().sum()) == pytest.approx(1, abs=1e-6)  # float32 of the network
    by_hand = -sum(w * (-n).exp() for w, n in zip(WEIGHTS.values(), nll, strict=True)).log()
    torch.testing.assert_close(mixed.nll, by_hand[:, 0], rtol=1e-9, atol=0)
    torch.testing.assert_close(mixed.low, mixed.nll, rtol=1e-9, atol=0)
    chance = -nll[1][:, 0] + math.log(WEIGHTS[2]) + mixed.nll
    torch.testing.assert_close(mixed.share[:, 1].log(), chance)


def test_the_bound_at_each_size_gives_a_bound_of_the_mixture():
    law, bound = (
        mixture([nll_at(size, estimate) for size in WEIGHTS], list(WEIGHTS.values()))
        for estimate in (estimators.first_hitting, estimators.exact)
    )
    assert (bound.nll > law.nll).all()
    assert float((-bound.nll).exp().sum()) < 1


def test_texts_of_a_thousand_nats_do_not_underflow():
    nll = [torch.tensor([[4000.0]]).double(), torch.tensor([[4001.0]]).double()]
    expected = 4000 - math.log(0.5 + 0.5 * math.exp(-1))
    assert float(mixture(nll, [0.5, 0.5]).nll) == pytest.approx(expected, rel=1e-12)


def drawn_values(size, text):
    """(chance, nats) of every draw of `counts` of one text in blocks of `size`, block by block."""
    blocks = []
    for block in range(LENGTH // size):
        values = []
        for m in range(1, size + 1):
            for chosen in itertools.combinations(range(size), m):
                masked = torch.zeros(1, LENGTH, dtype=torch.bool)
                masked[0, [block * size + i for i in chosen]] = True
                nats = nll_at(size, lambda ask, q, masked=masked: q.surprisal(ask, masked), text)
                values.append((1 / size / math.comb(size, m), size / m * float(nats)))
        blocks.append(values)
    for parts in itertools.product(*blocks):
        yield math.prod(chance for chance, _ in parts), sum(nats for _, nats in parts)


def test_with_draws_the_expectations_lie_on_either_side_of_the_bound():
    """All pairs of draws of counts in blocks of two and of four, beside the exact blocks of one."""
    text = TEXTS[[6]]
    exact = [nll_at(size, estimators.exact, text) for size in WEIGHTS]
    weights = list(WEIGHTS.values())
    bound = float(mixture(exact, weights).nll)
    two, four = (torch.tensor(list(drawn_values(size, text))).double() for size in (2, 4))
    for values, mean in ((two, exact[1]), (four, exact[2])):
        assert float(values[:, 0].sum()) == pytest.approx(1)
        assert float(values.prod(1).sum()) == pytest.approx(float(mean), rel=1e-5)  # unbiased
    a, b, c, d = torch.meshgrid(
        *[torch.arange(len(x)) for x in (two, two, four, four)], indexing="ij"
    )
    chance = two[a, 0] * two[b, 0] * four[c, 0] * four[d, 0]
    nll = [torch.stack([x[i, 1].flatten(), x[j, 1].flatten()], 1) for x, i, j in
           ((two, a, b), (four, c, d))]  # fmt: skip
    mixed = mixture([exact[0].expand(len(nll[0]), 1), *nll], weights)
    low, high = (float((chance.flatten() * x).sum()) for x in (mixed.low, mixed.nll))
    assert low < bound - 1e-3
    assert high > bound + 1e-3
    spread = sum(float((v[:, 0] * (v[:, 1] - float(e)) ** 2).sum()) for v, e in
                 ((two, exact[1]), (four, exact[2])))  # fmt: skip
    assert high - low < spread  # they differ by what the draws vary


def test_more_draws_bring_both_sides_together():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 64, 2, generator=generator).double()
    exact = mixture([torch.zeros(1, 1).double(), torch.ones(1, 1).double()], [0.5, 0.5]).nll
    gaps = []
    for draws in (2, 8, 64):
        values = torch.tensor([0.0, 1.0]) + noise[:, :draws]
        found = mixture(list(values.unbind(-1)), [0.5, 0.5])
        low, high = float(found.low.mean() - exact), float(found.nll.mean() - exact)
        assert low < high
        gaps.append(high - low)
    assert gaps[0] > 4 * gaps[1] > 16 * gaps[2] > 0
