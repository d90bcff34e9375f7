"""Sampling with causal clean tokens and shifted labels: cached is uncached, whatever the batch; of
blocks of one it is AR sampling."""

import itertools

import pytest
import torch
from networks import small, small_llama, texts
from sampling_tools import write

from evaluation import estimators
from evaluation.estimators import AskedTexts
from evaluation.network import asker
from models.adaptation import Adaptation
from noise_schedule import LogLinear
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from samplers.request import TextRequest

VOCAB = 12
MASK = VOCAB - 1
ADAPTATIONS = [Adaptation(*given) for given in itertools.product([False, True], repeat=2)]
each_adaptation = pytest.mark.parametrize("adapt", ADAPTATIONS, ids=repr)
RULES = {
    "first_hitting": {},
    "confidence": {"k": 2},
    "threshold": {"threshold": 0.6},
    "remask": {"num_steps": 4, "remask_eta": 0.3},
}


def denoiser(net, adapt, size=4):
    return MaskedDiffusion(MASK, size, LogLinear(), adapt=adapt).denoiser(net)


def requests():
    """Prompts of every length round the borders of blocks, with a gap in one of them."""
    ids = texts(7, 16, MASK, seed=5).tolist()
    given = [tuple(row[:n]) for row, n in zip(ids, (1, 3, 4, 5, 8, 9, 13), strict=True)]
    given.append((*given[-1][:6], MASK, *given[-1][7:]))
    return [TextRequest(row, tokens) for row, tokens in enumerate(given)]


def written(denoise, rows=None, **params):
    given = {"length": 16, "block_size": 4, "context_size": 16, "batch_size": 3, "seed": 3}
    given |= {"move_chance": lambda t: t}
    made = write("bamdlm", denoise, rows or requests(), **{**given, **params})
    return [sample.tokens.tolist() for sample in made]


@each_adaptation
@pytest.mark.parametrize("steps", RULES)
def test_cached_is_uncached(steps, adapt):
    make = small if steps == "confidence" else small_llama
    denoise = denoiser(make(vocab_size=VOCAB), adapt)
    settings = {"steps": steps, **RULES[steps]}
    plain = written(denoise, **settings)
    assert written(denoise, kv_cache=True, **settings) == plain
    some = requests()[2], requests()[7]
    assert [t for each in some for t in written(denoise, [each], **settings)] == plain[2::5]
    assert len({tuple(text) for text in plain}) == len(plain)


SIZED = {1: (0, 3), 2: (1, 2), 16: (0, 3)}  # each part on and off at each size; all four at 4 above


@pytest.mark.parametrize(
    ("size", "adapt"),
    [(size, ADAPTATIONS[i]) for size, chosen in SIZED.items() for i in chosen],
    ids=repr,
)
def test_cached_is_uncached_in_blocks_of(size, adapt):
    denoise = denoiser(small_llama(vocab_size=VOCAB), adapt, size)
    rows = requests()[:-1]
    plain = written(denoise, rows, block_size=size)
    assert written(denoise, rows, block_size=size, kv_cache=True) == plain


@each_adaptation
def test_a_corrector_fills_a_block_again(adapt):
    denoise = denoiser(small_llama(vocab_size=VOCAB), adapt)
    plain = written(denoise, corrector=2)
    assert written(denoise, corrector=2, kv_cache=True) == plain
    assert plain != written(denoise)


@each_adaptation
def test_past_the_window_a_row_sees_no_trace_of_others(adapt):
    """Rows that come late, next to others; the ring turns several times."""
    denoise = denoiser(small_llama(vocab_size=VOCAB), adapt)
    settings = {"length": 28, "context_size": 12, "kv_cache": True}
    together = written(denoise, **settings)
    some = requests()[1], requests()[6]
    assert [t for each in some for t in written(denoise, [each], **settings)] == together[1:7:5]


@torch.no_grad()
@each_adaptation
def test_past_the_window_the_cache_is_one_long_pass(adapt):
    """What the last block of a text is asked, against a pass over all of it in which every token
    sees the window alone."""
    net, size, window = small_llama(vocab_size=VOCAB), 4, 12
    denoise = denoiser(net, adapt)
    asked = []

    def watched(tokens, read, cache=None):
        answer = denoise(tokens, read, cache)
        asked.append((tokens.clone(), read, answer))
        return answer

    watched.mask_id, watched.recordable, watched.block_size = MASK, False, size
    watched.shifted, watched.new_cache = adapt.shifted, denoise.new_cache
    settings = {"length": 40, "context_size": window, "kv_cache": True, "steps": "confidence"}
    (text,) = written(watched, [TextRequest(0, (1,))], **settings)
    tokens, read, answer = asked[-1]  # of the last evaluation
    again = int(adapt.shifted)
    assert tokens.shape[1] == size + again
    whole = torch.cat([torch.tensor([text[: 40 - size]]), tokens[:, again:]], 1)
    mask = adapt.sampling_mask(size, window)
    opened = {"open_blocks": torch.arange(40)[None] >= 40 - size} if adapt.causal else {}
    hidden = net.hidden(whole, attention_mask=mask, **opened)
    logits = net.logits(hidden)[0, read[0] - again + 40 - size - again]
    logits[:, MASK] = -torch.inf
    torch.testing.assert_close(answer[0], logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_greedy_in_blocks_of_one_is_greedy_ar(cached):
    net = small_llama(vocab_size=VOCAB)
    rows = requests()[:-1]
    settings = {"temperature": 0.0, "kv_cache": cached}
    ours = written(denoiser(net, Adaptation(True, True), 1), rows, block_size=1, **settings)
    ar = Autoregressive(MASK).denoiser(net)
    given = {"length": 16, "context_size": 16, "batch_size": 3, "seed": 3, **settings}
    assert ours == [s.tokens.tolist() for s in write("ar", ar, rows, **given)]


@torch.no_grad()
@each_adaptation
def test_greedy_texts_are_those_that_the_greedy_law_would_write(adapt):
    net = small_llama(vocab_size=VOCAB)
    found = written(denoiser(net, adapt), steps="confidence", temperature=0.0, kv_cache=True)
    x0 = torch.tensor(found)
    scored = torch.ones_like(x0, dtype=torch.bool)
    for row, request in enumerate(requests()):
        given = torch.tensor(request.tokens)
        scored[row, : len(given)] = given == MASK
    ask = asker(net, x0, block_size=4, mask_id=MASK, adapt=adapt)
    assert estimators.greedy_path(ask, AskedTexts(x0, scored, 4, MASK)).likeliest.all()


def test_what_a_shifted_network_cannot_write():
    denoise = denoiser(small_llama(vocab_size=VOCAB), Adaptation(shifted=True))
    with pytest.raises(ValueError, match="row 0: the prompt begins with a mask token"):
        written(denoise, [TextRequest(0, (MASK, 1))])
    with pytest.raises(ValueError, match=r"sampling\.context_size=4: this network predicts the"):
        written(denoise, context_size=4)
