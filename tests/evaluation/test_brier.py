"""BrierLM: unbiased for a law that is known, through the samplers themselves."""

import itertools
import math

import pytest
import torch
from networks import small
from sampling_tools import Table, denoiser

from evaluation.brier import TOKENS, brier_lm, closed_form, continuations, cut, estimates
from samplers.params import SamplingParams

PREFIX, TRUTH = (0, 1), (1, 2, 1, 1)
MASK = 3  # after the words 0, 1, 2


def law(tokens, position):
    """What stands before decides, and the position; of blocks also what is visible of them."""
    seen = [t for t in tokens[:position] if t != MASK][-1:]
    shift = seen[0] if seen else 0
    return [0.15 + 0.1 * shift, 0.55, 0.3 - 0.1 * shift, 1.0]


def exact(p) -> list[float]:
    """Brier-1 .. 4 of the law p over texts of four words."""
    found = []
    for n in range(1, TOKENS + 1):
        q = {}
        for text, chance in p.items():
            q[text[:n]] = q.get(text[:n], 0) + chance
        found.append(2 * q[TRUTH[:n]] - sum(x * x for x in q.values()))
    return found


def ar_law():
    p = {}
    for text in itertools.product(range(3), repeat=TOKENS):
        chance, tokens = 1.0, list(PREFIX)
        for token in text:
            weights = law(tokens, len(tokens))[:3]
            chance *= weights[token] / sum(weights)
            tokens.append(token)
        p[text] = chance
    return p


def test_ar_through_the_sampler_within_two_errors():
    """Of 120 seeds with 400 prefixes, the distances in errors had means within 0.17 of 0 and
    deviations of 0.96 to 1.03."""
    denoise = Table(law, 4, MASK, next_token=True)
    params = SamplingParams(length=8, bos_id=0, eos_id=0, batch_size=500)
    drawn = continuations("ar", denoise, [PREFIX] * 1500, params)
    assert drawn.shape == (2, 1500, TOKENS)
    found = brier_lm(estimates(drawn, torch.tensor([TRUTH] * 1500)))
    known = exact(ar_law())
    for n, value in enumerate(known, 1):
        figure = found.orders[n]
        assert abs(figure.value - value) < 2 * figure.error
        assert figure.error < 0.03


def test_more_draws_have_the_same_mean_and_a_smaller_error():
    p = torch.tensor([0.1, 0.7, 0.2])
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(p, 6 * 4000 * TOKENS, True, generator=generator)
    drawn = drawn.view(6, 4000, TOKENS)
    truth = torch.tensor([[1, 1, 1, 2]]).expand(4000, -1)
    known = [2 * q - float(p.square().sum()) ** n for n, q in enumerate((0.7, 0.49, 0.343), 1)]
    errors = []
    for draws in (2, 6):
        found = brier_lm(estimates(drawn[:draws], truth))
        for n, value in enumerate(known, 1):
            assert abs(found.orders[n].value - value) < 2.5 * found.orders[n].error
        errors.append(found.orders[1].error)
    assert errors[1] < errors[0] / 1.5
    # D = 2 is the published formula
    x1, x2, y = drawn[0, :, 0], drawn[1, :, 0], truth[:, 0]
    published = (x1 == y).double() + (x2 == y).double() - (x1 == x2).double()
    assert torch.equal(estimates(drawn[:2], truth)[:, 0], published)


def test_the_closed_form_is_what_draws_of_a_network_estimate():
    net = small(5, seed=3, adaln=False)
    denoise = denoiser(net, "ar", mask_id=4)
    prefixes = [(0, 1, 2), (0,), (0, 3, 3, 1, 2)]
    params = SamplingParams(length=16, bos_id=0, eos_id=0, batch_size=300)
    draws = 400
    drawn = continuations("ar", denoise, prefixes, params, draws=draws)
    for number, prefix in enumerate(prefixes):
        truth = torch.tensor([[2, 1, 1, 0]])
        with torch.no_grad():
            log_p = denoise(torch.tensor([prefix]), torch.tensor([[len(prefix) - 1]]))[0]
        known = float(closed_form(log_p, truth[:, 0]))
        pairs = drawn[:, number].view(2, draws // 2, TOKENS)
        found = estimates(pairs, truth.expand(draws // 2, -1))[:, 0]
        assert abs(float(found.mean()) - known) < 2.5 * float(found.std()) / math.sqrt(draws // 2)


@pytest.mark.parametrize(("writes", "size"), [("bamdlm", 4), ("mdlm", 1), ("sedd", 1)])
def test_every_algorithm_continues_a_prefix(writes, size):
    """A prefix may end inside a block."""
    net = small(7, seed=1)
    denoise = denoiser(net, writes, mask_id=6, block_size=size)
    params = SamplingParams(
        length=16, window=16, bos_id=0, eos_id=0, batch_size=4, block_size=size, num_steps=8
    )
    prefixes = [(0, 1, 2, 3, 4, 5), (0,), (0, 1, 2, 3), tuple(range(6)) * 2]
    drawn = continuations(writes, denoise, prefixes, params, draws=3)
    assert drawn.shape == (3, 4, TOKENS)
    assert ((drawn >= 0) & (drawn < 6)).all()
    assert len({tuple(x) for x in drawn[:, 0].tolist()}) > 1  # independent
    again = continuations(writes, denoise, prefixes[:2], params, draws=3)
    assert torch.equal(again, drawn[:, :2])


def test_the_error_is_that_of_drawing_again():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 200, 4, generator=generator, dtype=torch.float64)
    found = [brier_lm(0.2 + 0.1 * noise[i]).value for i in range(300)]
    values = torch.tensor([each.value for each in found])
    assert float(values.std()) == pytest.approx(found[0].error, rel=0.15)
    assert float(values.mean()) == pytest.approx(20, rel=0.01)
    nothing = brier_lm(torch.tensor([[0.5, 0.2, 0.1, 0.0]] * 3))
    assert math.isnan(nothing.value.value)
    assert nothing.orders[1].value == 0.5


def test_prefixes_begin_with_bos_and_leave_four_tokens():
    rows = [[0, 1, 2, 3, 4, 5, 6, 7], [5, 4, 3, 2, 1, 9, 9], [1, 2, 3]]
    prefixes, truth = cut(rows, bos_id=0, length=7)
    assert len(prefixes) == len(truth) == 2  # the third has no prefix but BOS... and three tokens
    for prefix, behind, row in zip(prefixes, truth.tolist(), rows, strict=False):
        whole = row if row[0] == 0 else [0, *row]
        assert prefix[0] == 0
        assert whole[len(prefix) : len(prefix) + TOKENS] == behind
        assert len(prefix) + TOKENS <= 7
    assert cut(rows, bos_id=0, length=7, seed=1)[0] == prefixes
    places = {len(cut([list(range(1, 60))], 0, 50, seed)[0][0]) for seed in range(300)}
    assert (min(places), max(places)) == (1, 46)
