"""A loaded model tells what it thinks of given texts."""

import math

import pytest
import torch
from conftest import GOLDEN
from networks import CHECKPOINTS, MASK

from sampling.notebook import load

TEXTS = ["the work of any", "the", "other states and the same of the work"]


def opened(name):
    return load(GOLDEN / CHECKPOINTS[name]["file"], tokenizer=str(GOLDEN / "tokenizer"))


def mean_over_orders(model, ids, block_size):
    """-log p(x | order) by the questions that samplers ask, averaged over all orders of each block
    through all sets of masked tokens: nats per token."""
    nll = torch.zeros(len(ids))
    for start in range(0, len(ids), block_size):
        places = list(range(max(start, 1), min(start + block_size, len(ids))))
        for number in range(1, 1 << len(places)):
            masked = [p for i, p in enumerate(places) if number >> i & 1]
            canvas = [MASK if p in masked else t for p, t in enumerate(ids[: start + block_size])]
            canvas += [MASK] * (start + block_size - len(canvas))
            found = model.log_probs(canvas, masked)[0]
            ways = len(masked) * math.comb(len(places), len(masked))
            for log_p, place in zip(found, masked, strict=True):
                nll[place] -= float(log_p[ids[place]]) / ways
    return nll


def test_the_likelihood_of_a_text_is_what_the_samplers_questions_give():
    """Also of its last block, which it does not fill: the places behind it are masked."""
    model = opened("bd3lm_bs4")
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXTS[2])]
    (found,) = model.nll(TEXTS[2], likelihood="exact")
    assert len(ids) % 4
    assert found.tokens == len(ids) - 1
    expected = mean_over_orders(model, ids, 4)
    torch.testing.assert_close(found.nll.float(), expected, rtol=1e-4, atol=1e-4)
    assert found.total == pytest.approx(float(found.nll.sum()))


@pytest.mark.parametrize("name", ["bd3lm_bs4", "mdlm", "ar"])
def test_texts_of_a_batch_do_not_matter_to_each_other(name):
    model = opened(name)
    together = model.nll(TEXTS, likelihood="counts", draws=3)
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = model.nll([text], likelihood="counts", draws=3)
        torch.testing.assert_close(alone.nll, found.nll, rtol=1e-4, atol=1e-5)


def test_many_draws_have_the_mean_exact():
    model = opened("bd3lm_bs4")
    (exact,), (drawn,) = (
        model.nll(TEXTS[2], likelihood=name, draws=200) for name in ("exact", "counts")
    )
    assert drawn.total == pytest.approx(exact.total, rel=0.05)
    assert drawn.total != exact.total


def test_ar_is_asked_about_the_next_token():
    model = opened("ar")
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXTS[0])]
    (found,) = model.nll([ids])
    log_probs = model.log_probs(ids, range(1, len(ids)))[0]
    picked = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(found.nll[1:].float(), -picked, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no token at position 0"):
        model.log_probs(ids, [0])


def test_masks_are_what_is_asked_about_where_nothing_is_said():
    model = opened("bd3lm_bs4")
    ids = [0, 5, MASK, MASK]
    assert model.log_probs(ids).shape == (1, 2, MASK + 1)
    torch.testing.assert_close(model.log_probs(ids), model.log_probs(ids, [2, 3]))
    with pytest.raises(ValueError, match="different numbers of masks"):
        model.log_probs([ids, [0, 5, 6, MASK]])


@pytest.mark.parametrize("name", ["bd3lm_bs4", "mdlm", "ar", "sedd"])
def test_hidden_states_are_those_of_every_block(name):
    model = opened(name)
    states = model.hidden_states([1, 2, 3, 4])
    backbone = model.scorer.backbone
    assert len(states) == len(backbone.blocks) + 1
    assert {tuple(state.shape) for state in states} == {(1, 4, 20)}
    assert not any(module._forward_hooks for module in backbone.modules())


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="takes 4,294,967,295 passes"):
        opened("mdlm").nll("the work", likelihood="exact")
    with pytest.raises(ValueError, match="not defined for sedd"):
        opened("sedd").nll("the work")
    with pytest.raises(ValueError, match="a text has 33 tokens with BOS, the model takes 32"):
        opened("bd3lm_bs4").nll([[0] * 33])


@pytest.mark.parametrize("name", ["bd3lm_bs4", "mdlm", "ar"])
def test_what_is_no_text_is_refused_in_words(name):
    model = opened(name)
    bos, mask = model.tokenizer.bos_id, model.tokenizer.mask_id
    for ids in ([], [bos, -1], [bos, 10**8]):
        with pytest.raises(ValueError, match=r"must be ids in 0\.\.\d+ that begin with BOS, got"):
            model.nll([ids], likelihood="counts")
    for wrong in ({"draws": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            model.nll(TEXTS, likelihood="counts", **wrong)
    for position in (-1, 3):
        with pytest.raises(ValueError, match=r"must be in 0\.\.2"):
            model.log_probs([bos, 1, mask], [position])
    for ask in (model.log_probs, model.hidden_states):
        with pytest.raises(ValueError, match="at least one token"):
            ask([])
    (found,) = model.nll([[bos, 1, mask, 2]], likelihood="counts")
    assert found.tokens == 2, "a mask is seen as such, not scored"
    (same,) = model.nll(torch.tensor([[bos, 1, mask, 2]]), likelihood="counts")
    assert torch.equal(same.nll, found.nll), "a tensor is a text as a list is, with its draws"
