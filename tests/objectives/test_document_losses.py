"""data.pack=documents: the losses and gradients of a packed row are those of each document alone.

`alone` is written out on the plain network: one document, no segments, no positions, no padding.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_within, small, texts

from models import attention
from models.attention import dense, flex, sdpa
from models.masks import BlockDiffusion, Causal, Full
from noise_schedule import EPS, LogLinear
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.clipping import variance
from objectives.corruption import Draws
from objectives.loss import TokenLoss
from objectives.sedd import ScoreEntropy
from objectives.segments import begins, positions

MASK, VOCABULARY, LENGTH = 6, 7, 24
INTERVAL = (EPS, 1.0)
OBJECTIVES = {
    "bamdlm": MaskedDiffusion(MASK, 4, LogLinear()),
    "bamdlm-S1": MaskedDiffusion(MASK, 1, LogLinear()),
    "bamdlm-resample": MaskedDiffusion(MASK, 4, LogLinear(), resample=True),
    "bamdlm-no-bos": MaskedDiffusion(MASK, 4, LogLinear(), ignore_bos=False),
    "mdlm": MaskedDiffusion(MASK, LENGTH, LogLinear()),
    "sedd": ScoreEntropy(MASK, LogLinear()),
    "ar": Autoregressive(MASK),
    "ar-no-bos": Autoregressive(MASK, ignore_bos=True),
}
# where the documents of each row begin and end; between them, and after them, lies padding
LAYOUT = [[(0, 7), (8, 12), (12, 21)], [(0, 1), (4, 8), (8, 24)]]


def segments():
    found = torch.zeros(len(LAYOUT), LENGTH, dtype=torch.int64)
    for row, documents in enumerate(LAYOUT):
        for number, (begin, end) in enumerate(documents, 1):
            found[row, begin:end] = number
    return found


def network(name, prepare=dense):
    net = small(VOCABULARY, adaln=not name.startswith("ar"))
    net.prepare_attention = prepare
    return net


def draws(objective, seed=3):
    generator = torch.Generator().manual_seed(seed)
    blocks = LENGTH // getattr(objective, "block_size", LENGTH)
    rows = len(LAYOUT)
    return Draws(
        time=torch.rand(rows, blocks, generator=generator),
        token=torch.rand(rows, LENGTH, generator=generator),
        count=torch.rand(rows, blocks, generator=generator),
    )


def packed(objective, net, x0, training, ids=None):
    """TokenLoss of the rows with their documents kept apart."""
    ids = segments() if ids is None else ids
    mask = (ids > 0).long()
    if isinstance(objective, Autoregressive):
        return objective.loss(net, x0, mask, training=training, segments=ids)
    return objective.loss(
        net, x0, mask, draws(objective), interval=INTERVAL, training=training, segments=ids
    )


def alone(objective, net, x0, x_t, t, first_counts):
    """(nats of each token [n], how many are counted) of one document x0 [n]; t [n]."""
    x0, x_t = x0[None], x_t[None]
    if isinstance(objective, Autoregressive):
        nats = x0.new_zeros(x0.shape[1], dtype=torch.float32)
        if x0.shape[1] > 1:
            logits = net.logits(net.hidden(x0[:, :-1], rule=Causal()))[0]
            logits = logits.index_fill(1, torch.tensor(MASK), -torch.inf)
            nats = torch.cat([nats[:1], F.cross_entropy(logits, x0[0, 1:], reduction="none")])
        counted = torch.ones(len(nats))
        counted[: 1 if first_counts else 2] = 0
        return nats * counted, counted
    masked, counted = (x_t == MASK)[0], torch.ones(x0.shape[1])
    if not first_counts:
        counted[0] = 0
    if isinstance(objective, ScoreEntropy):
        sigma = -torch.log1p(-t[:1])
        logits = net.logits(net.hidden(x_t, sigma, rule=Full()), sigma)[0]
        ratio = 1 / torch.expm1(sigma)
        score = logits - torch.log(torch.expm1(sigma)) - torch.tensor(VOCABULARY - 1.0).log()
        score = score.index_fill(1, torch.tensor(MASK), -torch.inf)
        picked = score.gather(1, x0.T)[:, 0]
        nats = score.exp().sum(1) - ratio * picked + ratio * (ratio.log() - 1)
        return nats / t / ratio * masked * counted, counted
    if objective.block_size == LENGTH:
        hidden = net.hidden(x_t, rule=Full())
    else:
        hidden = net.hidden(torch.cat([x_t, x0], 1), rule=BlockDiffusion(objective.block_size))
    logits = net.logits(hidden)[0].index_fill(1, torch.tensor(MASK), -torch.inf)
    nats = F.cross_entropy(logits, x0[0], reduction="none") / t * masked
    return nats * counted, counted


def documents_alone(name, net, x0, training):
    """The same figures, [2, L] nats and counted, from each document alone."""
    objective = OBJECTIVES[name]
    nats, counted = torch.zeros(2, LENGTH), torch.zeros(2, LENGTH)
    x_t, t = x0, torch.ones(2, 1)
    if not isinstance(objective, Autoregressive):
        x_t, t = objective.corrupt(x0, draws(objective), INTERVAL, segments())
    t = t.repeat_interleave(LENGTH // t.shape[1], 1)
    for row, documents in enumerate(LAYOUT):
        for begin, end in documents:
            part = (row, slice(begin, end))
            first = training or not objective.ignore_bos
            nats[part], counted[part] = alone(objective, net, x0[part], x_t[part], t[part], first)
            if objective.ignore_bos and not isinstance(objective, Autoregressive):
                assert x_t[row, begin] == x0[row, begin] != MASK
    if isinstance(objective, Autoregressive):  # its loss is about tokens 1 .. L - 1
        nats, counted = nats[:, 1:], counted[:, 1:]
    return nats, counted


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("prepare", [dense, sdpa], ids=["dense", "split"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_packed_row_is_the_sum_of_its_documents(name, prepare, training, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 8)
    x0 = texts(2, LENGTH, MASK)
    net, plain = network(name, prepare), network(name)
    loss = packed(OBJECTIVES[name], net, x0, training)
    nats, counted = documents_alone(name, plain, x0, training)
    assert counted.sum() > 10
    assert torch.equal(loss.counted, counted)
    assert_within(loss.nats, nats.detach(), 1e-5)
    (loss.mean * counted.sum()).backward()
    nats.sum().backward()
    for (key, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm() + 1e-7, key


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_gives_the_same_losses(name):
    x0 = texts(2, LENGTH, MASK)
    loss = packed(OBJECTIVES[name], network(name, flex), x0, training=True)
    nats, _ = documents_alone(name, network(name), x0, training=True)
    assert_within(loss.nats, nats, 1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_changing_one_document_changes_no_other(name):
    x0, ids = texts(2, LENGTH, MASK), segments()
    before = packed(OBJECTIVES[name], network(name), x0, training=True).nats
    changed = torch.where(ids == 2, (x0 + 1) % MASK, x0)
    after = packed(OBJECTIVES[name], network(name), changed, training=True).nats
    mine = ids[:, -before.shape[1] :] == 2
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.equal(before[mine], after[mine])


@pytest.mark.parametrize("padding", [0, MASK])
@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_padding_counts_nowhere_whatever_its_id(name, padding):
    x0, ids = texts(2, LENGTH, MASK), segments()
    loss = packed(OBJECTIVES[name], network(name), x0, training=True)
    other = packed(
        OBJECTIVES[name], network(name), x0.masked_fill(ids == 0, padding), training=True
    )
    assert torch.equal(loss.nats, other.nats)
    assert torch.equal(loss.mean, other.mean)
    ends = ids[:, -loss.nats.shape[1] :] == 0
    assert not loss.nats[ends].any()
    assert not loss.counted[ends].any()


@pytest.mark.parametrize("name", ["bamdlm", "mdlm", "sedd", "ar"])
@torch.no_grad()
def test_one_document_that_fills_the_row_is_a_wrapped_row(name):
    x0, one = texts(2, LENGTH, MASK), torch.ones(2, LENGTH, dtype=torch.int64)
    objective, net = OBJECTIVES[name], network(name)
    apart = packed(objective, net, x0, training=False, ids=one)
    if name == "ar":
        plain = objective.loss(net, x0, one, training=False)
    else:
        plain = objective.loss(net, x0, one, draws(objective), interval=INTERVAL, training=False)
    assert torch.equal(apart.counted, plain.counted)
    assert_within(apart.nats, plain.nats, 1e-5)


def test_positions_restart_with_every_segment():
    ids = torch.tensor([[1, 1, 1, 0, 2, 2, 0, 0], [3, 3, 1, 2, 2, 2, 2, 2]])
    assert positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, 2, 3, 4]]
    assert begins(ids, ids).sum() == 7
    assert begins(ids, None).sum(0).tolist() == [2] + [0] * 7


@pytest.mark.parametrize("name", ["bamdlm", "mdlm", "sedd", "ar"])
@torch.no_grad()
def test_the_network_is_told_positions_that_restart(name):
    """Losses do not show it: rotary attention sees distances alone."""
    net, told = network(name), []
    net.rotary_emb.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    packed(OBJECTIVES[name], net, texts(2, LENGTH, MASK), training=True)
    wanted = positions(segments())
    if name == "bamdlm":
        wanted = torch.cat([wanted, wanted], 1)
    if name == "ar":
        wanted = wanted[:, :-1]
    assert torch.equal(told[0], wanted)


def test_long_rows_of_documents_make_no_mask_of_the_whole_row(monkeypatch):
    """L = 1024: no mask of (2L)^2, and all of them together are about a third of it."""
    sizes = []

    def counting(*arguments, make=attention.dense_mask):
        mask = make(*arguments)
        sizes.append(mask.numel())
        return mask

    monkeypatch.setattr(attention, "dense_mask", counting)
    length = 1024
    ids = (torch.arange(length) // 96)[None]
    sdpa(BlockDiffusion(16), 2 * length, 2 * length, torch.cat([ids, ids], 1), ids.device)
    assert max(sizes) <= (2 * length) ** 2 / 12
    assert sum(sizes) < (2 * length) ** 2 * 0.35


@pytest.mark.parametrize("name", ["bamdlm", "mdlm", "sedd", "ar"])
@torch.no_grad()
def test_the_end_of_an_unwrapped_row_counts_nowhere(name):
    """There the attention mask is the segments: padding is one, the text the other."""
    x0, mask = texts(2, LENGTH, MASK), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, 9:] = 0
    before = packed(OBJECTIVES[name], network(name), x0, training=True, ids=mask)
    other = x0.masked_fill(mask == 0, MASK)
    after = packed(OBJECTIVES[name], network(name), other, training=True, ids=mask)
    assert torch.equal(before.nats, after.nats)
    if name != "ar":
        assert after.counted.sum() == mask.sum()


def test_the_clip_search_sees_no_padding():
    """The variance is that of the blocks alone, each a mean over its real tokens."""
    nats, real = torch.rand(2, 12), torch.ones(2, 12, dtype=torch.int64)
    real[0, 6:], real[1, 11:] = 0, 0
    loss = TokenLoss(nats=nats * real, counted=real, mean=nats.mean())
    blocks = [nats[0, :4], nats[0, 4:6], nats[1, :4], nats[1, 4:8], nats[1, 8:11]]
    means = torch.stack([block.mean() for block in blocks]).double()
    found = variance(loss.block_means(4, real))
    torch.testing.assert_close(found, means.var(), rtol=1e-6, atol=0)
    whole = torch.ones_like(real)
    assert torch.equal(loss.block_means(4, whole), loss.block_means(4))
