"""What the samplers write has the law that theory says, enumerated over all texts.

Four tokens (one of them the mask), four positions. Each comparison is a chi-square test at a fixed
seed that a right sampler fails with chance 1e-4 (over all tests of this file: under 0.5 %).
"""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from networks import chi_square_p, small
from sampling_tools import Table, denoiser, write

from noise_schedule import total_noise
from samplers.analytic import LAST_TIME, reverse_chances
from samplers.draw import fold, row_keys
from samplers.params import Warp
from samplers.steps import CONFIDENCES, STEPS, remask_chances, times

MASK, LENGTH, ROWS = 3, 4, 1500
FALSE_ALARM = 1e-4
START = (0, MASK, MASK, MASK)
PLAIN = Warp()


def law_of_context(tokens, position):
    """Weights that depend on everything that is seen, and are far from even."""
    numbers = random.Random(f"{tokens}{position}")
    return [numbers.random() ** 2 + 0.1 for _ in range(4)]


def table(**kwargs):
    return Table(law_of_context, 4, MASK, **kwargs)


def chances(denoise, x, position, warp=PLAIN):
    """Probability of each token at `position` of the text x (what is visible of it)."""
    log_p = denoise(torch.tensor([x]), torch.tensor([[position]]))[0, 0]
    return warped_by_hand(log_p.double().exp().tolist(), warp)


def warped_by_hand(chances, warp):
    """Temperature, top-k and the nucleus of some chances, as they are told."""
    ranked = sorted(range(len(chances)), key=lambda v: -chances[v])
    if warp.temperature == 0:
        return [float(v == ranked[0]) for v in range(len(chances))]
    out = [c ** (1 / warp.temperature) for c in chances]
    for v in ranked[warp.top_k :] if warp.top_k else ():
        out[v] = 0.0
    out = [c / sum(out) for c in out]
    sums = itertools.accumulate(out[v] for v in ranked)
    for v, mass in list(zip(ranked, sums, strict=True))[1:]:
        if mass > warp.nucleus_p + 1e-9:
            out[v] = 0.0
    return [c / sum(out) for c in out]


def products(x, options):
    """The next texts and their chances, where position i becomes v with chance options[i][v]."""
    places = sorted(options)
    for values in itertools.product(*(options[i].items() for i in places)):
        new, chance = list(x), 1.0
        for place, (value, c) in zip(places, values, strict=True):
            new[place] = value
            chance *= c
        if chance > 0:
            yield tuple(new), chance


def step(law, options_of):
    out = Counter()
    for x, chance in law.items():
        for new, c in products(x, options_of(x)):
            out[new] += chance * c
    return out


def until_written(law, options_of):
    while any(MASK in x for x in law):
        law = step(law, options_of)
    return law


def assert_samples_follow(law, samples):
    assert abs(sum(law.values()) - 1) < 1e-6
    counts = Counter(tuple(sample.tokens.tolist()) for sample in samples)
    assert set(counts) <= set(law)
    texts = sorted(law)
    observed = torch.tensor([counts[x] for x in texts])
    expected = torch.tensor([law[x] * len(samples) for x in texts])
    rare = expected < 5  # too few for the chi-square law: taken together
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    some = expected > 0
    if some.sum() > 1:
        assert chi_square_p(observed[some], expected[some]) > FALSE_ALARM


def hidden_of(x, block):
    return [i for i in block if x[i] == MASK]


def blocks(size):
    return [range(s, s + size) for s in range(0, LENGTH, size)]


def one_at_a_time(denoise, block, warp=PLAIN):
    """First hitting: any hidden position, equally likely."""

    def mixture(law):
        out = Counter()
        for x, chance in law.items():
            hidden = hidden_of(x, block)
            if not hidden:
                out[x] += chance
            for i in hidden:
                for v, c in enumerate(chances(denoise, x[: block.stop], i, warp)):
                    if c > 0:
                        out[(*x[:i], v, *x[i + 1 :])] += chance / len(hidden) * c
        return out

    return mixture


def first_hitting_law(denoise, size, warp=PLAIN):
    law = Counter({START: 1.0})
    for block in blocks(size):
        for _ in block:
            law = one_at_a_time(denoise, block, warp)(law)
    return law


@pytest.mark.parametrize(  # every pair of values of two arguments
    ("size", "cached", "dtype", "warp"),
    [
        (1, False, "float32", Warp()),
        (1, True, "float64", Warp(nucleus_p=0.8)),
        (2, False, "float64", Warp(temperature=0.4, nucleus_p=0.8)),
        (2, True, "float32", Warp(temperature=1.6, top_k=2)),
        (4, False, "float64", Warp(top_k=2)),
        (4, True, "float32", Warp(temperature=2.5, nucleus_p=0.8)),
    ],
)
def test_first_hitting(size, cached, dtype, warp):
    denoise = table(block_size=size)
    samples = write(
        "bamdlm",
        denoise,
        ROWS,
        length=LENGTH,
        block_size=size,
        kv_cache=cached,
        context_size=4,
        batch_size=1000,
        dtype=dtype,
        **warp._asdict(),
    )
    assert_samples_follow(first_hitting_law(denoise, size, warp), samples)


def corrected_law(denoise, size, k):
    """First hitting; of each finished block the k tokens of least probability are filled again."""
    law = Counter({START: 1.0})
    for block in blocks(size):
        states = Counter({(x, ()): chance for x, chance in law.items()})  # with (chance, position)s
        for _ in block:
            after = Counter()
            for (x, drawn), chance in states.items():
                hidden = hidden_of(x, block)
                if not hidden:
                    after[x, drawn] += chance
                for i in hidden:
                    for v, c in enumerate(chances(denoise, x[: block.stop], i)):
                        if c > 0:
                            new = (*x[:i], v, *x[i + 1 :])
                            after[new, (*drawn, (c, i))] += chance / len(hidden) * c
            states = after
        law = Counter()
        for (x, drawn), chance in states.items():
            least = [i for _, i in sorted(drawn)[:k]]
            law[tuple(MASK if i in least else v for i, v in enumerate(x))] += chance
        for _ in block:
            law = one_at_a_time(denoise, block)(law)
    return law


@pytest.mark.parametrize(("size", "k", "cached"), [(2, 1, True), (2, 2, True), (4, 2, False)])
def test_a_corrector(size, k, cached):
    denoise = table(block_size=size)
    options = {"length": LENGTH, "block_size": size, "context_size": 4, "batch_size": 1000}
    samples = write("bamdlm", denoise, ROWS, kv_cache=cached, corrector=k, **options)
    law = corrected_law(denoise, size, k)
    assert_samples_follow(law, samples)
    first, others = min(k, size - 1), k * (LENGTH // size - 1)
    assert {s.nfe for s in samples} == {LENGTH - 1 + first + others}
    if k == size:  # the block is written twice, and the second time counts
        assert law == pytest.approx(first_hitting_law(denoise, size))


def stepwise_law(denoise, block, law, reveals, hides):
    """Per step each hidden token is revealed with chance reveals[i], each seen hidden again."""
    written = [i for i in block if START[i] == MASK]
    for reveal, hide in zip(reveals, hides, strict=True):

        def options(x, reveal=reveal, hide=hide):
            out = {}
            for i in written:
                if x[i] == MASK:
                    p = chances(denoise, x[: block.stop], i)
                    out[i] = {MASK: 1 - reveal} | {v: reveal * p[v] for v in range(MASK)}
                else:
                    out[i] = {x[i]: 1 - hide, MASK: hide}
            return out

        law = step(law, options)
    return law


class ThreeSteps:
    """p(1) is below 1: the first step starts from p(1), not from 1."""

    num_steps = 3

    @staticmethod
    def move_chance(t):
        return 0.8 * t**2


@pytest.mark.parametrize("cap", [None, 0.3])
@pytest.mark.parametrize("cached", [False, True])
def test_ancestral_and_remasking(cap, cached):
    denoise = table(block_size=2)
    samples = write(
        "bamdlm",
        denoise,
        ROWS,
        length=LENGTH,
        block_size=2,
        kv_cache=cached,
        context_size=4,
        batch_size=1000,
        steps="ancestral" if cap is None else "remask",
        num_steps=3,
        remask_eta=cap or 0.0,
        move_chance=ThreeSteps.move_chance,
    )
    p = times(ThreeSteps)
    pairs = [remask_chances(a, b, cap or 0.0) for a, b in itertools.pairwise(p)]
    reveals = [float(reveal) for reveal, _ in pairs[:-1]] + [1.0]
    hides = [float(hide) for _, hide in pairs[:-1]] + [0.0]
    if cap is None:
        assert reveals[:-1] == pytest.approx(
            [1 - float(b / a) for a, b in itertools.pairwise(p)][:-1]
        )
    law = Counter({START: 1.0})
    for block in blocks(2):
        law = stepwise_law(denoise, block, law, reveals, hides)
    assert_samples_follow(law, samples)


def test_a_token_is_hidden_after_a_step_as_often_as_the_schedule_says():
    """Given that it was hidden at the first time, whose p is 0.8."""
    n = 20_000
    position = torch.arange(n)
    row = torch.zeros_like(position)
    keys = fold(row_keys(1, [0], [1]), position)
    plan = STEPS["ancestral"].plan(keys, row, position, ThreeSteps)
    p = times(ThreeSteps)
    for step in range(2):
        hidden = (plan.evaluation > step).double().mean()
        assert hidden.item() == pytest.approx((p[step + 1] / p[0]).item(), abs=4 / n**0.5 / 2)


@pytest.mark.parametrize("cap", [None, 0.3])
def test_mdlm_with_steps(cap):
    denoise = table()
    samples = write(
        "mdlm",
        denoise,
        ROWS,
        length=LENGTH,
        window=LENGTH,
        batch_size=1000,
        steps="ancestral" if cap is None else "remask",
        num_steps=3,
        remask_eta=cap or 0.0,
        move_chance=ThreeSteps.move_chance,
    )
    p = times(ThreeSteps)
    pairs = [remask_chances(a, b, cap or 0.0) for a, b in itertools.pairwise(p)]
    law = stepwise_law(
        denoise,
        range(LENGTH),
        Counter({START: 1.0}),
        [float(reveal) for reveal, _ in pairs[:-1]] + [1.0],
        [float(hide) for _, hide in pairs[:-1]] + [0.0],
    )
    assert_samples_follow(law, samples)


def test_mdlm_windows_move_by_half_their_length():
    """Of a window of two tokens the second sees only the first, and what came before is final."""
    denoise = table()
    samples = write("mdlm", denoise, ROWS, length=LENGTH, window=2, batch_size=1000)
    law = Counter({START: 1.0})
    for i in range(1, LENGTH):
        law = step(law, lambda x, i=i: {i: dict(enumerate(chances(denoise, x[i - 1 : i + 1], 1)))})
    assert_samples_follow(law, samples)


def sharper(tokens, position):
    numbers = random.Random(f"6{tokens}{position}")
    return [numbers.random() ** 4 + 0.01 for _ in range(4)]


def write_whole(steps, warp=PLAIN, law=law_of_context, **options):
    """A table, and what mdlm writes with it in one window of LENGTH tokens."""
    denoise = Table(law, 4, MASK)
    options |= {"length": LENGTH, "window": LENGTH, "batch_size": 1000, **warp._asdict()}
    return denoise, write("mdlm", denoise, ROWS, steps=steps, **options)


@pytest.mark.parametrize("kind", list(CONFIDENCES))
@pytest.mark.parametrize("k", [1, 2])
def test_confidence(kind, k):
    denoise, samples = write_whole("confidence", confidence=kind, k=k)

    def options(x):
        p = {i: chances(denoise, x, i) for i in hidden_of(x, range(LENGTH))}
        best = sorted(p, key=lambda i: -confidence_by_hand(kind, p[i]))[:k]
        return {i: dict(enumerate(p[i])) for i in best}

    assert_samples_follow(until_written(Counter({START: 1.0}), options), samples)
    assert {s.nfe for s in samples} == {-(-3 // k)}


def confidence_by_hand(kind, chances):
    ranked = sorted(chances, reverse=True)
    return {
        "probability": ranked[0],
        "margin": ranked[0] - ranked[1],
        "entropy": sum(c * math.log(c) for c in chances if c > 0),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "k", "warmth"),
    [("probability", 1, 0.1), ("margin", 2, 0.2), ("entropy", 1, 1e9)],
)
def test_an_order_temperature_draws_positions_by_the_softmax_of_confidence(kind, k, warmth):
    """k of them without replacement: one after the other, by the chances of those that are left. At
    an endless temperature it is first hitting."""
    denoise, samples = write_whole("confidence", confidence=kind, k=k, order_temperature=warmth)

    def chosen(weights, most):
        """{positions: chance}"""
        if not most or not weights:
            return {frozenset(): 1.0}
        out = Counter()
        for i, weight in weights.items():
            others = {j: w for j, w in weights.items() if j != i}
            for rest, chance in chosen(others, most - 1).items():
                out[rest | {i}] += weight / sum(weights.values()) * chance
        return out

    law = Counter({START: 1.0})
    while any(MASK in x for x in law):
        after = Counter()
        for x, chance in law.items():
            p = {i: chances(denoise, x, i) for i in hidden_of(x, range(LENGTH))}
            weights = {i: math.exp(confidence_by_hand(kind, p[i]) / warmth) for i in p}
            for positions, c in chosen(weights, k).items():
                for new, d in products(x, {i: dict(enumerate(p[i])) for i in positions}):
                    after[new] += chance * c * d
        law = after
    assert_samples_follow(law, samples)
    if warmth == 1e9:
        assert law == pytest.approx(first_hitting_law(denoise, LENGTH))


@pytest.mark.parametrize(
    ("k", "warp"), [(1, Warp(temperature=0.5)), (2, Warp(temperature=2.0, top_k=2))]
)
def test_low_confidence_draws_all_and_keeps_the_k_most_probable_at_temperature_1(k, warp):
    denoise, samples = write_whole("low_confidence", warp, k=k)
    law = Counter({START: 1.0})
    while any(MASK in x for x in law):
        after = Counter()
        for x, chance in law.items():
            hidden = hidden_of(x, range(LENGTH))
            plain = {i: chances(denoise, x, i) for i in hidden}
            drawn = {i: dict(enumerate(chances(denoise, x, i, warp))) for i in hidden}
            for new, c in products(x, drawn):
                best = sorted(hidden, key=lambda i, new=new: -plain[i][new[i]])[:k]
                after[tuple(new[i] if i in best else x[i] for i in range(LENGTH))] += chance * c
        law = after
    assert_samples_follow(law, samples)
    assert {s.nfe for s in samples} == {-(-3 // k)}


def test_entropy_bounded():
    bound = 0.3
    denoise, samples = write_whole("entropy_bounded", law=sharper, entropy_bound=bound)

    def options(x):
        p = {i: chances(denoise, x, i) for i in hidden_of(x, range(LENGTH))}
        ranked = sorted(p, key=lambda i: -confidence_by_hand("entropy", p[i]))
        sums = [0.0, *itertools.accumulate(-confidence_by_hand("entropy", p[i]) for i in ranked)]
        return {i: dict(enumerate(p[i])) for i, s in zip(ranked, sums, strict=False) if s <= bound}

    assert_samples_follow(until_written(Counter({START: 1.0}), options), samples)
    assert {s.nfe for s in samples} == {2, 3}


def test_threshold():
    denoise = table(block_size=4)
    samples = write(
        "bamdlm",
        denoise,
        ROWS,
        length=LENGTH,
        block_size=4,
        context_size=4,
        kv_cache=True,
        batch_size=1000,
        steps="threshold",
        threshold=0.5,
    )

    def options(x):
        p = {i: chances(denoise, x, i) for i in hidden_of(x, range(LENGTH))}
        sure = [i for i in p if max(p[i]) >= 0.5] or sorted(p, key=lambda i: -max(p[i]))[:1]
        return {i: dict(enumerate(p[i])) for i in sure}

    assert_samples_follow(until_written(Counter({START: 1.0}), options), samples)
    assert {s.nfe for s in samples} <= {1, 2, 3}


@pytest.mark.parametrize(
    ("cached", "warp"), [(False, Warp(nucleus_p=0.9)), (True, Warp(temperature=0.5, top_k=2))]
)
def test_autoregressive(cached, warp):
    denoise = table(next_token=True, block_size=1)
    options = {"length": LENGTH, "batch_size": 1000, "kv_cache": cached, **warp._asdict()}
    samples = write("ar", denoise, ROWS, **options)
    law = Counter({START: 1.0})
    for i in range(1, LENGTH):
        law = step(law, lambda x, i=i: {i: dict(enumerate(chances(denoise, x[:i], i - 1, warp)))})
    assert_samples_follow(law, samples)


class ScoreTable:
    mask_id = MASK

    def __call__(self, tokens, sigma):
        out = [
            [[random.Random(f"{row}{i}{v}{s:.4f}").gauss(0, 1) for v in range(4)] for i in range(4)]
            for row, s in zip(tokens.tolist(), sigma.tolist(), strict=True)
        ]
        log_score = torch.tensor(out) - torch.expm1(sigma).log()[:, None, None] - 1
        return log_score.scatter(-1, tokens[..., None], 0.0)


def warped_but_for_the_mask(odds, warp):
    """Of the chances of a position, those of the tokens among each other are warped."""
    staying = odds[MASK] / sum(odds)
    tokens = [c / (sum(odds) - odds[MASK]) for c in odds[:MASK]]
    return [c * (1 - staying) for c in warped_by_hand(tokens, warp)] + [staying]


@pytest.mark.parametrize("warp", [Warp(), Warp(nucleus_p=0.8), Warp(temperature=0.5, top_k=2)])
def test_sedd(warp):
    score, steps, samples_wanted = ScoreTable(), 2, 1000
    options = {"length": LENGTH, "num_steps": steps, "batch_size": 1000, **warp._asdict()}
    samples = write("sedd", score, samples_wanted, **options)
    sigma = total_noise(torch.linspace(1, LAST_TIME, steps + 1, dtype=torch.float64)).tolist()
    law = Counter({START: 1.0})
    for i in range(steps + 1):
        last = i == steps
        change = sigma[i] if last else sigma[i] - sigma[i + 1]

        def options(x, i=i, last=last, change=change):
            tokens, level = torch.tensor([x]), torch.tensor([sigma[i]])
            odds = reverse_chances(score(tokens, level), tokens, torch.tensor([change]), MASK, last)
            odds = odds[0].double().clamp(min=0).tolist()
            hidden = hidden_of(x, range(LENGTH))
            return {j: dict(enumerate(warped_but_for_the_mask(odds[j], warp))) for j in hidden}

        law = step(law, options)
    assert_samples_follow(law, samples)


@pytest.mark.parametrize("cached", [False, True])
def test_the_law_holds_with_a_network(cached):
    network = small(4, seed=3)
    with torch.no_grad():
        network.output_layer.linear.weight *= 4  # far from even chances
        denoise = denoiser(network, "bamdlm", MASK, 2)
        samples = write(
            "bamdlm",
            denoise,
            ROWS,
            length=LENGTH,
            block_size=2,
            kv_cache=cached,
            context_size=4,
            batch_size=1000,
        )
        assert_samples_follow(first_hitting_law(denoise, 2), samples)


@pytest.mark.parametrize("cached", [False, True])
def test_the_law_of_ar_holds_with_a_network(cached):
    network = small(4, seed=4, adaln=False)
    with torch.no_grad():
        network.output_layer.linear.weight *= 4
        denoise = denoiser(network, "ar", MASK)
        samples = write(
            "ar", denoise, ROWS, length=LENGTH, kv_cache=cached, context_size=4, batch_size=1000
        )
        law = Counter({START: 1.0})
        for i in range(1, LENGTH):
            law = step(law, lambda x, i=i: {i: dict(enumerate(chances(denoise, x[:i], i - 1)))})
        assert_samples_follow(law, samples)
