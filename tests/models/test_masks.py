"""Who may look at whom."""

import re

import pytest
import torch
from conftest import load

from models.masks import BlockCausal, BlockDiffusion, Causal, Full

RECORDED = load("forward/masks.safetensors")


def table(mask, queries, keys=None):
    keys = queries if keys is None else keys
    return mask.allowed(torch.arange(queries)[:, None], torch.arange(keys)[None], keys)


@pytest.mark.parametrize("key", sorted(RECORDED))
def test_the_training_rule_is_as_recorded(key):
    length, block_size = map(int, re.fullmatch(r"n(\d+)_b(\d+)", key).groups())
    assert torch.equal(table(BlockDiffusion(block_size), 2 * length), RECORDED[key])


@pytest.mark.parametrize(("length", "block_size"), [(6, 1), (6, 2), (6, 3), (6, 6), (7, 3)])
def test_the_training_rule_says_in_words_what_it_says_in_tensors(length, block_size):
    mask = table(BlockDiffusion(block_size), 2 * length)
    for q in range(2 * length):
        for k in range(2 * length):
            block_q, block_k = q % length // block_size, k % length // block_size
            if q < length:  # a noised query: its own block noised, the earlier ones clean
                seen = block_q == block_k if k < length else block_k < block_q
            else:  # a clean query: clean blocks up to its own
                seen = k >= length and block_k <= block_q
            assert mask[q, k] == seen, (q, k)


@pytest.mark.parametrize(("length", "block_size"), [(6, 1), (6, 2), (6, 6), (7, 3)])
def test_each_of_two_views_sees_what_it_would_see_alone(length, block_size):
    """Itself and the clean part; the other view nothing."""
    mask = table(BlockDiffusion(block_size, views=2), 3 * length)
    alone = table(BlockDiffusion(block_size), 2 * length)
    parts = torch.arange(3 * length).split(length)
    for view in parts[:2]:
        both = torch.cat([view, parts[2]])
        assert torch.equal(mask[both][:, both], alone)
    assert not mask[parts[0]][:, parts[1]].any()
    assert not mask[parts[1]][:, parts[0]].any()


def test_a_noised_block_sees_what_sampling_shows_it():
    """A block of x_t in the training form sees as many tokens as under the block-causal rule."""
    length, block_size = 12, 3
    trained = table(BlockDiffusion(block_size), 2 * length)[:length]
    sampled = table(BlockCausal(block_size), length)
    folded = trained[:, :length] | trained[:, length:]
    assert not (trained[:, :length] & trained[:, length:]).any()
    assert torch.equal(folded, sampled)


@pytest.mark.parametrize("window", [4, 8, None])
def test_a_window_counts_whole_blocks_with_the_querys_own(window):
    mask = table(BlockCausal(4, window), 20)
    for q in range(20):
        first = 0 if window is None else max(0, (q // 4 + 1) * 4 - window)
        assert mask[q].nonzero()[:, 0].tolist() == list(range(first, (q // 4 + 1) * 4))


def test_causal_is_block_causal_with_blocks_of_one():
    assert Causal() == BlockCausal(1)
    assert Causal(5) == BlockCausal(1, 5)
    assert torch.equal(table(Causal(), 9), torch.ones(9, 9, dtype=torch.bool).tril())


def test_full_hides_nothing():
    assert table(Full(), 5).all()
    assert table(Full(), 5).shape == (5, 5)


def test_one_block_of_the_training_rule_sees_all_of_itself():
    assert table(BlockDiffusion(6), 12)[:6, :6].all()
    assert not table(BlockDiffusion(6), 12)[:6, 6:].any()


def test_a_window_must_hold_whole_blocks():
    with pytest.raises(ValueError, match="10 tokens is not a multiple of block_size=4"):
        BlockCausal(4, 10)
