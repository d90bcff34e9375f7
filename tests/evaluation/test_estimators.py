"""Likelihoods against the recorded toy, against each other, and against enumeration."""

import copy
import functools
import itertools
import math

import pytest
import torch
from conftest import load_json
from networks import chi_square_p, texts_of, toy, toy_log_probs
from sampling_tools import denoiser, write

from evaluation import estimators
from evaluation.estimators import AskedTexts, Chance
from evaluation.network import asker
from models.attention import get_backend
from models.dit import DiT
from models.masks import BlockDiffusion
from noise_schedule import LogLinear
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import draw_noise
from samplers.request import TextRequest
from samplers.steps import STEPS

TOY = load_json("likelihood/toy.json")
DETERMINISTIC = {
    "nelbo": estimators.exact,
    "first_hitting": estimators.first_hitting,
    "left_to_right": estimators.left_to_right,
    "greedy": estimators.greedy,
    "margin": estimators.margin,
    "threshold_06": functools.partial(estimators.threshold, number=0.6),
    "threshold_08": functools.partial(estimators.threshold, number=0.8),
}
LAWS = [name for name in DETERMINISTIC if name != "nelbo"]
NEVER_RECORDED = {
    f"entropy_bounded_{bound}": functools.partial(estimators.entropy_bounded, number=bound)
    for bound in (0.0, 0.6, 1.2)
}


def every_text(vocabulary, size):
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=size)))


@pytest.mark.parametrize("case", TOY, ids=lambda c: f"V{c['V']}S{c['S']}")
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_toy_has_the_recorded_likelihoods(case, name):
    texts = texts_of([case["x"]], case["V"])
    found = DETERMINISTIC[name](toy(case["V"]), texts)
    assert float(found.sum()) == pytest.approx(case[name], abs=1e-10)


@pytest.mark.parametrize("case", TOY, ids=lambda c: f"V{c['V']}S{c['S']}")
def test_the_mean_over_pairs_of_orders_is_the_recorded_one(case):
    """iw:2 over all pairs of orders, each given through the random keys."""
    orders = torch.tensor(list(itertools.permutations(range(case["S"]))), dtype=torch.float64)
    pairs = torch.cartesian_prod(*[torch.arange(len(orders))] * 2)

    class Given:
        @staticmethod
        def tokens(like, stream):
            return orders[pairs[:, stream - 1]]

    texts = texts_of(torch.tensor([case["x"]]).expand(len(pairs), -1), case["V"])
    found = estimators.importance(toy(case["V"]), texts, Given, 2).sum(1)
    assert float(found.mean()) == pytest.approx(case["iw2_mean"], abs=1e-10)


@pytest.mark.parametrize(("vocabulary", "size"), [(2, 2), (2, 3), (2, 4), (3, 3)])
@pytest.mark.parametrize("name", [*LAWS, *NEVER_RECORDED])
def test_a_law_sums_to_one_over_all_texts(vocabulary, size, name):
    texts = texts_of(every_text(vocabulary, size), vocabulary)
    law = (DETERMINISTIC | NEVER_RECORDED)[name]
    nll = law(toy(vocabulary), texts).sum(1)
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("size", "total"), [(2, 0.946649), (3, 0.870589), (4, 0.772677)])
def test_the_bound_sums_to_the_recorded_share(size, total):
    texts = texts_of(every_text(2, size), 2)
    nll = estimators.exact(toy(2), texts).sum(1)
    assert float((-nll).exp().sum()) == pytest.approx(total, abs=1e-6)


def test_the_bound_is_the_mean_over_all_orders():
    texts = texts_of([[0, 1, 1, 0]], 2)
    total = 0.0
    for order in itertools.permutations(range(4)):
        masked = torch.ones(1, 4, dtype=torch.bool)
        for place in order:
            about = torch.arange(4)[None] == place
            total += float(texts.surprisal(toy(2), masked, about).sum()) / 24
            masked = masked & ~about
    assert float(estimators.exact(toy(2), texts).sum()) == pytest.approx(total, abs=1e-12)


def repeated(x, vocabulary, times):
    return texts_of(torch.tensor([x]).expand(times, -1), vocabulary)


def draws(estimate, x, times, **kwargs):
    """The values of independent draws (no strata between them) of one text, [times]."""
    texts = repeated(x, 2, times)
    return estimate(toy(2), texts, Chance(1, torch.arange(times), times), **kwargs).sum(1)


def test_one_draw_by_counts_has_a_seventh_of_the_variance_of_one_by_time():
    """5.55 by a time on (.001, 1) and .717 by counts (likelihoods.md, same x)."""
    by_time = draws(estimators.nelbo, [0, 1, 1, 0], 100_000)
    by_count = draws(estimators.counts, [0, 1, 1, 0], 100_000)
    for found in (by_time, by_count):
        error = float(found.std()) / len(found) ** 0.5
        assert float(found.mean()) == pytest.approx(2.158915787306027, abs=4 * error)
    assert float(by_count.var()) == pytest.approx(0.717, rel=0.02)
    # weights reach 1000: the sample variance itself is uncertain
    assert float(by_time.var()) == pytest.approx(5.55, rel=0.25)


def test_more_orders_come_closer_to_the_law_from_above():
    found = [
        float(draws(estimators.importance, [0, 1, 1, 0], 2000, number=number).mean())
        for number in (1, 2, 8, 40)
    ]
    law = float(estimators.first_hitting(toy(2), texts_of([[0, 1, 1, 0]], 2)).sum())
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(2.1589, abs=0.05)
    assert found[-1] == pytest.approx(law, abs=0.015)


def test_every_number_of_masked_tokens_comes_equally_often():
    """In every text, and over the evaluation whatever its batches are."""
    x0 = torch.zeros(6, 8, dtype=torch.int64)
    masked, weight = estimators.drawn_counts(
        texts_of(x0, 2, block_size=2), Chance(3, torch.arange(6), 6)
    )
    number = masked.unflatten(1, (4, 2)).sum(-1)
    assert (number.sort(1).values == torch.tensor([1, 1, 2, 2])).all()
    assert torch.equal(weight.unflatten(1, (4, 2))[..., 0], 2 / number)
    x0 = torch.zeros(12, 4, dtype=torch.int64)  # one block a text
    found = [
        estimators.drawn_counts(texts_of(x0[rows], 2), Chance(3, rows, 12))[0].sum(1)
        for rows in torch.arange(12).split(5)
    ]
    assert torch.cat(found).bincount().tolist() == [0, 3, 3, 3, 3]


def test_tokens_that_are_not_scored_are_seen():
    """A prompt, a first token: the law is that of the tokens behind them, which sums to one."""
    x0 = every_text(2, 4)
    x0 = x0[x0[:, 0] == 1]
    scored = torch.ones_like(x0, dtype=torch.bool)
    scored[:, 0] = False
    for name in LAWS:
        nll = DETERMINISTIC[name](toy(2), AskedTexts(x0, scored, 4, 2))
        assert (nll[:, 0] == 0).all()
        assert float((-nll.sum(1)).exp().sum()) == pytest.approx(1, abs=1e-12)
    bound = estimators.exact(toy(2), AskedTexts(x0, scored, 4, 2)).sum(1)
    many = AskedTexts(x0.repeat(5000, 1), scored.repeat(5000, 1), 4, 2)
    found = estimators.counts(toy(2), many, Chance(1, torch.arange(40_000), 40_000)).sum(1)
    torch.testing.assert_close(found.view(5000, 8).mean(0), bound, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["counts", "importance", *DETERMINISTIC])
def test_a_block_of_one_has_one_likelihood(name):
    texts = texts_of([[0], [1]], 2)
    chance = Chance(1, torch.arange(2), 2)
    if name == "importance":
        found = estimators.importance(toy(2), texts, chance, 3)
    elif name == "counts":
        found = estimators.counts(toy(2), texts, chance)
    else:
        found = DETERMINISTIC[name](toy(2), texts)
    torch.testing.assert_close(found, -toy_log_probs(torch.full((1, 1), 2), 2)[0].mT)


# ---- the step rules of the samplers


class Rule:
    """The settings that a step rule reads."""

    def __init__(self, k=1, confidence="probability", threshold=0.9, entropy_bound=0.0):
        self.k, self.confidence, self.order_temperature = k, confidence, 0.0
        self.threshold, self.entropy_bound = threshold, entropy_bound


STEP_RULES = {
    "greedy": (estimators.greedy, "confidence", Rule()),
    "greedy:2": (functools.partial(estimators.greedy, number=2), "confidence", Rule(k=2)),
    "margin": (estimators.margin, "confidence", Rule(confidence="margin")),
    "entropy_bounded:0": (
        functools.partial(estimators.entropy_bounded, number=0.0),
        "entropy_bounded",
        Rule(),
    ),
    "entropy_bounded:.8": (
        functools.partial(estimators.entropy_bounded, number=0.8),
        "entropy_bounded",
        Rule(entropy_bound=0.8),
    ),
    "threshold:.5": (
        functools.partial(estimators.threshold, number=0.5),
        "threshold",
        Rule(threshold=0.5),
    ),
    "threshold:1": (
        functools.partial(estimators.threshold, number=1),
        "threshold",
        Rule(threshold=1),
    ),
}


@pytest.mark.parametrize("name", STEP_RULES)
def test_the_path_is_that_of_the_samplers_step_rule(name):
    """The rule of samplers/steps.py chooses on the same canvas; what it reveals is the text's."""
    estimate, rule, settings = STEP_RULES[name]
    x0 = every_text(3, 4)
    masked, total = torch.ones_like(x0, dtype=torch.bool), torch.zeros(len(x0)).double()
    while masked.any():
        log_probs = toy_log_probs(torch.where(masked, 3, x0), 3)
        now = STEPS[rule].choose(log_probs.float(), masked, settings, None) & masked
        total -= (log_probs.gather(-1, x0[..., None])[..., 0] * now).sum(1)
        masked &= ~now
    torch.testing.assert_close(estimate(toy(3), texts_of(x0, 3)).sum(1), total)


def test_of_equal_scores_the_lowest_place_is_revealed():
    def ask(x_t, read, reduce):
        seen = (x_t != 2).sum(1, keepdim=True).expand_as(x_t).flatten()[read]
        uneven = torch.stack(
            [1.0 + seen, torch.ones(len(read))], -1
        )  # depends on how many are seen
        return reduce(uneven.log_softmax(-1), read)

    texts = texts_of([[1, 1, 1, 1]], 2)
    expected = estimators.left_to_right(ask, texts)
    for rule in (estimators.greedy, estimators.margin):
        torch.testing.assert_close(rule(ask, texts), expected)


def test_rules_have_numbers_of_their_own():
    """Both places pass a threshold of 0.9 at once, and no entropy above 0."""

    def ask(x_t, read, reduce):
        none_seen = (x_t == 2).all(1, keepdim=True).expand_as(x_t).flatten()[read]
        p = torch.where(none_seen, 0.95, 0.6).double()
        return reduce(torch.stack([1 - p, p, torch.zeros_like(p)], -1).log(), read)

    texts = texts_of([[1, 1]], 2)
    together, apart = -2 * math.log(0.95), -math.log(0.95 * 0.6)
    assert float(estimators.threshold(ask, texts).sum()) == pytest.approx(together)
    assert float(estimators.entropy_bounded(ask, texts).sum()) == pytest.approx(apart)


def test_a_rule_that_reveals_nothing_is_refused():
    def stuck(scores, masked):
        return torch.zeros_like(masked)

    texts = texts_of([[0, 1, 1]], 2)
    with pytest.raises(ValueError, match="the rule reveals none of 3 masked places"):
        estimators.walk(toy(2), texts, estimators.by_probability, stuck)


# ---- a network: enumeration of all texts, and the samplers' own frequencies


V, S, L = 5, 3, 6


@functools.cache
def trained():
    """A network of blocks of three that has learned a little of texts of six tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "cond_dim": 8, "n_blocks": 2, "n_heads": 2}
    net = DiT(vocab_size=V + 1, dropout=0.0, **sizes)
    objective = MaskedDiffusion(V, S, LogLinear(), ignore_bos=False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(80):
        x0 = torch.randint(V - 2, (32, 1)) + torch.tensor([[0, 1, 2, 1, 0, 2]])
        x0 = torch.where(torch.rand(x0.shape) < 0.15, torch.randint(V, x0.shape), x0)
        noise = draw_noise(
            1, step, torch.arange(32), global_batch=32, length=L, block_size=S, antithetic=True
        )
        loss = objective.loss(
            net, x0, torch.ones_like(x0), noise, interval=(0.3, 1.0), training=True
        )
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def whole_text_ask(net, x0):
    """[x_t ; x0] from scratch for every question."""

    def ask(x_t, read, reduce):
        hidden = net.hidden(torch.cat([x_t, x0], 1), attention_mask=BlockDiffusion(S))
        logits = net.logits(hidden).flatten(0, 1)[read][:, :V]
        return reduce(logits.log_softmax(-1), read)

    return ask


def blocks_of_all_texts():
    """All 125 second blocks behind one first block."""
    second = every_text(V, S)
    return torch.cat([torch.tensor([[1, 2, 3]]).expand(len(second), -1), second], 1)


@pytest.mark.parametrize("name", ["counts", "importance", *DETERMINISTIC])
def test_the_clean_half_is_made_once_and_gives_what_the_whole_gives(name):
    net, x0 = trained(), blocks_of_all_texts()
    texts = AskedTexts(x0, torch.ones_like(x0, dtype=torch.bool), S, V)
    chance = Chance(1, torch.arange(len(x0)), len(x0))
    estimate = {
        "counts": functools.partial(estimators.counts, chance=chance),
        "importance": functools.partial(estimators.importance, chance=chance, number=2),
    }.get(name) or DETERMINISTIC[name]
    found = estimate(asker(net, x0, block_size=S, mask_id=V), texts)
    torch.testing.assert_close(
        found, estimate(whole_text_ask(net, x0), texts), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", LAWS)
def test_a_trained_networks_law_sums_to_one_over_all_texts_of_a_block(name):
    x0 = blocks_of_all_texts()
    scored = (torch.arange(L) >= S).expand_as(x0)
    ask = asker(trained(), x0, block_size=S, mask_id=V)
    nll = DETERMINISTIC[name](ask, AskedTexts(x0, scored, S, V)).sum(1)
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(nll.min()) < 2 * math.log(V), "nothing was learned"


def test_a_trained_networks_bounds_and_law_follow_from_all_orders():
    """Of all texts of a block: exact is the mean of -log p(x | order), first_hitting -log of the
    mean of p(x | order), iw:2 over all pairs of orders lies between, draws of counts have the mean
    exact."""
    net, x0 = trained(), blocks_of_all_texts()
    scored = (torch.arange(L) >= S).expand_as(x0)
    texts, ask = AskedTexts(x0, scored, S, V), asker(net, x0, block_size=S, mask_id=V)
    by_order = []
    for order in itertools.permutations(range(S, L)):
        masked, total = scored.clone(), 0.0
        for place in order:
            about = (torch.arange(L) == place).expand_as(x0)
            total = total + texts.surprisal(ask, masked, about).sum(1)
            masked = masked & ~about
        by_order.append(total)
    by_order = torch.stack(by_order)  # [6, 125]
    exact = estimators.exact(ask, texts).sum(1)
    law = estimators.first_hitting(ask, texts).sum(1)
    log_mean = math.log(len(by_order)) - (-by_order).logsumexp(0)
    torch.testing.assert_close(exact, by_order.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(law, log_mean, rtol=1e-6, atol=1e-6)
    pairs = -torch.logaddexp(-by_order[:, None], -by_order[None]) + math.log(2)
    assert (law < pairs.mean((0, 1))).all()
    assert (pairs.mean((0, 1)) < exact).all()
    number = 100
    rows = torch.arange(number * len(x0))
    again = x0.repeat(number, 1), scored.repeat(number, 1)
    ask = asker(net, again[0], block_size=S, mask_id=V)
    found = estimators.counts(ask, AskedTexts(*again, S, V), Chance(1, rows, len(rows))).sum(1)
    found = found.view(number, -1)
    gap = (found.mean(0) - exact) / (found.std(0) / number**0.5)
    assert float(gap.abs().max()) < 4.5  # of 125 texts
    assert abs(float(found.mean() - exact.mean())) < 3 * float(found.mean(1).std()) / number**0.5


def test_flex_attention_gives_the_same():
    net, x0 = trained(), blocks_of_all_texts()[:6]
    flex = copy.copy(net)
    flex.prepare_attention = get_backend("flex")
    texts = AskedTexts(x0, torch.ones_like(x0, dtype=torch.bool), S, V)
    found = [estimators.exact(asker(n, x0, block_size=S, mask_id=V), texts) for n in (flex, net)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_documents_of_one_row_are_texts_of_their_own():
    net, x0 = trained(), blocks_of_all_texts()[7:12]
    two = torch.cat([x0, x0.flip(0)], 1)
    document_ids = torch.tensor([1] * L + [2] * L).expand_as(two)
    scored = torch.ones_like(two, dtype=torch.bool)
    ask = asker(net, two, block_size=S, mask_id=V, document_ids=document_ids)
    found = estimators.exact(ask, AskedTexts(two, scored, S, V))
    alone = estimators.exact(
        asker(net, x0, block_size=S, mask_id=V), AskedTexts(x0, scored[:, :L], S, V)
    )
    torch.testing.assert_close(found, torch.cat([alone, alone.flip(0)], 1), rtol=1e-5, atol=1e-6)


SAMPLED = {
    "first_hitting": (estimators.first_hitting, {}),
    "greedy": (estimators.greedy, {"steps": "confidence"}),
    "threshold": (
        functools.partial(estimators.threshold, number=0.3),
        {"steps": "threshold", "threshold": 0.3},
    ),
}


def test_at_temperature_0_the_sampler_walks_the_greedy_path():
    """Of all texts of a block it writes the one whose every token is the likeliest on that path."""
    net, x0 = trained(), blocks_of_all_texts()
    sizes = {"length": L, "block_size": S, "context_size": L}
    request = [TextRequest(0, tuple(x0[0, :S].tolist()))]
    for rule in ("confidence", "low_confidence"):
        (sample,) = write(
            "bamdlm", denoiser(net, "bamdlm", V, S), request, **sizes, steps=rule, temperature=0.0
        )
        scored = (torch.arange(L) >= S).expand_as(x0)
        ask = asker(net, x0, block_size=S, mask_id=V)
        path = estimators.greedy_path(ask, AskedTexts(x0, scored, S, V))
        (written,) = path.likeliest.all(1).nonzero()[:, 0]
        assert x0[written].tolist() == sample.tokens.tolist()


@pytest.mark.parametrize("name", SAMPLED)
def test_the_samplers_frequencies_are_those_of_the_law(name):
    """Texts of one block behind a given one, written by the project's own sampler."""
    estimate, params = SAMPLED[name]
    net, number, given = trained(), 5000, (1, 2, 3)
    requests = [TextRequest(row, given) for row in range(number)]
    sizes = {"length": L, "block_size": S, "context_size": L, "batch_size": 2000}
    samples = write("bamdlm", denoiser(net, "bamdlm", V, S), requests, **sizes, **params)
    cells = torch.tensor([25, 5, 1])
    found = torch.stack([s.tokens[S:] for s in samples]) @ cells
    x0 = blocks_of_all_texts()
    scored = (torch.arange(L) >= S).expand_as(x0)
    nll = estimate(asker(net, x0, block_size=S, mask_id=V), AskedTexts(x0, scored, S, V)).sum(1)
    counts, expected = found.bincount(minlength=V**S), (-nll).exp() * number
    rare = expected < 5  # together: chi-square wants some in each
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    assert 20 < len(counts) < V**S, "neither uniform nor certain"
    assert chi_square_p(counts, expected) > 1e-3
