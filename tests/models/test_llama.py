"""models/llama.py: what transformers computes, and what every network must hold."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from hub_folders import TRANSFORMERS, saved, transformers_model
from networks import GRADIENTS, assert_within, small_llama, texts

from checkpointing.layouts import read_checkpoint
from checkpointing.load import build_network, load_into
from evaluation.network import asker
from models import network
from models.clean_half import clean_half
from models.document_ids import positions
from models.llama import Llama, LlamaShape
from models.masks import BlockCausal, BlockDiffusion, Causal, Full
from objectives.autoregressive import Autoregressive

VOCAB = 7
LENGTH = 24


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{name: (the model of transformers, our network read from its folder)}, made when asked."""
    folder = tmp_path_factory.mktemp("transformers")

    @functools.cache
    def pair(name):
        model = transformers_model(name)
        checkpoint = read_checkpoint(saved(folder / name, model))
        net = build_network(checkpoint)
        load_into(net, checkpoint, use_ema=True, algo="ar")
        return model, net.eval()

    return pair


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_causal_logits_are_those_of_transformers(name, pairs):
    model, net = pairs(name)
    tokens = texts(2, 3 * LENGTH, 29)
    ours = net.logits(net.hidden(tokens, attention_mask=Causal()))
    assert_within(ours, model(tokens).logits, 1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_ar_loss_and_gradients_are_those_of_transformers(name, pairs):
    """The mask, which is no word, is an id of no token: its column is left out in both."""
    model, net = pairs(name)
    tokens, mask = texts(3, LENGTH, 28), 28
    logits = model(tokens[:, :-1]).logits
    logits = logits.masked_fill(torch.arange(29) == mask, -torch.inf)
    theirs = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    found = Autoregressive(mask).loss(net, tokens, torch.ones_like(tokens), training=True)
    assert_within(found.per_place, theirs.detach(), 1e-6)
    found.per_place.backward()
    theirs.backward()
    gradients = dict(model.named_parameters())
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for key, parameter in net.named_parameters():
        gap = (parameter.grad - gradients[key].grad).norm()
        assert gap <= GRADIENTS * gradients[key].grad.norm(), key
    for each in (model, net):
        each.zero_grad()


@torch.no_grad()
def test_transformers_rounds_in_bfloat16_where_we_do(pairs):
    """Autocast of both: no nearer than the rounding, but not further either."""
    model, net = pairs("qwen3")
    tokens = texts(2, LENGTH, 29)
    exact = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(tokens).logits.float()
        ours = net.logits(net.hidden(tokens, attention_mask=Causal())).float()
    assert ours.isfinite().all()
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


@pytest.mark.parametrize(
    ("parameters", "sizes", "more"),
    [
        (134_515_008, (49_152, 576, 30, 9, 3, 64, 1536), {}),  # SmolLM2-135M
        (494_032_768, (151_936, 896, 24, 14, 2, 64, 4864), {"qkv_bias": True}),  # Qwen2.5-0.5B
        (596_049_920, (151_936, 1024, 28, 16, 8, 128, 3072), {"qk_norm": True}),  # Qwen3-0.6B
    ],
)
def test_published_models_have_as_many_parameters(parameters, sizes, more):
    names = [field.name for field in dataclasses.fields(LlamaShape)][: len(sizes)]
    with torch.device("meta"):
        net = Llama(**dict(zip(names, sizes, strict=True)), tied=True, **more)
    assert sum(p.numel() for p in net.parameters()) == parameters


@torch.no_grad()
def test_positions_far_out_keep_their_distances():
    """Rotary attention knows differences alone: angles are made in float64."""
    net, tokens = small_llama(), texts(1, 8, VOCAB)
    near = net.hidden(tokens, attention_mask=Causal())
    far = net.hidden(tokens, attention_mask=Causal(), positions=torch.arange(8) + 100_000)
    assert_within(far, near, 1e-5)


def noised(x0, share=0.5):
    masked = torch.rand(x0.shape, generator=torch.Generator().manual_seed(3)) < share
    return x0.masked_fill(masked, VOCAB - 1)


@pytest.mark.parametrize("size", [1, 4, 12])
@torch.no_grad()
def test_two_streams_are_block_by_block(size):
    net, x0 = small_llama(), texts(2, LENGTH, VOCAB)
    x_t = noised(x0)
    both = net.hidden(torch.cat([x_t, x0], 1), attention_mask=BlockDiffusion(size))
    for start in range(0, LENGTH, size):
        stop = start + size
        tokens = torch.cat([x0[:, :start], x_t[:, start:stop]], 1)
        alone = net.hidden(tokens, attention_mask=BlockCausal(size))
        assert_within(both[:, start:stop], alone[:, start:], 1e-5)


@pytest.mark.parametrize("window", [8, LENGTH])
@torch.no_grad()
def test_cached_is_uncached(window):
    net, tokens = small_llama(), texts(3, LENGTH, VOCAB)
    mask = BlockCausal(4, window)
    whole = net.hidden(tokens, attention_mask=mask)
    cache, found = net.new_cache(3, window, 4), []
    assert cache.keys[0].shape[2:] == (2, 8)  # heads of keys alone
    for start in range(0, LENGTH, 4):
        part = tokens[:, start : start + 4]
        found.append(net.hidden(part, attention_mask=cache.attention_mask, cache=cache))
        cache = cache.commit(4)
    assert_within(torch.cat(found, 1), whole, 1e-5)


@torch.no_grad()
def test_rows_of_a_cache_may_stand_at_different_places():
    net, tokens = small_llama(), texts(2, 12, VOCAB)
    cache = net.new_cache(2, 16, 4)
    for start in (0, 4):
        net.hidden(tokens[:, start : start + 4], attention_mask=cache.attention_mask, cache=cache)
        cache = cache.commit(torch.tensor([4, 4 if start else 0]))
    ours = net.hidden(tokens[:, 8:], attention_mask=cache.attention_mask, cache=cache)
    kept = [tokens[:1], tokens[1:, 4:]]  # the second row has committed the second block alone
    for row, text in enumerate(kept):
        alone = net.hidden(text, attention_mask=BlockCausal(4))[:, -4:]
        assert_within(ours[row : row + 1], alone, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_the_clean_half_made_once_gives_what_the_whole_gives(packed):
    net, x0 = small_llama(), texts(2, LENGTH, VOCAB)
    ids = torch.arange(LENGTH).expand(2, -1) // 8 if packed else None
    asked = {}
    if packed:
        place = positions(ids).repeat(1, 2)
        asked = {"document_ids": ids.repeat(1, 2), "positions": place}
    x_t = noised(x0)
    both = net.hidden(torch.cat([x_t, x0], 1), attention_mask=BlockDiffusion(4), **asked)
    half = clean_half(net, x0, 4, torch.float32, ids)
    ours = net.hidden(x_t, attention_mask=half.attention_mask, cache=half)
    assert_within(ours, both, 1e-5)


@pytest.mark.parametrize("mask", [Causal(), Full(), BlockCausal(4)], ids=repr)
@torch.no_grad()
def test_packed_documents_are_rows_of_their_own(mask):
    net, tokens = small_llama(), texts(1, LENGTH, VOCAB)
    ids = (torch.arange(LENGTH) >= 8).long()[None]
    packed = net.hidden(tokens, attention_mask=mask, document_ids=ids, positions=positions(ids))
    for part in (slice(0, 8), slice(8, LENGTH)):
        assert_within(packed[:, part], net.hidden(tokens[:, part], attention_mask=mask), 1e-5)


@pytest.mark.parametrize(
    ("mask", "backend"),
    [
        (Causal(), "sdpa"),
        (BlockDiffusion(4), "sdpa"),
        (BlockDiffusion(4, 2), "sdpa"),
        (BlockDiffusion(4), "flex"),
    ],
    ids=repr,
)
@torch.no_grad()
def test_backends_agree_with_fewer_heads_of_keys(mask, backend):
    """As many heads, each pair of them alike, and the plain form."""
    tokens = texts(2, LENGTH * (mask.views + 1 if isinstance(mask, BlockDiffusion) else 1), VOCAB)
    few = small_llama(attn_backend=backend)
    many = small_llama(n_kv_heads=4)
    state = few.state_dict()
    for name in [n for n in state if ".k_proj." in n or ".v_proj." in n]:
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict(state)
    ours = few.hidden(tokens, attention_mask=mask)
    assert_within(ours, many.hidden(tokens, attention_mask=mask), 1e-5)


@torch.no_grad()
def test_rows_that_are_read_and_states():
    net, tokens = small_llama(), texts(2, LENGTH, VOCAB)
    whole = net.hidden(tokens, attention_mask=Causal())
    read = torch.tensor([3, 0, 40])
    some = net.hidden(tokens, attention_mask=Causal(), read=read)
    assert_within(some, whole.flatten(0, 1)[read], 1e-6)
    with net.states() as states:
        net.hidden(tokens, attention_mask=Causal())
    assert len(states) == 4
    assert torch.equal(states[0], net.model.embed_tokens(tokens))
    assert torch.equal(states[-1], whole)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_frozen_answers_are_equal(tied):
    net, tokens = small_llama(tied=tied), texts(2, LENGTH, VOCAB)
    plain = net.logits(net.hidden(tokens, attention_mask=Causal()))
    net.freeze(torch.float32)  # pads the head: some CPUs then add up in another order
    ours = net.logits(net.hidden(tokens, attention_mask=Causal()))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    read = torch.arange(2 * LENGTH)
    ask = asker(net, tokens, block_size=LENGTH, mask_id=VOCAB - 1)
    full = net.logits(net.hidden(tokens, attention_mask=Full())).flatten(0, 1)
    full[:, VOCAB - 1] = -torch.inf
    found = ask(tokens, read, lambda log_probs, rows: log_probs.clone())
    torch.testing.assert_close(found, full.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_compiled_is_plain(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiling = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(network.torch, "compile", compiling)
    results = []
    for by_compiler in (False, True):
        net = small_llama(compile=by_compiler)
        read, mask = torch.arange(5), BlockDiffusion(4)
        hidden = net.hidden(texts(2, LENGTH, VOCAB), attention_mask=mask, read=read)
        hidden.square().sum().backward()
        results.append((hidden.detach(), net.blocks[0].self_attn.k_proj.weight.grad))
    torch._dynamo.reset()
    assert len(graphs) == 2  # one for all layers, one for the last
    for plain, ours in zip(*results, strict=True):
        assert (ours - plain).norm() <= GRADIENTS * plain.norm()


def test_no_noise_level_enters():
    net, tokens = small_llama(), texts(1, 4, VOCAB)
    with pytest.raises(ValueError, match="takes no noise level"):
        net.hidden(tokens, torch.ones(1), attention_mask=Full())
    hidden = net.hidden(tokens, attention_mask=Full())
    with pytest.raises(ValueError, match="takes no noise level"):
        net.logits(hidden, torch.ones(1))


def test_a_sliding_window_refuses_what_reaches_beyond_it():
    net = small_llama(sliding_window=8)
    net.hidden(texts(1, 8, VOCAB), attention_mask=Causal())
    net.hidden(texts(1, 16, VOCAB), attention_mask=BlockDiffusion(4))
    for length, mask in ((9, Causal()), (18, BlockDiffusion(3))):
        with pytest.raises(ValueError, match="sliding window of 8 tokens"):
            net.hidden(texts(1, length, VOCAB), attention_mask=mask)
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        net.new_cache(1, 12, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rope_type": "yarn"}, "rope_type=yarn is not supported"),
        ({"rope_high_freq_factor": 1.0}, "must be above rope_low_freq_factor=1.0"),
    ],
)
def test_shapes_that_are_none(change, message):
    good = dataclasses.asdict(small_llama().shape)
    assert not list(LlamaShape(**good).problems())
    with pytest.raises(ValueError, match=message):
        Llama(**(good | change))
