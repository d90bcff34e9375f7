"""The cache is exact: a pass over it gives what one pass over the whole text gives.

Beyond the window "the whole text" is one pass under BlockCausal(block_size, window): deep keys
carry what they saw when they were made. Recomputing the last `window` tokens from scratch is
another computation (the last test of the recordings shows the difference).
"""

import pytest
import torch
from conftest import load, load_json
from networks import BLOCKWISE, CHECKPOINTS, LOGITS, assert_within, recorded, small, texts

from models.dit import DiT
from models.masks import BlockCausal, BlockDiffusion, Causal

VOCAB = 7


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def whole(net, tokens, mask):
    """Every state of a text by one pass without a cache."""
    return net.hidden(tokens, attention_mask=mask)


def follow(net, clean, noisy, cache):
    """Block after block: ask about the noisy one, then commit the clean one. Both answers."""
    mask = cache.attention_mask
    asked, kept = [], []
    for start in range(0, clean.shape[1], mask.block_size):
        block = slice(start, start + mask.block_size)
        asked.append(net.hidden(noisy[:, block], attention_mask=mask, cache=cache))
        kept.append(net.hidden(clean[:, block], attention_mask=mask, cache=cache))
        cache = cache.commit(mask.block_size)
    return torch.cat(asked, 1), torch.cat(kept, 1)


def one_pass_each(net, clean, noisy, mask):
    """What `follow` must give: for each block a pass over everything before it and itself."""
    out = []
    for start in range(0, clean.shape[1], mask.block_size):
        stop = start + mask.block_size
        tokens = torch.cat([clean[:, :start], noisy[:, start:stop]], 1)
        out.append(whole(net, tokens, mask)[:, start:stop])
    return torch.cat(out, 1)


# ---- recordings


def replay(net, clean, noisy, golden, window, block_size, prefix=""):
    """Compare every recorded answer of the reference's cache with ours and with one full pass."""
    mask = BlockCausal(block_size, window)
    cache = net.new_cache(len(clean), window, block_size)
    asked, kept = (net.logits(x) for x in follow(net, clean, noisy, cache))
    full = net.logits(one_pass_each(net, clean, noisy, mask))
    compared = 0
    for k in range(clean.shape[1] // block_size):
        block = slice(k * block_size, (k + 1) * block_size)
        for kind, ours in (("query", asked), ("store", kept)):
            theirs = golden.get(f"{prefix}{k:02d}.{kind}_logits")
            if theirs is not None:
                assert_within(ours[:, block], theirs, LOGITS, f"block {k} {kind}")
                compared += 1
        assert_within(full[:, block], golden[f"{prefix}{k:02d}.query_logits"], LOGITS, f"full {k}")
    assert compared > clean.shape[1] // block_size


@pytest.mark.parametrize("name", BLOCKWISE)
@torch.no_grad()
def test_cached_logits_are_the_recorded_ones_also_beyond_the_window(name):
    golden = load(f"forward/kv_{name}.safetensors")
    window, block_size = int(golden["max_seqlen"]), CHECKPOINTS[name]["block_size"]
    assert golden["clean"].shape[1] > window
    replay(recorded(name), golden["clean"], golden["noisy"], golden, window, block_size)


@torch.no_grad()
def test_the_exported_models_cache_is_ours():
    golden, config = load("hf_export/golden.safetensors"), load_json("hf_export/config.json")
    net = DiT(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_dim"],
        cond_dim=config["cond_dim"],
        n_blocks=config["n_blocks"],
        n_heads=config["n_heads"],
        dropout=0.0,
    ).eval()
    weights = load("hf_export/model.safetensors")
    net.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    )
    window, block_size = config["model_length"], config["block_size"]
    replay(net, golden["kv.clean"], golden["kv.noisy"], golden, window, block_size, prefix="kv.")


@pytest.mark.parametrize("name", BLOCKWISE)
@torch.no_grad()
def test_recomputing_the_window_from_scratch_is_something_else(name):
    """As noted in kv_notes.json: the two readings of "window" differ once it slides."""
    golden = load(f"forward/kv_{name}.safetensors")
    net, block_size, window = recorded(name), CHECKPOINTS[name]["block_size"], golden["max_seqlen"]
    clean, noisy = golden["clean"], golden["noisy"]
    gap = 0.0
    for start in range(window, clean.shape[1], block_size):
        stop = start + block_size
        tokens = torch.cat([clean[:, :start], noisy[:, start:stop]], 1)[:, stop - window :]
        logits = net.logits(net.hidden(tokens, attention_mask=BlockCausal(block_size)))[
            :, -block_size:
        ]
        theirs = golden[f"{start // block_size:02d}.query_logits"]
        gap = max(gap, float((logits - theirs).abs().max()))
    assert gap > 1e-3


# ---- cached = uncached = training form


@pytest.mark.parametrize("block_size", [1, 2, 4, 12])
@torch.no_grad()
def test_training_form_equals_sampling_form_equals_cache(block_size):
    """What the network learns on [x_t ; x0] is what a sampler asks it, with a cache or without."""
    net, length = small(VOCAB), 12
    x0, x_t = texts(3, length, VOCAB, seed=1), texts(3, length, VOCAB, seed=2)
    trained = net.hidden(torch.cat([x_t, x0], 1), attention_mask=BlockDiffusion(block_size))
    cache = net.new_cache(3, length, block_size)
    assert_same(follow(net, x0, x_t, cache)[0], trained)
    assert_same(one_pass_each(net, x0, x_t, BlockCausal(block_size)), trained)


@pytest.mark.parametrize(("block_size", "window"), [(1, 1), (1, 4), (2, 4), (4, 4), (4, 16)])
@torch.no_grad()
def test_the_window_slides_over_forty_blocks(block_size, window):
    net, length = small(VOCAB), 40 * block_size
    tokens = texts(2, length, VOCAB)
    asked, kept = follow(net, tokens, tokens, net.new_cache(2, window, block_size))
    expected = whole(net, tokens, BlockCausal(block_size, window))
    assert_same(kept, expected)
    assert_same(asked, expected)


@torch.no_grad()
def test_the_causal_network_continues_token_by_token():
    net, tokens = small(VOCAB, adaln=False), texts(2, 20, VOCAB)
    for window, mask in ((20, Causal()), (6, Causal(6))):
        _, kept = follow(net, tokens, tokens, net.new_cache(2, window, 1))
        assert_same(kept, whole(net, tokens, mask))


# ---- a pass that is not committed leaves no trace


@pytest.mark.parametrize("committed", [0, 8, 16])
@torch.no_grad()
def test_questions_leave_no_trace(committed):
    net, mask = small(VOCAB), BlockCausal(4, 8)
    tokens = texts(2, committed + 4, VOCAB)
    cache = net.new_cache(2, 8, 4)
    for start in range(0, committed, 4):
        net.hidden(tokens[:, start : start + 4], attention_mask=mask, cache=cache)
        cache = cache.commit(4)
    last = tokens[:, committed:]
    quiet = net.hidden(last, attention_mask=mask, cache=cache)
    for seed in range(5):
        net.hidden(
            texts(2, 4 if seed % 2 else 8, VOCAB, seed=seed), attention_mask=mask, cache=cache
        )
    assert_same(net.hidden(last, attention_mask=mask, cache=cache), quiet)
    assert cache.committed.tolist() == [committed] * 2


# ---- several blocks in a pass


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("window_blocks", [1, 2, 5])
@torch.no_grad()
def test_a_commit_rides_along_with_the_next_question(block_size, window_blocks):
    """One pass over the finished block and the next noisy one: 2K tokens, of which K are kept."""
    net, blocks = small(VOCAB), 9
    mask = BlockCausal(block_size, window_blocks * block_size)
    clean = texts(2, blocks * block_size, VOCAB, seed=1)
    noisy = texts(2, blocks * block_size, VOCAB, seed=2)
    cache = net.new_cache(2, mask.window, block_size)
    expected = one_pass_each(net, clean, noisy, mask)
    for start in range(0, (blocks - 1) * block_size, block_size):
        middle, stop = start + block_size, start + 2 * block_size
        tokens = torch.cat([clean[:, start:middle], noisy[:, middle:stop]], 1)
        hidden = net.hidden(tokens, attention_mask=mask, cache=cache)
        assert_same(hidden[:, block_size:], expected[:, middle:stop])
        cache = cache.commit(block_size)


@pytest.mark.parametrize("length", [4, 8, 12, 20])
@torch.no_grad()
def test_a_prompt_may_fill_the_cache_in_one_pass(length):
    net, window = small(VOCAB), 16
    tokens = texts(2, length + 4, VOCAB)
    cache = net.new_cache(2, window, 4)
    mask = cache.attention_mask
    expected = whole(net, tokens, mask)
    assert_same(
        net.hidden(tokens[:, :length], attention_mask=mask, cache=cache), expected[:, :length]
    )
    cache = cache.commit(length)
    assert_same(
        net.hidden(tokens[:, length:], attention_mask=mask, cache=cache), expected[:, length:]
    )


@pytest.mark.parametrize("committed", [0, 4, 8, 24])
@pytest.mark.parametrize("new", [4, 8, 12])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@torch.no_grad()
def test_a_pass_is_exact_or_refused(committed, new, ragged):
    """A long pass behind a full window would overwrite keys that its first tokens must see."""
    net, window, block_size = small(VOCAB), 8, 4
    tokens = texts(2, committed + new, VOCAB)
    cache = net.new_cache(2, window, block_size)
    if ragged:
        cache = cache.reset(torch.tensor([False, False]))
    mask = cache.attention_mask
    for start in range(0, committed, block_size):
        net.hidden(tokens[:, start : start + block_size], attention_mask=mask, cache=cache)
        cache = cache.commit(block_size)
    needed = min(committed, window - block_size) + new
    if needed > window + block_size:
        with pytest.raises(ValueError, match=f"cannot take {new} tokens in one pass"):
            net.hidden(tokens[:, committed:], attention_mask=mask, cache=cache)
    else:
        hidden = net.hidden(tokens[:, committed:], attention_mask=mask, cache=cache)
        assert_same(hidden, whole(net, tokens, mask)[:, committed:])


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@torch.no_grad()
def test_a_count_inside_a_block_still_obeys_the_rule(ragged):
    """Committed 2 of a block of 4: the next tokens finish it and begin the next one."""
    net, mask = small(VOCAB), BlockCausal(4, 12)
    tokens = texts(2, 6, VOCAB)
    cache = net.new_cache(2, 12, 4)
    if ragged:
        cache = cache.reset(torch.tensor([False, False]))
    net.hidden(tokens[:, :2], attention_mask=mask, cache=cache)
    cache = cache.commit(2)
    hidden = net.hidden(tokens[:, 2:], attention_mask=mask, cache=cache)
    # tokens 2, 3 share a block with the committed ones, which had seen two tokens when they were
    # made; so compare with a cache fed the same way under the general mask
    first = net.hidden(tokens[:, 2:4], attention_mask=mask, cache=cache)
    assert_same(hidden[:, :2], first)


# ---- rows at different places


@torch.no_grad()
def test_rows_may_be_at_different_places():
    net, mask = small(VOCAB), BlockCausal(4, 8)
    tokens = texts(3, 40, VOCAB)
    counts = torch.tensor([0, 0, 0])
    cache = net.new_cache(3, 8, 4)
    expected = whole(net, tokens, mask)
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        places = counts[:, None] + torch.arange(4)
        hidden = net.hidden(tokens.gather(1, places), attention_mask=mask, cache=cache)
        rows = torch.arange(3)[:, None]
        assert_same(hidden, expected[rows, places])
        step = 4 * torch.randint(2, (3,), generator=generator)
        cache, counts = cache.commit(step), counts + step
    assert len(set(counts.tolist())) > 1
    assert torch.equal(cache.committed, counts)


@torch.no_grad()
def test_a_reset_row_starts_a_new_text_and_the_others_go_on():
    net, mask = small(VOCAB), BlockCausal(4, 8)
    old, new = texts(2, 24, VOCAB, seed=1), texts(2, 12, VOCAB, seed=2)
    cache = net.new_cache(2, 8, 4)
    for start in range(0, 12, 4):
        net.hidden(old[:, start : start + 4], attention_mask=mask, cache=cache)
        cache = cache.commit(4)
    cache = cache.reset(torch.tensor([False, True]))
    assert cache.committed.tolist() == [12, 0]
    kept = []
    for start in range(0, 12, 4):
        tokens = torch.stack([old[0, 12 + start : 16 + start], new[1, start : start + 4]])
        kept.append(net.hidden(tokens, attention_mask=mask, cache=cache))
        cache = cache.commit(4)
    kept = torch.cat(kept, 1)
    assert_same(kept[0], whole(net, old[:1], mask)[0, 12:])
    assert_same(kept[1], whole(net, new[1:], mask)[0])


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(
    "rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=["indices", "booleans"]
)
@torch.no_grad()
def test_selected_rows_continue_as_if_they_had_been_alone(rows, ragged):
    net, mask = small(VOCAB), BlockCausal(4, 8)
    tokens = texts(3, 20, VOCAB)
    cache = net.new_cache(3, 8, 4)
    counts = torch.zeros(3, dtype=torch.int64)
    step = torch.tensor([0, 4, 4]) if ragged else 4
    for kept in (4, 4, 4, step):
        new = tokens.gather(1, counts[:, None] + torch.arange(4))
        net.hidden(new, attention_mask=mask, cache=cache)
        cache, counts = cache.commit(kept), counts + kept
    cache = cache.select(rows)
    assert torch.equal(cache.committed, counts[rows])
    places = counts[rows][:, None] + torch.arange(4)
    hidden = net.hidden(tokens[rows].gather(1, places), attention_mask=mask, cache=cache)
    expected = whole(net, tokens, mask)[rows]
    assert_same(hidden, expected[torch.arange(2)[:, None], places])


# ---- cost and refusals


def test_a_cache_costs_its_window_and_not_the_text():
    net = small(VOCAB)
    cache = net.new_cache(2, 8, 4)
    width, layers = 16, len(net.blocks)
    assert cache.bytes == 2 * (8 + 4) * width * 2 * layers * 4
    assert cache.commit(10_000).bytes == cache.bytes


@torch.no_grad()
def test_the_rule_of_a_pass_must_be_the_caches():
    net = small(VOCAB)
    with pytest.raises(ValueError, match=r"made for BlockCausal\(block_size=4, window=8\)"):
        net.hidden(texts(1, 4, VOCAB), attention_mask=BlockCausal(4), cache=net.new_cache(1, 8, 4))


@torch.no_grad()
def test_reading_some_rows_works_with_a_cache():
    net = small(VOCAB)
    cache = net.new_cache(2, 8, 4)
    tokens = texts(2, 4, VOCAB)
    full = net.hidden(tokens, attention_mask=cache.attention_mask, cache=cache)
    read = torch.tensor([6, 1])
    some = net.hidden(tokens, attention_mask=cache.attention_mask, cache=cache, read=read)
    assert_same(some, full.flatten(0, 1)[read])


@torch.no_grad()
def test_a_half_precision_cache_is_close():
    net, tokens = small(VOCAB), texts(2, 16, VOCAB)
    cache = net.new_cache(2, 16, 4, dtype=torch.bfloat16)
    asked, _ = follow(net, tokens, tokens, cache)
    assert_within(asked, whole(net, tokens, cache.attention_mask), 0.03)
