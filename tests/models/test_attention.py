"""Backends compute the same numbers, and texts packed into one row do not see each other."""

import pytest
import torch
import torch.nn.functional as F
from networks import GRADIENTS, assert_within, small, texts

from models import attention
from models.attention import BACKENDS, CHUNK_TOKENS, dense, get_backend, sdpa
from models.masks import BlockCausal, BlockDiffusion, Causal, Full

CPU = torch.device("cpu")
RULES = [
    Full(),
    Causal(),
    Causal(6),
    BlockCausal(4),
    BlockCausal(4, 8),
    BlockDiffusion(1),
    BlockDiffusion(4),
    BlockDiffusion(12),
    BlockDiffusion(4, views=2),
]


def queries_keys_values(queries, keys, seed=0, batch=2, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 2, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 8)]
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


def by_hand(mask, q, k, v, document_ids=None):
    """Attention as a sum over the tokens seen, in float64."""
    keys = k.shape[2]
    allowed = mask.allowed(torch.arange(q.shape[2])[:, None], torch.arange(keys)[None], keys)
    allowed = allowed.expand(len(q), -1, -1)
    if document_ids is not None:
        allowed = allowed & (document_ids[:, : q.shape[2], None] == document_ids[:, None, :])
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.exp() * allowed[:, None]
    return (weights / weights.sum(-1, keepdim=True)) @ v.double()


def asked_rows(mask, keys):
    """Under the training rule either all parts ask or what is noised alone."""
    return (keys, mask.noised(keys)) if isinstance(mask, BlockDiffusion) else (keys,)


def packed(mask, keys, batch=2):
    """Three texts of uneven length in a row, other borders in each row; for each part the same."""
    parts = mask.views + 1 if isinstance(mask, BlockDiffusion) else 1
    length = keys // parts
    ids = torch.stack([(torch.arange(length) * 3 + 2 * row) // length for row in range(batch)])
    return torch.cat([ids] * parts, 1)


@pytest.mark.parametrize("with_documents", [False, True], ids=["one text", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("mask", RULES, ids=repr)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_backend_computes_what_the_rule_says(mask, backend, with_documents):
    keys = 24
    document_ids = packed(mask, keys) if with_documents else None
    for queries in asked_rows(mask, keys):
        q, k, v = queries_keys_values(queries, keys)
        attend = get_backend(backend)(mask, queries, keys, document_ids, CPU)
        expected = by_hand(mask, q, k, v, document_ids).float()
        torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("with_documents", [False, True], ids=["one text", "packed"])
@pytest.mark.parametrize(
    ("length", "block_size", "chunk"),
    [
        (24, 4, 8),
        (24, 1, 8),
        (20, 4, 8),  # the last chunk is short
        (21, 3, 8),  # chunks of two blocks: 6 tokens
        (24, 12, 8),  # a block is longer than a chunk
        (24, 24, 8),
        (26, 4, 8),  # the last block is short as well
        (2 * CHUNK_TOKENS + 12, 4, CHUNK_TOKENS),
    ],
)
def test_split_attention_equals_dense_forward_and_backward(
    length, block_size, chunk, with_documents, views, monkeypatch
):
    monkeypatch.setattr(attention, "CHUNK_TOKENS", chunk)
    mask, keys = BlockDiffusion(block_size, views), (1 + views) * length
    document_ids = packed(mask, keys) if with_documents else None
    for queries in asked_rows(mask, keys):
        results = []
        for prepare in (dense, sdpa):
            tensors = queries_keys_values(queries, keys, requires_grad=True)
            out = prepare(mask, queries, keys, document_ids, CPU)(*tensors)
            generator = torch.Generator().manual_seed(1)
            out.backward(torch.randn(out.shape, generator=generator))
            results.append([out.detach(), *(x.grad for x in tensors)])
        assert_within(results[1][0], results[0][0], 1e-5)
        for ours, plain in zip(results[1][1:], results[0][1:], strict=True):
            assert (ours - plain).norm() <= GRADIENTS * plain.norm()


def test_split_attention_computes_about_a_quarter(monkeypatch):
    """Counted in pairs handed to the kernel, at 16 chunks: (half a square + the diagonal) / 4."""
    pairs = []
    plain = F.scaled_dot_product_attention

    def counting(q, k, v, attn_mask=None):
        pairs.append(q.shape[2] * k.shape[2])
        return plain(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(attention, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counting)
    attend = sdpa(BlockDiffusion(4), 128, 128, None, CPU)
    attend(*queries_keys_values(128, 128))
    assert sum(pairs) < 0.31 * 128**2


@pytest.mark.parametrize("mask", RULES, ids=repr)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_the_network_gives_the_same_with_flex_and_sdpa(mask):
    one, other = small(attn_backend="flex"), small(attn_backend="sdpa")
    tokens = texts(2, 24, 7)
    assert_within(
        one.hidden(tokens, attention_mask=mask), other.hidden(tokens, attention_mask=mask), 1e-5
    )


@pytest.mark.parametrize("mask", [Full(), Causal(), BlockCausal(4), BlockDiffusion(4)], ids=repr)
@torch.no_grad()
def test_packed_texts_do_not_leak_into_each_other(mask):
    """Whatever stands in another segment (a second document, padding), a text's states stay."""
    net, length = small(), 12
    ids = torch.tensor([[0] * 5 + [1] * 7, [3] * 9 + [0] * 3])
    tokens, other = texts(2, length, 7, seed=1), texts(2, length, 7, seed=2)
    mine = ids == ids[:, :1]
    changed = torch.where(mine, tokens, other)
    assert (changed != tokens).any()
    if isinstance(mask, BlockDiffusion):
        noised, ids = texts(2, length, 7, seed=3), torch.cat([ids, ids], 1)
        noised_changed = torch.where(mine, noised, texts(2, length, 7, seed=4))
        tokens, changed = torch.cat([noised, tokens], 1), torch.cat([noised_changed, changed], 1)
    before = net.hidden(tokens, attention_mask=mask, document_ids=ids)
    after = net.hidden(changed, attention_mask=mask, document_ids=ids)
    assert_within(after[mine], before[mine], 1e-6)
    leaking = net.hidden(changed, attention_mask=mask)
    if mask != Causal():
        assert not torch.allclose(before[mine], leaking[mine])


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=repr)
@torch.no_grad()
def test_a_packed_text_is_the_text_alone(mask):
    """Positions differ by a shift, which rotary attention does not see."""
    net, tokens = small(), texts(1, 12, 7)
    ids = torch.tensor([[0] * 5 + [1] * 7])
    together = net.hidden(tokens, attention_mask=mask, document_ids=ids)
    apart = [net.hidden(part, attention_mask=mask) for part in (tokens[:, :5], tokens[:, 5:])]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_refuses_what_its_entry_denies(name):
    backend, ids = BACKENDS[name], torch.zeros(1, 8, dtype=torch.int64)
    for can, given in (
        (backend.block_masks, (BlockCausal(4), 8, 8, None, CPU)),
        (backend.document_ids, (Full(), 8, 8, ids, CPU)),
    ):
        if can:
            backend.prepare(*given)
            continue
        with pytest.raises(ValueError, match=f"attn_backend={name} cannot apply"):
            backend.prepare(*given)


@pytest.mark.parametrize("mask", [BlockCausal(4), BlockCausal(1, 8), BlockDiffusion(4)], ids=repr)
def test_flash_attention_refuses_what_it_cannot_mask(mask):
    with pytest.raises(ValueError, match=r"flash_attn cannot apply .* use model.attn_backend=sdpa"):
        get_backend("flash_attn")(mask, 8, 8, None, CPU)


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model.attn_backend must be one of .*got 'eager'"):
        get_backend("eager")
