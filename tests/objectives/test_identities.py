"""What must hold whatever the weights are: the losses against the theory, by enumeration.

Texts of four tokens over a vocabulary of three (and the mask), a network with random weights.
"""

import functools
import itertools
import math

import pytest
import torch
from networks import assert_within, loss_at, small, texts

from models.masks import BlockCausal, BlockDiffusion, Full
from noise_schedule import EPS, SCHEDULES, LogLinear, Power, get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import EXACT, Noise, draw_noise
from objectives.sedd import ScoreEntropy, score_entropy

WORDS, MASK, LENGTH = 3, 3, 4
TEXT = torch.tensor([[2, 0, 1, 1]])
FULL = (EPS, 1.0)


@pytest.fixture(scope="module")
def net():
    return small(vocab_size=WORDS + 1)


@pytest.fixture(scope="module")
def causal():
    return small(vocab_size=WORDS + 1, adaln=False)


def objective_with(block_size, schedule=None, **kwargs):
    schedule = schedule or LogLinear()
    return MaskedDiffusion(MASK, block_size, schedule, ignore_bos=False, **kwargs)


def log_p(net, visible, block_size):
    """log p(x0 | what is visible) of the last block of `visible` [1, n], by the sampling form:
    [K, words]."""
    logits = net.logits(net.hidden(visible, attention_mask=BlockCausal(block_size)))[
        0, -block_size:
    ]
    return logits[:, :WORDS].double().log_softmax(-1)


def masked_nll(net, text, block, mask, block_size):
    """Cross-entropy of the hidden tokens of a block, given its visible ones and the earlier
    blocks."""
    start = block * block_size
    mask = torch.tensor(mask)
    x0 = text[:, start : start + block_size]
    x_t = torch.where(mask, MASK, x0)
    found = log_p(net, torch.cat([text[:, :start], x_t], 1), block_size)
    return -float(found.gather(1, x0[0][:, None])[:, 0][mask].sum())


def masks(size):
    return itertools.product([False, True], repeat=size)


def enumerated_nelbo(net, text, block_size, lowest=0.0):
    """sum over masks of (integral over p of p^(m-1) (1-p)^(K-m)) * cross-entropy, nats per text.

    The integral runs from the least masking probability to 1; from 0 it is (m-1)! (K-m)! / K!.
    """
    total = 0.0
    for block in range(text.shape[1] // block_size):
        for mask in masks(block_size):
            m = sum(mask)
            if m:
                factor = incomplete_beta(m, block_size - m + 1, lowest)
                total += factor * masked_nll(net, text, block, mask, block_size)
    return total


def incomplete_beta(a, b, lowest):
    """Integral of p^(a-1) (1-p)^(b-1) from `lowest` to 1, for whole a and b."""
    terms = (math.comb(b - 1, j) * (-1) ** j * (1 - lowest ** (a + j)) / (a + j) for j in range(b))
    return sum(terms)


def gauss_legendre(count, lo=0.0, hi=1.0):
    """Nodes and weights on [lo, hi], from the eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, count, dtype=torch.float64)
    side = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return lo + (values + 1) / 2 * (hi - lo), vectors[0] ** 2 * (hi - lo)


def expected_loss(net, text, objective, nodes, weights, interval=FULL):
    """The expectation of `objective`'s nats per text: quadrature over t x all masks, one block at
    a time (blocks are noised independently and the loss is a sum over them)."""
    size = objective.block_size
    blocks = text.shape[1] // size
    rows, times, chances = [], [], []
    for mask in masks(size):
        row = text.clone().unflatten(1, (blocks, size))
        row = torch.where(torch.tensor(mask), MASK, row).flatten(1)  # the same mask in every block
        for t, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            p = float(objective.noise_level(torch.tensor(t, dtype=torch.float64), interval).p)
            rows.append(row)
            times.append(t)
            chances.append(weight * p ** sum(mask) * (1 - p) ** (size - sum(mask)))
    x_t = torch.cat(rows)
    t = torch.tensor(times)[:, None].expand(-1, blocks)
    x0 = text.expand(len(x_t), -1)
    with torch.no_grad():
        loss = loss_at(objective, net, x0, x_t, t, torch.ones(x0.shape), interval=interval)
    return float((loss.nll.double().sum(1) * torch.tensor(chances)).sum())


# ---- the bound


@pytest.mark.parametrize("block_size", [1, 2, 4])
@torch.no_grad()
def test_the_expected_loss_is_the_enumerated_bound(net, block_size):
    """t^(m-1) (1-t)^(K-m) is a polynomial, so four nodes on (0, 1) are exact."""
    found = expected_loss(net, TEXT, objective_with(block_size), *gauss_legendre(4), (0.0, 1.0))
    assert found == pytest.approx(enumerated_nelbo(net, TEXT, block_size), rel=1e-5)


@pytest.mark.parametrize("block_size", [2, 4])
@torch.no_grad()
def test_the_bound_is_the_average_over_orders_of_revealing(net, block_size):
    """The discrete reading: tokens of a block revealed one by one in a uniform random order."""
    total = 0.0
    for block in range(LENGTH // block_size):
        for order in itertools.permutations(range(block_size)):
            for step, token in enumerate(order):
                mask = [i not in order[:step] for i in range(block_size)]
                alone = masked_nll_of(net, block, mask, token, block_size)
                total += alone / math.factorial(block_size)
    assert total == pytest.approx(enumerated_nelbo(net, TEXT, block_size), rel=1e-6)


def masked_nll_of(net, block, mask, token, block_size):
    start = block * block_size
    x0 = TEXT[:, start : start + block_size]
    x_t = torch.where(torch.tensor(mask), MASK, x0)
    found = log_p(net, torch.cat([TEXT[:, :start], x_t], 1), block_size)
    return -float(found[token, x0[0, token]])


@pytest.mark.parametrize("name", SCHEDULES)
@torch.no_grad()
def test_every_schedule_has_the_same_bound_above_its_least_p(net, name):
    """Time is only a way to walk through p, so the bound depends on where p begins."""
    schedule = get_schedule(name)
    lowest = float(schedule(torch.zeros(1, dtype=torch.float64)).p)
    nodes, weights = gauss_legendre(60)
    if isinstance(schedule, Power):  # the integrand begins where p leaves its clamp
        start = EPS ** (1 / schedule.exponent)
        nodes, weights = gauss_legendre(60, start**0.25, 1.0)
    nodes, weights = nodes**4, 4 * nodes**3 * weights  # t = s^4 smooths the root at 0
    found = expected_loss(net, TEXT, objective_with(2, schedule), nodes, weights)
    assert found == pytest.approx(enumerated_nelbo(net, TEXT, 2, lowest), rel=2e-5)


@pytest.mark.parametrize("block_size", [2, 4])
@pytest.mark.parametrize("resample", [False, True])
@torch.no_grad()
def test_real_draws_estimate_the_bound_without_bias(net, block_size, resample):
    """Times, strata, masks and weights together, on the full interval. The mean of 60 batches lies
    within five standard errors of the expectation (false alarm below 1e-5)."""
    objective = objective_with(block_size, resample=resample)
    expected = expected_loss(net, TEXT, objective, *gauss_legendre(8, *FULL)) / (1 - EPS) / LENGTH
    batch, means = 256, []
    for step in range(60):
        noise = draw_noise(
            1,
            step,
            torch.arange(batch),
            global_batch=batch,
            length=LENGTH,
            block_size=block_size,
            antithetic=True,
        )
        x0 = TEXT.expand(batch, -1)
        loss = objective.loss(net, x0, torch.ones_like(x0), noise, interval=FULL, training=True)
        means.append(loss.mean)
    means = torch.stack(means).double()
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - expected) < 5 * error
    assert error < 0.02 * expected


@torch.no_grad()
def test_a_uniform_network_has_the_bound_log_3_per_token_for_every_block_size():
    uniform = small(vocab_size=WORDS + 1)
    uniform.output_layer.linear.weight.zero_()
    uniform.output_layer.linear.bias.zero_()
    for block_size in (1, 2, 4):
        bound = enumerated_nelbo(uniform, TEXT, block_size)
        assert bound == pytest.approx(LENGTH * math.log(WORDS))


# ---- one block: MDLM


def corrupted(seed=0, rows=5, length=12, block_size=12):
    x0 = texts(rows, length, WORDS, seed)
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(rows, length // block_size, generator=generator) * 0.9 + 0.1
    p = t.repeat_interleave(block_size, 1)
    return x0, torch.where(torch.rand(x0.shape, generator=generator) < p, MASK, x0), t


@torch.no_grad()
def test_with_one_block_the_clean_half_is_read_by_nobody(net):
    x0, x_t, _ = corrupted()
    both = net.hidden(torch.cat([x_t, x0], 1), attention_mask=BlockDiffusion(12))
    assert_within(both, net.hidden(x_t, attention_mask=Full()), 1e-5)


def test_one_block_gives_mdlms_loss_and_gradients(net):
    """MDLM by its own formula (arXiv:2406.07524): 1/t times the cross-entropy at hidden tokens of a
    network that sees the whole of x_t."""
    x0, x_t, t = corrupted()
    results = []
    loss = loss_at(objective_with(12), net, x0, x_t, t, torch.ones(x0.shape), interval=FULL)
    results.append((loss.mean, torch.autograd.grad(loss.mean, list(net.parameters()))))
    logits = net.logits(net.hidden(x_t, attention_mask=Full()))[..., :WORDS]
    nll = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    mean = ((x_t == MASK) * nll / t).mean()
    results.append((mean, torch.autograd.grad(mean, list(net.parameters()))))
    assert_within(results[0][0].detach(), results[1][0].detach(), 1e-5)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.parametrize("block_size", [1, 3, 4])
@torch.no_grad()
def test_the_training_loss_asks_what_the_sampler_asks(net, block_size):
    """All blocks in one pass over [x_t ; x0] cost what block after block costs."""
    x0, x_t, t = corrupted(block_size=block_size)
    objective = objective_with(block_size)
    loss = loss_at(objective, net, x0, x_t, t, torch.ones(x0.shape), interval=FULL)
    denoise = objective.denoiser(net)
    for block in range(12 // block_size):
        now = slice(block * block_size, (block + 1) * block_size)
        tokens = torch.cat([x0[:, : now.start], x_t[:, now]], 1)
        positions = torch.arange(now.start, now.stop).expand(len(x0), -1)
        found = -denoise(tokens, positions).gather(-1, x0[:, now, None])[..., 0]
        expected = (x_t[:, now] == MASK) * found / t[:, block, None]
        torch.testing.assert_close(loss.nll[:, now], expected, rtol=1e-4, atol=1e-5)


# ---- blocks of one: the chain rule


def exact_nats(net, x0):
    """The loss of blocks of one at the interval (1, 1), per text."""
    objective = objective_with(1)
    drawn = Noise(*(torch.rand(x0.shape) for _ in range(3)))
    loss = objective.loss(net, x0, torch.ones_like(x0), drawn, interval=EXACT, training=False)
    return loss.nll.double().sum(1)


@torch.no_grad()
def test_blocks_of_one_at_the_exact_interval_are_the_chain_rule(net):
    """Sum over i of -log p(x_i | x_<i), each conditional asked of the network by itself."""
    for text in texts(6, LENGTH, WORDS, seed=3)[:, None]:
        chain = sum(
            -float(
                log_p(net, torch.cat([text[:, :i], torch.tensor([[MASK]])], 1), 1)[0, text[0, i]]
            )
            for i in range(LENGTH)
        )
        assert float(exact_nats(net, text)) == pytest.approx(chain, rel=1e-5)


@torch.no_grad()
def test_blocks_of_one_are_a_normalised_distribution_over_texts(net):
    """The probabilities exp(-nats) of all 3^4 texts sum to one: the loss is a likelihood."""
    everything = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
    assert float((-exact_nats(net, everything)).exp().sum()) == pytest.approx(1, rel=1e-5)


@torch.no_grad()
def test_the_causal_network_is_a_normalised_distribution_given_its_first_token(causal):
    rest = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH - 1)))
    x0 = torch.cat([torch.full((len(rest), 1), 2), rest], 1)
    loss = Autoregressive(MASK).loss(causal, x0, torch.ones_like(x0), training=False)
    assert float((-loss.nll.double().sum(1)).exp().sum()) == pytest.approx(1, rel=1e-5)


@torch.no_grad()
def test_blocks_of_one_have_a_bound_that_is_exact(net):
    """With one token in a block the bound on the full interval equals the exact likelihood."""
    assert enumerated_nelbo(net, TEXT, 1) == pytest.approx(float(exact_nats(net, TEXT)), rel=1e-5)


# ---- score entropy


def kernel(log_score, target, expm1):
    """`score_entropy` takes logits, which it shifts into log-scores: shift them back first."""
    logits = log_score + (expm1.log() + math.log(log_score.shape[1] - 1))[:, None]
    return score_entropy(logits, target, False, expm1, mask_id=MASK)


EXPM1 = torch.tensor([0.01, 0.3, 1.0, 20.0, 999.0], dtype=torch.float64)


def test_score_entropy_is_zero_at_the_true_score():
    """Of a hidden token known to be x0: the ratio 1 / (e^sigma - 1) for x0 and 0 for the rest."""
    for x0 in range(WORDS):
        log_score = torch.full((len(EXPM1), WORDS + 1), -1e9, dtype=torch.float64)
        log_score[:, x0] = -EXPM1.log()
        nll = kernel(log_score, torch.full((len(EXPM1),), x0), EXPM1)
        torch.testing.assert_close(nll, torch.zeros_like(nll), rtol=0, atol=1e-9)


def test_score_entropy_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1, 5):
        log_score = torch.randn(5, WORDS + 1, generator=generator, dtype=torch.float64) * scale
        nll = kernel(log_score - EXPM1.log()[:, None], torch.tensor([0, 1, 2, 0, 1]), EXPM1)
        assert (nll >= 0).all()


def test_the_expected_score_entropy_is_least_at_the_marginal_ratios():
    """Over x0 ~ q the best score is ratio * q: there the expectation has no slope, and any step
    away costs."""
    q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)

    def expected(free, expm1):
        log_score = torch.cat([free, free.new_zeros(1)])[None].expand(WORDS, -1)
        nll = score_entropy_plain(log_score, torch.arange(WORDS), expm1.expand(WORDS))
        return (q * nll).sum()

    for expm1 in EXPM1:
        best = (q.log() - expm1.log()).requires_grad_()
        least = expected(best, expm1)
        (slope,) = torch.autograd.grad(least, best)
        assert slope.abs().max() < 1e-9 / expm1
        for seed in range(5):
            away = torch.randn(WORDS, generator=torch.Generator().manual_seed(seed)) * 0.1
            assert expected(best.detach() + away, expm1) > least


def score_entropy_plain(log_score, target, expm1):
    """The kernel with a graph: its own formula on log-scores (held together in test_objectives)."""
    ratio = 1 / expm1
    positive = log_score[:, :WORDS].exp().sum(-1)
    chosen = log_score.gather(1, target[:, None])[:, 0]
    assert torch.allclose(
        positive - ratio * chosen + ratio * (ratio.log() - 1),
        kernel(log_score.detach().clone(), target, expm1),
    )
    return positive - ratio * chosen + ratio * (ratio.log() - 1)


def test_a_normalised_score_gives_the_loss_of_masked_diffusion():
    """score = ratio * p(x0) turns score entropy into ratio * cross-entropy, and d sigma * ratio is
    the weight 1/t: SEDD and MDLM bound the same thing (arXiv:2406.07524, appendix)."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0.05, 0.99, 5, dtype=torch.float64)
    noise = LogLinear()(t)
    expm1 = torch.expm1(noise.sigma)
    logits = torch.randn(5, WORDS, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0, 1])
    log_p = logits.log_softmax(-1)
    log_score = torch.cat([log_p - expm1.log()[:, None], torch.zeros(5, 1)], 1)
    sedd = noise.weight * expm1 * kernel(log_score, target, expm1)
    mdlm = -log_p.gather(1, target[:, None])[:, 0] / t
    torch.testing.assert_close(sedd, mdlm)


def test_the_loss_of_sedd_is_its_formula_on_the_score_that_samplers_get(net):
    x0, x_t, t = corrupted()
    objective = ScoreEntropy(MASK, LogLinear(), ignore_bos=False)
    loss = loss_at(objective, net, x0, x_t, t, torch.ones(x0.shape))
    noise = LogLinear()(t)
    with torch.no_grad():
        log_score = objective.denoiser(net)(x_t, noise.sigma[:, 0])
    expm1 = torch.expm1(noise.sigma).expand_as(x0)
    dsigma = (noise.weight * torch.expm1(noise.sigma)).expand_as(x0)
    ratio = 1 / expm1
    positive = log_score[..., :WORDS].exp().sum(-1)
    negative = ratio * log_score.gather(-1, x0[..., None])[..., 0]
    nll = dsigma * (positive - negative + ratio * (ratio.log() - 1)) * (x_t == MASK)
    assert_within(loss.nll, nll, 1e-5)
    assert (loss.nll >= 0).all()


# ---- the same loss whatever the batch


@functools.cache
def example_losses(split):
    """Training losses of eight texts, taken together or in parts, by the noise of their rows."""
    net = small(vocab_size=WORDS + 1)
    x0, objective = texts(8, 12, WORDS), objective_with(4)
    found = []
    for rows in torch.arange(8).split(split):
        noise = draw_noise(3, 11, rows, global_batch=8, length=12, block_size=4, antithetic=True)
        with torch.no_grad():
            loss = objective.loss(
                net,
                x0[rows],
                torch.ones(len(rows), 12),
                noise,
                interval=FULL,
                training=True,
            )
        found.append(loss.nll)
    return torch.cat(found)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_texts_loss_does_not_depend_on_who_computes_it(split):
    torch.testing.assert_close(example_losses(split), example_losses(8), rtol=1e-4, atol=1e-5)
