"""Texts belong to their rows, prompts stay, and a step asks for no more than it uses."""

import random
import re
from contextlib import contextmanager, nullcontext
from itertools import chain

import pytest
import torch
from networks import chi_square_p, small
from sampling_tools import Table, denoiser, write

from models.masks import BlockCausal
from samplers.analytic import one_round as write_analytically
from samplers.draw import draw, fold, gumbel, in_groups, row_keys, uniform
from samplers.nucleus import by_digits, by_search, by_sorting, nucleus
from samplers.params import SamplingParams, Warp
from samplers.request import TextRequest
from samplers.rounds import choose
from samplers.steps import (
    CHAIN,
    CONFIDENCES,
    STEPS,
    Adaptive,
    Planned,
    RevealPlan,
    remask_chances,
    times,
)
from samplers.stopping import ENTROPY_TOKENS, MOST_TRIES, find_stop
from samplers.texts import ActiveTexts
from samplers.warping import warped
from samplers.writing import generate

V, MASK = 30, 29
ALGOS = ["bamdlm", "mdlm", "ar", "sedd"]
MDLM = ("mdlm", False)  # with its cache, which it has not
SMALL = {"length": 24, "block_size": 4, "context_size": 12, "window": 12, "num_steps": 5}


def network(algo, **kwargs):
    net = small(V, seed=1, adaln=algo != "ar", **kwargs)
    with torch.no_grad():
        net.output_layer.linear.weight *= 2
    return denoiser(net, algo, MASK, SMALL["block_size"])


# random numbers


def test_the_hash_is_splitmix64():
    """The first numbers of the generator seeded with 0, as published."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    ours = fold(torch.tensor(0), torch.arange(4))
    assert [x % 2**64 for x in ours.tolist()] == outputs


@pytest.mark.parametrize("axis", ["rows", "tries", "positions", "lanes", "seeds"])
def test_numbers_are_uniform_and_unrelated_along_every_axis(axis):
    """20 000 numbers in 64 cells, and in 8 x 8 cells of neighbours; false alarm 1e-4 each."""
    n = 20_000
    numbers = torch.arange(n)
    if axis == "rows":
        u = uniform(row_keys(1, numbers.tolist(), [1] * n))
    elif axis == "tries":
        u = uniform(row_keys(1, [0] * n, numbers.tolist()))
    elif axis == "seeds":
        u = torch.stack([uniform(row_keys(seed, [0], [1]))[0] for seed in range(2000)])
    elif axis == "positions":
        u = uniform(fold(row_keys(1, [5], [1]), numbers))
    else:
        u = (-(-gumbel(row_keys(1, [5], [1]), n)[0]).exp()).exp()
    cells = torch.histc(u, 64, 0, 1)
    assert chi_square_p(cells, torch.full((64,), len(u) / 64)) > 1e-4
    pairs = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()
    pairs = torch.bincount(pairs[::2], minlength=64)
    assert chi_square_p(pairs, torch.full((64,), pairs.sum() / 64)) > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("vocabulary", [2, 5, 64])
def test_draws_follow_the_distribution(vocabulary, dtype):
    log_p = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    n = 20_000
    tokens = draw(log_p.expand(n, -1), fold(row_keys(3, [0], [1]), torch.arange(n)), dtype)
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert chi_square_p(counts, log_p.double().exp() * n) > 1e-4


def test_the_float32_draw_gives_every_token_its_chance_however_small():
    """Its only float32 arithmetic is the mass of a group: the chance of a token that follows from
    the masses is off by less than 1e-5 of itself, from 1 to 1e-30."""
    logits = torch.linspace(0, -70, 50_258)[torch.randperm(50_258)]
    log_p = logits.log_softmax(-1)
    padded, mass = in_groups(log_p)
    inside = padded.double().log_softmax(-1)
    implied = (mass / mass.sum()).log()[:, None] + inside
    implied = implied.flatten()[: len(log_p)]
    exact = log_p.double().log_softmax(-1)
    assert exact.min() < -69
    assert (implied - exact).abs().max() < 1e-5


def test_the_noise_reaches_where_float32_ends():
    """-log(-log u) in float32 is at most 16.6; steps of 2^-52 reach 36.7."""
    assert gumbel(row_keys(1, [0], [1]), 1 << 20).max() > 13
    assert -(-uniform(torch.tensor(-1)).log()).log() > 36
    u = uniform(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert ((u > 0) & (u < 1)).all()


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
def test_the_nucleus_keeps_at_most_p_and_always_the_first(p):
    log_p = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    kept = nucleus(log_p, p) > -torch.inf
    mass = (log_p.exp() * kept).sum(-1)
    first = log_p == log_p.amax(-1, keepdim=True)
    assert (kept | ~first).all()
    assert ((mass <= p) | (kept.sum(-1) == 1)).all()
    assert nucleus(log_p, 1.0) is log_p


@pytest.mark.parametrize("vocabulary", [4, 40, 5000])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
def test_the_nuclei_without_sorting_are_the_sorted_one(vocabulary, scale):
    generator = torch.Generator().manual_seed(2)
    log_p = (torch.randn(12, vocabulary, generator=generator) * scale).log_softmax(-1)
    for p in (0.01, 0.3, 0.75, 0.9, 0.99):
        kept = by_sorting(log_p.double(), p)
        assert torch.equal(by_digits(log_p, p), kept)
        assert torch.equal(by_search(log_p, p), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_keeps_k_tokens_and_of_equal_ones_the_smaller_ids(dtype):
    log_p = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.1, 0.1, 0.0]).to(dtype).log()
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4])):
        found = warped(log_p, Warp(top_k=k))
        assert (found > -torch.inf).nonzero()[:, 0].tolist() == kept
        even = (log_p[kept].exp() / log_p[kept].exp().sum()).log()
        torch.testing.assert_close(found[kept], even)


def test_a_warp_that_is_off_changes_no_bit():
    log_p = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    for k in (0, 40, 41):
        assert warped(log_p, Warp(temperature=1.0, top_k=k)) is log_p


@pytest.mark.parametrize("algo", ALGOS)
def test_towards_temperature_0_and_with_top_k_1_it_is_the_argmax(algo):
    """The network's chances are further apart than that; its noise would decide at 1."""
    denoise, params = network(algo), SMALL | {"batch_size": 2, "length": 16}
    coldest = texts(write(algo, denoise, 2, **params, temperature=0.0))
    for same in (Warp(temperature=1e-5), Warp(top_k=1)):
        assert coldest == texts(write(algo, denoise, 2, **params, **same._asdict()))
    assert coldest != texts(write(algo, denoise, 2, **params))


def test_temperatures_near_0_leave_the_likeliest_token():
    log_p = torch.randn(20, 40, generator=torch.Generator().manual_seed(4)).log_softmax(-1)
    for temperature in (1e-5, 1e-29, 1e-31, 1e-300, 0.0):
        found = warped(log_p, Warp(temperature=temperature))
        assert torch.equal(found.exp(), torch.zeros(20, 40).scatter(1, log_p.argmax(1)[:, None], 1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_at_temperature_0_the_smallest_of_equal_ids_is_drawn(dtype):
    even = Table(lambda tokens, position: [0, 1, 3, 3, 3, 0], 6, 5, block_size=4)
    for text in texts(write("bamdlm", even, 4, **SMALL, temperature=0.0, dtype=dtype)):
        assert text == [0] + [2] * (SMALL["length"] - 1)


# rows


def texts(samples):
    return [sample.tokens.tolist() for sample in samples]


@pytest.mark.parametrize(
    ("algo", "cached", "steps"),
    [
        *((*how, steps) for how in (("bamdlm", False), ("bamdlm", True), MDLM) for steps in STEPS),
        (*MDLM, "confidence in a drawn order"),
        ("bamdlm", True, "remask, corrected"),
        ("bamdlm", False, "entropy_bounded, corrected"),
    ],
)
def test_a_text_does_not_depend_on_the_batch_it_is_made_in(algo, cached, steps):
    numbers = {"k": 2, "threshold": 0.3, "entropy_bound": 3.5, "temperature": 0.9, "top_k": 20}
    params = (
        SMALL | numbers | {"length": 16, "kv_cache": cached, "steps": re.split("[ ,]", steps)[0]}
    )
    params["order_temperature"] = 0.1 if "drawn" in steps else 0.0
    params["corrector"] = 2 if "corrected" in steps else 0
    denoise = network(algo)
    runs = [write(algo, denoise, 5, batch_size=b, **params) for b in (2, 5)]  # the last is alone
    assert texts(runs[0]) == texts(runs[1])
    assert len({tuple(text) for text in texts(runs[0])}) == 5
    assert [s.nfe for s in runs[0]] == [s.nfe for s in runs[1]]


@pytest.mark.parametrize(("algo", "cached"), [("ar", False), ("ar", True), ("sedd", False)])
def test_nor_with_ar_and_sedd(algo, cached):
    params = SMALL | {"length": 16, "kv_cache": cached}
    denoise = network(algo)
    runs = [write(algo, denoise, 5, batch_size=b, **params) for b in (1, 2, 5)]
    assert texts(runs[0]) == texts(runs[1]) == texts(runs[2])
    assert len({tuple(text) for text in texts(runs[0])}) == 5


@pytest.mark.parametrize("algo", ["bamdlm", "mdlm", "ar"])
def test_the_network_answers_a_batch_as_it_answers_each_row_up_to_rounding(algo):
    denoise = network(algo)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (8, 12), generator=generator)
    read = torch.arange(12).expand(8, -1)
    with torch.no_grad():
        together = denoise(tokens, read)[..., :MASK]
        alone = torch.cat([denoise(row[None], read[:1]) for row in tokens])[..., :MASK]
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_the_seed_and_the_row_name_the_text():
    first = texts(write("bamdlm", network("bamdlm"), 3, seed=5, **SMALL))
    assert first == texts(write("bamdlm", network("bamdlm"), 3, seed=5, **SMALL))
    assert first != texts(write("bamdlm", network("bamdlm"), 3, seed=6, **SMALL))
    only = [TextRequest(2, (0,))]
    assert texts(write("bamdlm", network("bamdlm"), only, seed=5, **SMALL)) == first[2:]


def ragged(seed=0, longest=22):
    numbers = random.Random(seed)
    lengths = [1, 2, 4, 5, 9, 13, longest]
    return [
        TextRequest(row, (0, *(numbers.randrange(V - 1) for _ in range(n - 1))))
        for row, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("algo", "cached"), [*((algo, False) for algo in ALGOS), ("bamdlm", True), ("ar", True)]
)
def test_prompts_of_any_length_share_a_batch_and_never_change(algo, cached):
    params = SMALL | {"kv_cache": cached, "context_size": 24}
    requests, denoise = ragged(), network(algo)
    alone = write(algo, denoise, requests, batch_size=1, **params)
    for batch in (2, 7):
        together = write(algo, denoise, requests, batch_size=batch, **params)
        assert texts(together) == texts(alone)
    for sample, request in zip(alone, requests, strict=True):
        assert tuple(sample.tokens[: len(request.tokens)].tolist()) == request.tokens
        assert len(sample.tokens) == SMALL["length"]
        assert (sample.tokens != MASK).all()


@pytest.mark.parametrize(("algo", "corrector"), [("bamdlm", 0), ("bamdlm", 3), ("ar", 0)])
def test_with_a_cache_the_text_is_the_same(algo, corrector):
    params = SMALL | {"context_size": 24, "batch_size": 3, "corrector": corrector}
    plain = write(algo, network(algo), ragged(), **params)
    assert texts(plain) == texts(write(algo, network(algo), ragged(), kv_cache=True, **params))


@pytest.mark.parametrize("algo", ["bamdlm", "ar"])
def test_cached_rows_that_come_late_see_no_trace_of_others_past_the_window(algo):
    """Prompts longer than two blocks enter while others are far past the window of 12."""
    requests = [*ragged(longest=12), TextRequest(9, ragged(1)[5].tokens[:11])]
    params, denoise = SMALL | {"length": 28, "kv_cache": True}, network(algo)
    alone = texts(write(algo, denoise, requests, batch_size=1, **params))
    for batch in (2, 3):
        assert texts(write(algo, denoise, requests, batch_size=batch, **params)) == alone


class Recording:
    """A denoiser that keeps what it answered while all three rows were there."""

    def __init__(self, denoise):
        self.denoise, self.answers = denoise, []
        self.mask_id, self.block_size = denoise.mask_id, denoise.block_size
        self.new_cache = denoise.new_cache

    def __call__(self, tokens, read, cache=None):
        answer = self.denoise(tokens, read, cache)
        before = cache.committed.tolist()
        for b, positions in enumerate(read.tolist() if len(read) == 3 else []):
            self.answers.append((before[b], tokens[b].clone(), positions, answer[b]))
        return answer


@pytest.mark.parametrize("algo", ["bamdlm", "ar"])
def test_cached_answers_are_those_of_one_full_pass_over_40_blocks(algo):
    """Ragged prompts, a window of 3 blocks: what the cache answers is one pass over the whole text
    under the block-causal mask limited to the window, to 1e-5 of the scale."""
    block = 4 if algo == "bamdlm" else 1
    length, window = 40 * 4, 12
    denoise = Recording(network(algo))
    requests = [
        TextRequest(0, (0,)),
        TextRequest(1, tuple(range(7))),
        TextRequest(2, tuple(range(10))),
    ]
    samples = write(
        algo,
        denoise,
        requests,
        batch_size=3,
        length=length,
        block_size=block,
        context_size=window,
        kv_cache=True,
    )
    net, mask = denoise.denoise.backbone, BlockCausal(block, window)
    final = [s.tokens for s in samples]
    checked = 0
    for i, (committed, tokens, positions, answer) in enumerate(denoise.answers):
        text = torch.cat([final[i % 3][:committed], tokens])[None]
        if committed + positions[0] >= length or i % 7:
            continue  # a seventh of them
        with torch.inference_mode():
            hidden = net.hidden(text, attention_mask=mask)[:, committed + positions[0]]
            logits = net.logits(hidden).float()
            logits[:, MASK] = -torch.inf
        full, seen = logits.log_softmax(-1)[:, :MASK], answer[:, :MASK]
        assert (full - seen).abs().max() <= 1e-5 * full.abs().max()
        checked += 1
    assert checked > 60


class Counting:
    """A denoiser that writes down how it was asked."""

    def __init__(self, denoise):
        self.denoise, self.asked = denoise, []
        self.mask_id, self.block_size = denoise.mask_id, denoise.block_size
        self.new_cache = denoise.new_cache

    def __call__(self, tokens, read, cache=None):
        self.asked.append((tuple(tokens.shape), tuple(read.shape)))
        return self.denoise(tokens, read, cache)


def test_first_hitting_reads_one_position_and_commits_while_asking():
    counting = Counting(network("bamdlm"))
    samples = write("bamdlm", counting, 2, batch_size=2, kv_cache=True, **SMALL)
    block, blocks = SMALL["block_size"], SMALL["length"] // SMALL["block_size"]
    assert samples[0].nfe == len(counting.asked) == SMALL["length"] - 1  # no pass only to commit
    assert {read for _, read in counting.asked} == {(2, 1)}
    widths = [tokens[1] for tokens, _ in counting.asked]
    assert widths.count(2 * block) == blocks - 1
    assert widths.count(block) == len(widths) - blocks + 1


def test_ancestral_sampling_evaluates_only_what_changed():
    counting = Counting(network("bamdlm"))
    params = SMALL | {"steps": "ancestral", "num_steps": 1000}
    (sample,) = write("bamdlm", counting, 1, **params)
    assert sample.nfe == len(counting.asked) <= SMALL["length"] - 1
    few = SMALL | {"steps": "ancestral", "num_steps": 1}
    assert write("bamdlm", network("bamdlm"), 1, **few)[0].nfe == 6  # one per block


@pytest.mark.parametrize("algo", ["bamdlm", "mdlm"])
def test_a_threshold_of_one_and_k_of_one_are_the_sequential_case(algo):
    params = SMALL | {"batch_size": 3}
    one = write(algo, network(algo), 4, steps="confidence", k=1, **params)
    sure = write(algo, network(algo), 4, steps="threshold", threshold=1.0, **params)
    assert texts(one) == texts(sure)
    assert {s.nfe for s in one + sure} == {SMALL["length"] - 1}


def test_an_entropy_bound_of_0_reveals_one_in_a_step_and_an_endless_one_all():
    params, denoise = SMALL | {"batch_size": 2}, network("bamdlm")
    rule = params | {"steps": "entropy_bounded"}
    one = write("bamdlm", denoise, 2, **params, steps="confidence", confidence="entropy")
    bounded = write("bamdlm", denoise, 2, **rule, entropy_bound=0.0)
    assert texts(one) == texts(bounded)
    assert {s.nfe for s in bounded} == {SMALL["length"] - 1}
    every = write("bamdlm", denoise, 2, **params, steps="threshold", threshold=1e-9)
    bounded = write("bamdlm", denoise, 2, **rule, entropy_bound=float("inf"))
    assert texts(every) == texts(bounded)
    assert {s.nfe for s in bounded} == {SMALL["length"] // SMALL["block_size"]}


def test_what_is_certain_is_revealed_together_whatever_the_bound():
    table = Table(knows(GOOD_TEXT), V, MASK, block_size=4)
    (sample,) = write("bamdlm", table, 1, **SMALL, steps="entropy_bounded", entropy_bound=0.0)
    assert sample.nfe == SMALL["length"] // SMALL["block_size"]


def test_low_confidence_at_temperature_0_is_confidence_by_probability():
    params, denoise = SMALL | {"temperature": 0.0, "k": 2}, network("mdlm")
    cold = texts(write("mdlm", denoise, 1, **params, steps="low_confidence"))
    assert cold == texts(write("mdlm", denoise, 1, **params, steps="confidence"))


def test_an_order_temperature_towards_0_takes_the_surest():
    params, denoise = SMALL | {"batch_size": 2, "steps": "confidence", "k": 2}, network("bamdlm")
    first = texts(write("bamdlm", denoise, 2, **params))
    for little in (1e-9, 1e-200):
        assert first == texts(write("bamdlm", denoise, 2, **params, order_temperature=little))


class Late:
    """What a device counts arrives when it is waited for, or at the `after`-th look."""

    def __init__(self, numbers, after, waits):
        self.numbers, self.looks, self.waits = numbers, after, waits

    def query(self):
        self.looks -= 1
        return self.looks < 0

    def synchronize(self):
        self.waits.append(self.numbers)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2, 1000])
def test_counts_that_arrive_late_change_neither_text_nor_nfe(monkeypatch, after, cached):
    """As on a device that lags behind: passes that ask nothing may be added, one a block at most,
    and only what is older than the last evaluation is waited for."""
    params = SMALL | {
        "batch_size": 3,
        "steps": "threshold",
        "threshold": 0.15,
        "kv_cache": cached,
    }
    asked, waits = Counting(network("bamdlm")), []
    at_once = write("bamdlm", asked, 6, **params)
    needed = len(asked.asked)
    monkeypatch.setattr("samplers.sending.send", lambda n: (Late(n, after, waits), n))
    late = write("bamdlm", asked, 6, **params)
    assert texts(late) == texts(at_once)
    assert [s.nfe for s in late] == [s.nfe for s in at_once]
    rounds = 2 * SMALL["length"] // SMALL["block_size"]
    assert rounds < needed < 2 * (SMALL["length"] - 1)  # neither all at once nor one by one
    more = len(asked.asked) - 2 * needed
    assert 0 < more <= rounds if after > 0 else more == 0
    assert bool(waits) == (after > 1)


@pytest.mark.parametrize("steps", [name for name in STEPS if isinstance(STEPS[name], Adaptive)])
def test_places_that_are_drawn_for_and_not_revealed_change_no_text(steps, monkeypatch):
    """As on a device, where the host knows a bound of what is revealed alone."""
    counted = texts(write("bamdlm", network("bamdlm"), 3, **SMALL, steps=steps))

    def at_all_places(canvas, rule, most, tokens, cache, step, number):
        assert most is None
        return choose(canvas, rule, step.shape[-1], tokens, cache, step, number)

    monkeypatch.setattr("samplers.rounds.choose", at_all_places)
    assert texts(write("bamdlm", network("bamdlm"), 3, **SMALL, steps=steps)) == counted


@pytest.mark.parametrize("algo", ["bamdlm", "mdlm"])
def test_a_sequential_rule_that_does_not_read_k_reveals_one_in_a_step(algo, monkeypatch):
    def leftmost(log_probs, masked, params, chance):
        return masked & (masked.cumsum(-1) == 1)

    monkeypatch.setitem(STEPS, "leftmost", Adaptive(leftmost, sequential=True))
    for text in write(algo, network(algo), 4, **SMALL, steps="leftmost", k=3):
        assert MASK not in text.tokens.tolist()
        assert text.nfe == SMALL["length"] - 1


@pytest.mark.parametrize("after", [1, 2])
def test_an_adaptive_rule_that_reveals_nothing_is_refused(after, monkeypatch):
    """In one row of two, and where the numbers arrive late: else tokens stayed masked."""

    def all_of_the_first_row(log_probs, masked, params, chance):
        return masked & (torch.arange(len(masked))[:, None] == 0)

    monkeypatch.setattr("samplers.sending.send", lambda n: (Late(n, after, []), n))
    monkeypatch.setitem(STEPS, "first_row", Adaptive(all_of_the_first_row, sequential=False))
    with pytest.raises(ValueError, match="revealed no token of row 1 in evaluation 0"):
        write("bamdlm", network("bamdlm"), 2, **SMALL, batch_size=2, steps="first_row")


def test_a_low_threshold_reveals_a_block_at_once():
    samples = write("bamdlm", network("bamdlm"), 2, steps="threshold", threshold=1e-6, **SMALL)
    assert {s.nfe for s in samples} == {6}


GOOD_TEXT = [0, *(random.Random(7).randrange(V - 1) for _ in range(23))]


def knows(text):
    return lambda tokens, position: [float(v == text[position]) for v in range(V)]


@pytest.mark.parametrize("steps", list(STEPS))
@pytest.mark.parametrize("cached", [False, True])
def test_a_perfect_denoiser_returns_its_text(steps, cached):
    params = SMALL | {"steps": steps, "context_size": 24, "window": 24}
    table = Table(knows(GOOD_TEXT), V, MASK, block_size=4)
    assert texts(write("bamdlm", table, 2, kv_cache=cached, **params)) == [GOOD_TEXT] * 2
    if not cached:
        assert texts(write("mdlm", Table(knows(GOOD_TEXT), V, MASK), 1, **params)) == [GOOD_TEXT]


@pytest.mark.parametrize("cached", [False, True])
def test_a_perfect_next_token_denoiser_returns_its_text(cached):
    table = Table(knows(GOOD_TEXT), V, MASK, block_size=1, next_token=True)
    params = SMALL | {"kv_cache": cached, "context_size": 24}
    assert texts(write("ar", table, 2, **params)) == [GOOD_TEXT] * 2


@pytest.mark.parametrize("length", [4, 8, 28])
@pytest.mark.parametrize("algo", ["bamdlm", "mdlm", "ar"])
def test_any_length_is_written_exactly(algo, length):
    samples = write(algo, network(algo), 2, **SMALL | {"length": length})
    assert {len(s.tokens) for s in samples} == {length}
    assert {s.nfe for s in samples} == {length - 1}
    assert all((s.tokens != MASK).all() for s in samples)


@pytest.mark.parametrize("length", [13, 17, 23, 31])
def test_windows_write_lengths_that_no_stride_divides(length):
    (sample,) = write("mdlm", network("mdlm"), 1, **SMALL | {"length": length})
    assert len(sample.tokens) == length
    assert (sample.tokens != MASK).all()


# plans


REMASK = {"steps": "remask", "num_steps": 30, "remask_eta": 1.0, "bos_id": 0, "eos_id": 0}
PLANNED = [name for name, rule in STEPS.items() if isinstance(rule, Planned)]


@pytest.mark.parametrize("places", ["all", "even", "odd", "one"])
@pytest.mark.parametrize("steps", PLANNED)
def test_a_plan_has_no_gap_and_leaves_nothing_masked(steps, places):
    """Rows of other lengths, and one that has nothing masked."""
    width, step = 12, {"all": 1, "even": 2, "odd": 2, "one": 12}[places]
    spans = [range(base + (places == "odd"), base + width, step) for base in (0, 12, 13)]
    row = torch.tensor([r for r, span in zip((0, 2, 3), spans, strict=True) for _ in span])
    position = torch.tensor([place for span in spans for place in span])
    for seed in range(10):
        keys = fold(row_keys(seed, [0, 1, 2, 3], [1] * 4)[row], position)
        params = SamplingParams(**SMALL | REMASK | {"num_steps": 40})
        plan = STEPS[steps].plan(keys, row, position, params)
        plan.check_ends(row, 4)
        counts = plan.evaluations(4)
        for r, count in enumerate(counts):
            assert sorted({*plan.evaluation[plan.row == r].tolist()}) == [*range(count)]


def in_order(order):
    """A step rule that gives each position of a text the number `order` of an evaluation."""

    def plan(keys, row, position, params):
        kept = order[position] >= 0
        row, position = row[kept], position[kept]
        return RevealPlan(row, position, order[position], torch.zeros_like(row))

    return Planned(plan)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 1, 1], "an evaluation 1 of row 0, but no 0"),
        ([0, 0, 2, 2], "an evaluation 2 of row 0, but no 1"),
        ([0, 0, 0, -1], "reveals 2 tokens of row 0, of which 3 are masked"),
    ],
)
def test_a_plan_that_breaks_the_contract_is_refused(order, message, monkeypatch):
    """The first position is given: without the check an evaluation revealed nothing and counted,
    or a token stayed masked."""
    monkeypatch.setitem(STEPS, "in_order", in_order(torch.tensor(order * 6)))
    with pytest.raises(ValueError, match=message):
        write("bamdlm", network("bamdlm"), 2, **SMALL, steps="in_order")


# remasking


def remasked_step_by_step(keys, row, position, params):
    """The chain as it is told: a question in each step that reveals something of a row, about what
    was hidden before it. {row: [(revealed with counts, hidden again since the last one)]}."""
    p, waiting = times(params), {}
    found = {r: [] for r in row.tolist()}
    hidden, drawn = [True] * len(keys), [0] * len(keys)
    for i in range(params.num_steps):
        last = i == params.num_steps - 1
        reveal, again = (1, 0) if last else remask_chances(p[i], p[i + 1], params.remask_eta)
        u = uniform(fold(fold(keys, CHAIN), i)).tolist()
        shown = [j for j in range(len(keys)) if hidden[j] and u[j] < reveal]
        back = [j for j in range(len(keys)) if not hidden[j] and u[j] < again]
        for r in found:
            new = {(int(position[j]), drawn[j]) for j in shown if row[j] == r}
            if new:
                found[r].append((new, waiting.pop(r, set())))
        for j in shown:
            hidden[j], drawn[j] = False, drawn[j] + 1
        for j in back:
            hidden[j] = True
            waiting.setdefault(int(row[j]), set()).add(int(position[j]))
    assert not any(hidden)
    return found


def test_the_plan_of_remasking_is_its_chain():
    params = SamplingParams(**SMALL | REMASK)
    row = torch.tensor([0] * 4 + [2] * 7)
    position = torch.cat([torch.arange(8, 12), torch.arange(20, 27)])
    most = 0
    for seed in range(8):
        keys = fold(row_keys(seed, [0, 1, 2], [1] * 3)[row], position)
        plan = STEPS["remask"].plan(keys, row, position, params)
        wanted = remasked_step_by_step(keys, row, position, params)
        found = {r: [(set(), set()) for _ in events] for r, events in wanted.items()}
        for r, place, evaluation, drawn in zip(
            *(x.tolist() for x in (plan.row, plan.position, plan.evaluation, plan.drawn)),
            strict=True,
        ):
            found[r][evaluation][0].add((place, drawn))
            most = max(most, drawn)
        for r, place, evaluation in zip(*(x.tolist() for x in plan.again), strict=True):
            found[r][evaluation][1].add(place)
        assert found == wanted
        assert plan.evaluations(3) == [len(found[0]), 0, len(found[2])]
    assert most > 1


def test_what_is_hidden_again_is_asked_again_and_drawn_anew():
    """Under a uniform law: a second draw with the numbers of the first would give its token."""
    uniform_law = Table(lambda tokens, position: [1] * MASK + [0], V, MASK, block_size=4)
    frames, params = [], SamplingParams(**SMALL | REMASK)
    (sample,) = (
        s
        for group in generate(
            "bamdlm", uniform_law, [TextRequest(0, (0,))], params, watch=frames.append
        )
        for s in group
    )
    assert (sample.tokens != MASK).all()
    written, redrawn = {}, []
    for frame in frames:
        for place in ((frame.before[0] == MASK) & (frame.tokens[0] != MASK)).nonzero()[:, 0]:
            token = int(frame.tokens[0, place])
            redrawn += [written[int(place)] == token] if int(place) in written else []
            written[int(place)] = token
    assert len(redrawn) > 10
    assert sum(redrawn) < len(redrawn) / 3


@pytest.mark.parametrize("steps", [steps for steps in STEPS if steps != "remask"])
def test_a_corrector_masks_the_least_probable_tokens_of_a_block_that_were_drawn(steps):
    """Seen from outside: what is masked when a block is full, and never what was given."""

    def law(tokens, position):
        numbers = random.Random(f"{tokens}{position}")
        return [numbers.random() ** 4 for _ in range(V)]

    table, frames = Table(law, V, MASK, block_size=4), []
    params = SamplingParams(bos_id=0, eos_id=0, steps=steps, corrector=2, temperature=2.0, **SMALL)
    given = (0, 5, 6, MASK, 7, MASK, MASK, MASK, 8)
    groups = generate("bamdlm", table, [TextRequest(0, given)], params, watch=frames.append)
    ((sample,),) = [group for group in groups if group]
    drawn, corrected = {}, []
    for frame in frames:
        before, after = frame.before[0].tolist(), frame.tokens[0].tolist()
        new = [i for i in range(SMALL["length"]) if before[i] == MASK != after[i]]
        block = new[0] // 4
        stop = 4 * block + 4
        again = [i for i in drawn if 4 * block <= i < stop and before[i] == MASK]
        if again and block not in corrected:
            places = [i for i in range(stop - 4, stop) if given[i : i + 1] in ((), (MASK,))]
            assert all(i in drawn for i in places)
            assert sorted(again) == sorted(sorted(places, key=drawn.get)[:2])
            corrected.append(block)
        visible = before[:stop][-SMALL["context_size"] :]
        for i in new:
            drawn[i] = float(table.distribution(visible, i - stop + len(visible))[after[i]])
        assert all(before[i] == token for i, token in enumerate(given) if token != MASK)
    assert corrected == list(range(SMALL["length"] // 4))
    assert (sample.tokens != MASK).all()


# infilling

GAPS = TextRequest(0, (0, 5, 6, MASK, MASK, 7, 8, MASK, 9, 10, MASK, 11), total=12)


@pytest.mark.parametrize("algo", ["bamdlm", "mdlm", "sedd"])
def test_infilling_fills_the_gaps_and_nothing_else(algo):
    for batch in (1, 2):
        requests = [GAPS, TextRequest(1, (0, MASK, 3), total=3)]
        samples = write(algo, network(algo), requests, batch_size=batch, **SMALL)
        for sample, request in zip(samples, requests, strict=True):
            assert len(sample.tokens) == len(request.tokens)
            for given, token in zip(request.tokens, sample.tokens.tolist(), strict=True):
                assert token != MASK
                assert given in (token, MASK)
            assert sample.written == request.tokens.count(MASK)


@pytest.mark.parametrize("corrector", [0, 1])
def test_infilling_with_a_cache_gives_the_same_text(corrector):
    requests = [GAPS, TextRequest(1, (0, MASK, 3), total=3)]
    params = SMALL | {"context_size": 24, "batch_size": 2, "corrector": corrector}
    plain = write("bamdlm", network("bamdlm"), requests, **params)
    assert texts(plain) == texts(
        write("bamdlm", network("bamdlm"), requests, kv_cache=True, **params)
    )


def from_the_right(tokens, position):
    """The token after the gap if it is seen, else 1."""
    after = [t for t in tokens[position:] if t != MASK]
    return [float(v == (after[0] if after else 1)) for v in range(V)]


def test_mdlm_sees_both_sides_of_a_gap_and_a_block_what_is_left_of_its_end():
    request = [TextRequest(0, (0, MASK, MASK, 2, 3, 4, 5, MASK, 6, 7, 8, 9), total=12)]
    both = texts(write("mdlm", Table(from_the_right, V, MASK), request, **SMALL))[0]
    assert (both[1], both[2], both[7]) == (2, 2, 6)
    left = texts(write("bamdlm", Table(from_the_right, V, MASK, block_size=4), request, **SMALL))[0]
    assert (left[1], left[2], left[7]) == (2, 2, 1)


def test_ar_cannot_fill_gaps():
    with pytest.raises(ValueError, match="algo=ar cannot fill gaps"):
        write("ar", network("ar"), [GAPS], **SMALL)


# stopping


@pytest.mark.parametrize(
    ("algo", "cached"),
    [("bamdlm", False), ("bamdlm", True), ("mdlm", False), ("ar", False), ("ar", True)],
)
def test_rows_that_end_leave_and_others_take_their_place(algo, cached):
    params = SMALL | {"length": 40, "var_length": True, "eos_id": 3, "kv_cache": cached}
    params["corrector"] = 2 if algo == "bamdlm" and cached else 0
    denoise = network(algo)
    alone = write(algo, denoise, 8, batch_size=1, **params)
    assert len({len(s.tokens) for s in alone}) > 3
    together = write(algo, denoise, 8, batch_size=3, **params)  # places change hands and go
    assert texts(together) == texts(alone)
    assert [s.nfe for s in together] == [s.nfe for s in alone]
    for sample in alone:
        ids = sample.tokens.tolist()
        assert 3 not in ids[1:-1]
        assert (sample.stopped == "eos") == (ids[-1] == 3 and len(ids) > 1)
        if algo == "ar":
            assert sample.nfe == len(ids) - 1
    free = write(algo, denoise, 8, **params | {"var_length": False, "batch_size": 8})
    for long, short in zip(free, alone, strict=True):
        assert long.tokens[: len(short.tokens)].tolist() == short.tokens.tolist()


def test_an_eos_of_the_prompt_does_not_end_the_text():
    table = Table(lambda tokens, position: [float(v == 5) for v in range(V)], V, MASK, 4)
    request = [TextRequest(0, (3, 3, 3))]
    (sample,) = write("bamdlm", table, request, var_length=True, eos_id=3, bos_id=3, **SMALL)
    assert sample.stopped == "length"
    assert len(sample.tokens) == SMALL["length"]


def repeats(tokens, position):
    return [float(v == 1) for v in range(V)]


@pytest.mark.parametrize("algo", ["bamdlm", "ar"])
def test_a_text_that_repeats_itself_is_cut_by_256_tokens(algo):
    table = Table(repeats, V, MASK, 4 if algo == "bamdlm" else 1, next_token=algo == "ar")
    params = SMALL | {"length": 300, "var_length": True, "eos_id": 3, "kv_cache": True}
    (sample,) = write(algo, table, [TextRequest(0, (0, 2, 2, 2, 2))], **params)
    assert sample.stopped == "entropy"
    assert sample.tokens.tolist() == [0, 2, 2, 2, 2]  # a cut does not enter the prompt
    assert sample.nfe == ENTROPY_TOKENS - 5


def test_of_two_cuts_the_earlier_counts_and_what_came_later_was_never_seen():
    tail = torch.ones(300, dtype=torch.int64)
    tail[40] = 3
    assert find_stop(tail, 300, [300], 0, 0, 3).length == 41
    assert find_stop(tail, 300, range(1, 301), 0, 0, 3) == (41, 41, "eos")
    tail[40] = 1
    tail[299] = 3
    assert find_stop(tail, 300, [300], 290, 0, 3).length == 44
    assert find_stop(tail, 300, range(291, 301), 290, 10, 3) == (35, 291, "entropy")


def test_rejection_draws_again_and_says_how_often():
    """Every third try is good enough: entropy 4 needs many different tokens."""
    params = {"length": 256, "window": 256, "steps": "ancestral", "num_steps": 1}
    even = Table(lambda tokens, position: [1.0] * 300, 300, 299)
    (sample,) = write("mdlm", even, 1, reject_low_entropy=True, **params)
    assert (sample.tries, sample.rejected) == (1, False)
    (sample,) = write("mdlm", Table(repeats, V, MASK), 1, reject_low_entropy=True, **params)
    assert (sample.tries, sample.rejected, len(sample.tokens)) == (MOST_TRIES, True, 256)
    (sample,) = write("mdlm", Table(repeats, V, MASK), 1, **params)
    assert (sample.tries, sample.rejected) == (1, False)


# looking on


def test_a_watcher_sees_every_evaluation():
    frames, ticks = [], []
    params = SamplingParams(bos_id=0, eos_id=0, batch_size=2, **SMALL)
    groups = generate(
        "bamdlm",
        network("bamdlm"),
        [TextRequest(row, (0,)) for row in range(3)],
        params,
        watch=frames.append,
        tick=lambda *counts: ticks.append(counts),
    )
    samples = [s for group in groups for s in group]
    assert len(frames) == 2 * (SMALL["length"] - 1)  # two batches
    assert [int((f.tokens[0] == MASK).sum()) for f in frames[:3]] == [22, 21, 20]
    assert sum(tokens for tokens, _ in ticks) == 3 * (SMALL["length"] - 1)
    assert sum(count for _, count in ticks) == len(frames) == frames[-1].nfe
    assert len(samples) == 3


WRONG = [
    ("bamdlm", {"length": 22}, "block_size=4 does not divide model.length=22"),
    ("bamdlm", {"context_size": 13}, "sampling.context_size=13 is not a multiple of block_size=4"),
    ("bamdlm", {"nucleus_p": 0}, r"sampling.nucleus_p=0 must be in \(0, 1\]"),
    ("bamdlm", {"temperature": -0.5}, r"sampling.temperature=-0.5 must be in \[0, 100\]"),
    ("ar", {"temperature": float("nan")}, r"sampling.temperature=nan must be in \[0, 100\]"),
    ("bamdlm", {"order_temperature": -1}, "sampling.order_temperature=-1 must be at least 0"),
    ("mdlm", {"entropy_bound": -0.1}, "sampling.entropy_bound=-0.1 must be at least 0"),
    ("bamdlm", {"corrector": 5}, "sampling.corrector=5 is more than the block_size=4 of a block"),
    ("bamdlm", {"corrector": -1}, "sampling.corrector=-1 must be at least 0"),
    *(
        (algo, {"corrector": 1}, f"which bamdlm writes, not algo={algo}: set sampling.corrector=0")
        for algo in ("mdlm", "ar", "sedd")
    ),
    ("sedd", {"top_k": -1}, "sampling.top_k=-1 must be at least 0"),
    ("bamdlm", {"nucleus_p": 1.5}, r"sampling.nucleus_p=1.5 must be in \(0, 1\]"),
    ("bamdlm", {"steps": "greedy"}, "sampling.steps='greedy' must be one of"),
    ("bamdlm", {"confidence": "luck"}, "sampling.confidence='luck' must be one of"),
    ("bamdlm", {"threshold": 0}, "sampling.threshold=0 must be in"),
    ("bamdlm", {"remask_eta": -1}, "sampling.remask_eta=-1 must be in"),
    ("bamdlm", {"dtype": "bf16"}, "sampling.dtype='bf16' must be one of"),
    ("bamdlm", {"batch_size": 0}, "sampling.batch_size=0 must be at least 1"),
    ("bamdlm", {"k": 0}, "sampling.k=0 must be at least 1"),
    ("bamdlm", {"steps": "confidence", "k": 5}, "k=5 is more than the block_size=4 of a block"),
    (
        "bamdlm",
        {"steps": "ancestral", "num_steps": 0},
        "algo.T=0: sampling.steps=ancestral takes algo.T steps",
    ),
    ("sedd", {"num_steps": 0}, "algo.T=0: algo=sedd takes algo.T steps"),
    ("mdlm", {"kv_cache": True}, "sampling.kv_cache=True is exact for bamdlm and ar only"),
    ("mdlm", {"window": 1}, "need at least 2 tokens"),
    ("bamdlm", {"var_length": True, "reject_low_entropy": True}, "choose one"),
    ("gpt", {}, "algo must be one of"),
]


@pytest.mark.parametrize(("algo", "change", "message"), WRONG)
def test_settings_that_cannot_be_are_named(algo, change, message):
    with pytest.raises(ValueError, match=message):
        write(algo, None, 1, **SMALL | change)


@pytest.mark.parametrize("cached", [False, True])
def test_a_block_size_need_not_divide_the_context_of_a_text_that_fits_into_it(cached):
    params = SMALL | {"kv_cache": cached, "batch_size": 3}
    wide = write("bamdlm", network("bamdlm"), ragged(), **params | {"context_size": 25})
    just = write("bamdlm", network("bamdlm"), ragged(), **params | {"context_size": 24})
    assert texts(wide) == texts(just)


@pytest.mark.parametrize("tokens", [(), tuple(range(25))])
def test_a_prompt_must_fit(tokens):
    with pytest.raises(ValueError, match="of a text of 24"):
        write("bamdlm", network("bamdlm"), [TextRequest(0, tokens)], **SMALL)


@contextmanager
def no_waiting():
    """Any synchronising call in here is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CACHED = {"kv_cache": True}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("algo", "change"),
    [
        *(
            ("bamdlm", CACHED | {"steps": steps})
            for steps in ("first_hitting", "ancestral", "remask")
        ),
        *(
            ("bamdlm", CACHED | {"steps": "confidence", "k": 2, "confidence": c})
            for c in CONFIDENCES
        ),
        *(("bamdlm", CACHED | {"steps": "threshold", "threshold": p}) for p in (0.15, 1.0)),
        ("bamdlm", {"steps": "threshold", "threshold": 0.15}),
        ("bamdlm", CACHED | {"steps": "low_confidence", "temperature": 0.8, "top_k": 20}),
        ("mdlm", {"steps": "entropy_bounded", "entropy_bound": 3.0, "length": 48}),
        ("bamdlm", CACHED | {"steps": "confidence", "order_temperature": 0.1}),
        ("bamdlm", CACHED | {"temperature": 0.8, "top_k": 20}),
        ("ar", CACHED | {"temperature": 0.0, "length": 128}),
        ("mdlm", {"steps": "threshold", "threshold": 0.15, "length": 48}),
        ("mdlm", {"length": 48}),
        ("ar", CACHED | {"length": 128}),
        ("ar", {"length": 128}),
    ],
)
def test_the_host_never_waits_for_the_device_inside_a_block(cuda, monkeypatch, algo, change, dtype):
    """Between two looks at the stop rules. The nucleus is the one of large vocabularies. The texts
    are the CPU's; one of three may meet a draw that falls within a rounding error of the edge.
    With a cache, heads of 32 are attended to by one kernel, those of 8 by torch."""
    monkeypatch.setattr("samplers.nucleus.SORTED", 8)
    denoise = network(algo, hidden_size=64 if dtype == "float32" else 16)
    options = SMALL | change | {"dtype": dtype, "nucleus_p": 0.9}
    params = SamplingParams(**options, bos_id=0, eos_id=0, batch_size=3)
    requests = [TextRequest(row, (0, *range(row))) for row in range(3)]
    here = list(generate(algo, denoise, requests, params))
    denoise.backbone.to(cuda)
    groups = generate(algo, denoise, requests, params, device=cuda)
    there = [next(groups)]  # sets libraries up
    assert [] in here[1:]
    for ended in here[1:]:
        with nullcontext() if ended else no_waiting():  # a text that ended is brought to the host
            there.append(next(groups))
    assert not list(groups)
    pairs = [pair for groups in zip(here, there, strict=True) for pair in zip(*groups, strict=True)]
    assert all(far.row == near.row for near, far in pairs)
    same = [(near, far) for near, far in pairs if torch.equal(near.tokens, far.tokens)]
    assert len(same) >= len(requests) - 1
    assert all(far.nfe == near.nfe for near, far in same)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [{}, CACHED, CACHED | {"corrector": 2}, CACHED | {"steps": "threshold", "threshold": 0.15}],
    ids=["uncached", "cached", "corrected", "adaptive"],
)
def test_batches_on_a_gpu_are_recorded_one_after_the_other(cuda, change):
    """The last of them is smaller."""
    options = SMALL | change | {"dtype": "float64"}
    params = SamplingParams(**options, bos_id=0, eos_id=0, batch_size=2)
    denoise, texts = network("bamdlm"), []
    for device in ("cpu", cuda):
        denoise.backbone.to(device)
        requests = [TextRequest(row, (0,)) for row in range(5)]
        groups = generate("bamdlm", denoise, requests, params, device=device)
        samples = sorted(chain.from_iterable(groups), key=lambda sample: sample.row)
        texts.append([sample.tokens.tolist() for sample in samples])
    here, there = texts
    assert len(there) == 5
    # one draw may fall within a rounding error of the edge
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 1


@pytest.mark.gpu
def test_nor_in_the_steps_of_sedd(cuda):
    denoise = network("sedd")
    denoise.backbone.to(cuda)
    params = SamplingParams(**SMALL, bos_id=0, eos_id=0, batch_size=3, nucleus_p=0.9)
    for waiting in (nullcontext, no_waiting):  # the first call sets libraries up
        requests = iter([TextRequest(row, (0,)) for row in range(3)])
        rows = ActiveTexts(denoise, requests, params, cuda, None)
        with waiting():
            write_analytically(rows)
        assert (rows.canvas.x[:, :-1] != MASK).all()


@pytest.mark.parametrize(
    ("algo", "how"),
    [
        *((algo, {}) for algo in ALGOS),
        ("ar", {"kv_cache": True}),
        ("bamdlm", {"kv_cache": True, "var_length": True}),
        ("bamdlm", {"nucleus_p": 0.9, "dtype": "float64"}),
        ("mdlm", {"temperature": 0.0}),
        ("mdlm", {"steps": "confidence"}),
        ("mdlm", {"steps": "threshold", "threshold": 0.5}),
        ("mdlm", {"steps": "entropy_bounded", "entropy_bound": 1.0}),
        ("mdlm", {"steps": "low_confidence"}),
        ("mdlm", {"steps": "ancestral"}),
    ],
    ids=str,
)
def test_a_network_that_answers_nan_ends_the_writing(algo, how):
    """In whichever evaluation: the weight belongs to one token, which is seen only once drawn."""
    broken = small(V, seed=1, adaln=algo != "ar")
    with torch.no_grad():
        broken.vocab_embed.embedding[0 if algo == "ar" else MASK] = torch.nan
    denoise = denoiser(broken, algo, MASK, SMALL["block_size"])
    params = {**SMALL, "batch_size": 2, **how}
    with pytest.raises(FloatingPointError, match="the network answered NaN"):
        write(algo, denoise, 3, **params)
    assert len(write(algo, network(algo), 3, **params)) == 3
