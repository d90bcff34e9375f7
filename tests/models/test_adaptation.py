"""What clean tokens see, and where a prediction is read: in training, in likelihoods and with a
cache it is the same network."""

import itertools

import pytest
import torch
from networks import assert_within, small, small_llama, texts

from evaluation.network import asker
from models import attention
from models.adaptation import Adaptation, open_blocks
from models.attention import dense_mask
from models.denoiser import Denoiser
from models.masks import BlockCausal, BlockDiffusion, Causal, CausalClean

VOCAB, LENGTH = 7, 12
MASK = VOCAB - 1
NETWORKS = {"dit": small, "llama": small_llama}
ADAPTATIONS = [Adaptation(*given) for given in itertools.product([False, True], repeat=2)]
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
each_adaptation = pytest.mark.parametrize("adapt", ADAPTATIONS, ids=repr)


def noised(x0, share=0.5, seed=3):
    masked = torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)) < share
    masked[:, 0] = False
    return x0.masked_fill(masked, MASK)


def denoiser(net, size, adapt):
    return Denoiser(net, MASK, size, adapt.sampling_mask(size), adapt)


def test_the_training_mask_written_out():
    """Two blocks of two: rows are queries, the noised half first."""
    index = torch.arange(8)
    seen = dense_mask(BlockDiffusion(2, causal=True), index, index, 8)
    assert [[int(x) for x in row] for row in seen] == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


def test_a_block_is_open_while_a_mask_is_in_it():
    tokens = torch.tensor([[0, MASK, 1, 2, 3, 4, MASK], [0, 0, 0, 0, 0, MASK, 0]])
    first = torch.tensor([3, 2])  # blocks of 2: positions 3 .. 9 and 2 .. 8
    assert open_blocks(tokens, MASK, 2, None).int().tolist() == [
        [1, 1, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 1, 0],
    ]
    assert open_blocks(tokens, MASK, 2, first).int().tolist() == [
        [0, 1, 1, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1, 0],
    ]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_backends_agree_on_causal_clean_halves(views, both, packed, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 4)
    keys = (views + 1) * LENGTH
    mask = BlockDiffusion(2, views, causal=True, both=both)
    queries = mask.answered(keys)
    ids = torch.tensor([[0] * 4 + [1] * 8, [0] * 6 + [1] * 6]) if packed else None
    ids = None if ids is None else torch.cat([ids] * (views + 1), 1)
    q, k, v = torch.randn(3, 2, 2, keys, 16, generator=torch.Generator().manual_seed(0))
    arguments = (mask, queries, keys, ids, torch.device("cpu"))
    plain = attention.dense(*arguments)(q[:, :, :queries], k, v)
    for backend in (attention.sdpa, attention.flex):
        assert_within(backend(*arguments)(q[:, :, :queries], k, v), plain, 1e-5)


@torch.no_grad()
def test_backends_agree_on_open_blocks():
    q, k, v = torch.randn(3, 2, 2, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    opened = torch.zeros(2, LENGTH, dtype=torch.bool)
    opened[0, 8:], opened[1, 4:8] = True, True
    arguments = (CausalClean(4, open=opened), LENGTH, LENGTH, None, torch.device("cpu"))
    plain = attention.dense(*arguments)(q, k, v)
    for backend in (attention.sdpa, attention.flex):
        assert_within(backend(*arguments)(q, k, v), plain, 1e-5)
    causal = attention.dense(Causal(), *arguments[1:])(q, k, v)
    assert_within(plain[0, :, :8], causal[0, :, :8], 1e-6)
    blocks = attention.dense(BlockCausal(4), *arguments[1:])(q, k, v)
    assert_within(plain[0, :, 8:], blocks[0, :, 8:], 1e-6)


@each_network
@pytest.mark.parametrize("size", [1, 4, 12])
@torch.no_grad()
def test_a_causal_clean_half_is_the_pass_of_an_ar_network(make, size):
    net, x0 = make(), texts(2, LENGTH, MASK)
    mask = BlockDiffusion(size, causal=True, both=True)
    both = net.hidden(torch.cat([noised(x0), x0], 1), attention_mask=mask)
    assert_within(both[:, LENGTH:], net.hidden(x0, attention_mask=Causal()), 1e-5)


@each_network
@each_adaptation
@pytest.mark.parametrize("size", [1, 3, 4, 12])
@torch.no_grad()
def test_likelihoods_ask_what_samplers_ask(make, adapt, size):
    """Each block as a sampler sees it: the clean blocks before it and itself noised."""
    net, x0 = make(), texts(3, LENGTH, MASK)
    x_t = noised(x0)
    ask = asker(net, x0, block_size=size, mask_id=MASK, adapt=adapt)
    read = (x_t == MASK).flatten().nonzero()[:, 0]
    found = ask(x_t, read, lambda log_probs, rows: log_probs.clone())
    sampler = denoiser(net, size, adapt)
    expected = torch.zeros(3, LENGTH, VOCAB)
    for start in range(0, LENGTH, size):
        stop = start + size
        tokens = torch.cat([x0[:, :start], x_t[:, start:stop]], 1)
        places = torch.arange(start, stop).expand(3, -1)
        expected[:, start:stop] = sampler(tokens, places)
    torch.testing.assert_close(found, expected.flatten(0, 1)[read], rtol=1e-5, atol=1e-5)


@each_network
@each_adaptation
@torch.no_grad()
def test_a_document_is_asked_as_if_it_stood_alone(make, adapt):
    net, x0 = make(), texts(2, LENGTH, MASK)
    two, ids = x0.view(1, -1), torch.arange(2).repeat_interleave(LENGTH)[None]
    x_t = noised(x0)
    read = (x_t == MASK).flatten().nonzero()[:, 0]
    settings = {"block_size": 4, "mask_id": MASK, "adapt": adapt}
    take = lambda log_probs, rows: log_probs.clone()  # noqa: E731
    alone = asker(net, x0, **settings)(x_t, read, take)
    packed = asker(net, two, document_ids=ids, **settings)(x_t.view(1, -1), read, take)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@each_network
@each_adaptation
@pytest.mark.parametrize("size", [1, 4])
@torch.no_grad()
def test_a_cached_block_is_asked_as_an_uncached_one(make, adapt, size):
    """Rows that stand at different blocks; where it is shifted the token before comes again."""
    net, x0 = make(), texts(2, LENGTH, MASK)
    sampler = denoiser(net, size, adapt)
    again = int(adapt.shifted)
    cache = sampler.new_cache(2, LENGTH)
    sampler(x0[:, :8], torch.zeros(2, 1, dtype=torch.int64), cache)
    cache = cache.commit(torch.tensor([8 - again, 8 - size - again]))
    starts = cache.committed
    rows = torch.arange(2)[:, None]
    tokens = x0[rows, starts[:, None] + torch.arange(size + again)].clone()
    tokens[:, -1] = MASK
    read = torch.arange(size).expand(2, -1) + again
    found = sampler(tokens, read, cache)
    for row, start in enumerate((8, 8 - size)):
        whole = x0[row : row + 1, : start + size].clone()
        whole[:, -1] = MASK
        expected = sampler(whole, torch.arange(start, start + size)[None])
        torch.testing.assert_close(found[row], expected[0], rtol=1e-5, atol=1e-5)


def test_other_block_sizes_keep_what_clean_tokens_see():
    asked = denoiser(small(), 4, Adaptation(True, True)).in_blocks(2)
    assert asked.attention_mask == CausalClean(2)
    assert asked.shifted
    assert Adaptation.named("causal", "next", ar_loss=1) == Adaptation(True, True)
    assert Adaptation.named() == Adaptation(False, False)
