"""data.pack=documents: the losses and gradients of a packed row are those of each document alone.

`alone` is written out on the plain network: one document, no ids, no positions, no padding.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_within, small, texts

from models import attention
from models.attention import dense, flex, sdpa
from models.document_ids import begins, positions
from models.masks import BlockDiffusion, Causal, Full
from noise_schedule import EPS, LogLinear
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.clipping import variance
from objectives.corruption import Noise
from objectives.loss import TokenLoss
from objectives.sedd import ScoreEntropy

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


def document_ids():
    found = torch.zeros(len(LAYOUT), LENGTH, dtype=torch.int64)
    for row, documents in enumerate(LAYOUT):
        for number, (begin, end) in enumerate(documents, 1):
            found[row, begin:end] = number
    return found


def network(name, prepare=dense):
    net = small(VOCABULARY, adaln=not name.startswith("ar"))
    net.prepare_attention = prepare
    return net


def noise(objective, seed=3):
    generator = torch.Generator().manual_seed(seed)
    blocks = LENGTH // getattr(objective, "block_size", LENGTH)
    rows = len(LAYOUT)
    return Noise(
        time=torch.rand(rows, blocks, generator=generator),
        token=torch.rand(rows, LENGTH, generator=generator),
        count=torch.rand(rows, blocks, generator=generator),
    )


def packed(objective, net, x0, training, ids=None):
    """TokenLoss of the rows with their documents kept apart."""
    ids = document_ids() if ids is None else ids
    mask = (ids > 0).long()
    if isinstance(objective, Autoregressive):
        return objective.loss(net, x0, mask, training=training, document_ids=ids)
    return objective.loss(
        net, x0, mask, noise(objective), interval=INTERVAL, training=training, document_ids=ids
    )


def alone(objective, net, x0, x_t, t, first_counts):
    """(nats of each token [n], how many are counted) of one document x0 [n]; t [n]."""
    x0, x_t = x0[None], x_t[None]
    if isinstance(objective, Autoregressive):
        nll = x0.new_zeros(x0.shape[1], dtype=torch.float32)
        if x0.shape[1] > 1:
            logits = net.logits(net.hidden(x0[:, :-1], attention_mask=Causal()))[0]
            logits = logits.index_fill(1, torch.tensor(MASK), -torch.inf)
            nll = torch.cat([nll[:1], F.cross_entropy(logits, x0[0, 1:], reduction="none")])
        loss_mask = torch.ones(len(nll))
        loss_mask[: 1 if first_counts else 2] = 0
        return nll * loss_mask, loss_mask
    masked, loss_mask = (x_t == MASK)[0], torch.ones(x0.shape[1])
    if not first_counts:
        loss_mask[0] = 0
    if isinstance(objective, ScoreEntropy):
        sigma = -torch.log1p(-t[:1])
        logits = net.logits(net.hidden(x_t, sigma, attention_mask=Full()), sigma)[0]
        ratio = 1 / torch.expm1(sigma)
        score = logits - torch.log(torch.expm1(sigma)) - torch.tensor(VOCABULARY - 1.0).log()
        score = score.index_fill(1, torch.tensor(MASK), -torch.inf)
        picked = score.gather(1, x0.T)[:, 0]
        nll = score.exp().sum(1) - ratio * picked + ratio * (ratio.log() - 1)
        return nll / t / ratio * masked * loss_mask, loss_mask
    if objective.block_size == LENGTH:
        hidden = net.hidden(x_t, attention_mask=Full())
    else:
        hidden = net.hidden(
            torch.cat([x_t, x0], 1), attention_mask=BlockDiffusion(objective.block_size)
        )
    logits = net.logits(hidden)[0].index_fill(1, torch.tensor(MASK), -torch.inf)
    nll = F.cross_entropy(logits, x0[0], reduction="none") / t * masked
    return nll * loss_mask, loss_mask


def documents_alone(name, net, x0, training):
    """The same figures, [2, L] nats and counted, from each document alone."""
    objective = OBJECTIVES[name]
    nll, loss_mask = torch.zeros(2, LENGTH), torch.zeros(2, LENGTH)
    x_t, t = x0, torch.ones(2, 1)
    if not isinstance(objective, Autoregressive):
        x_t, t = objective.corrupt(x0, noise(objective), INTERVAL, document_ids())
    t = t.repeat_interleave(LENGTH // t.shape[1], 1)
    for row, documents in enumerate(LAYOUT):
        for begin, end in documents:
            part = (row, slice(begin, end))
            first = training or not objective.ignore_bos
            nll[part], loss_mask[part] = alone(objective, net, x0[part], x_t[part], t[part], first)
            if objective.ignore_bos and not isinstance(objective, Autoregressive):
                assert x_t[row, begin] == x0[row, begin] != MASK
    if isinstance(objective, Autoregressive):  # its loss is about tokens 1 .. L - 1
        nll, loss_mask = nll[:, 1:], loss_mask[:, 1:]
    return nll, loss_mask


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("prepare", [dense, sdpa], ids=["dense", "split"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_packed_row_is_the_sum_of_its_documents(name, prepare, training, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 8)
    x0 = texts(2, LENGTH, MASK)
    net, plain = network(name, prepare), network(name)
    loss = packed(OBJECTIVES[name], net, x0, training)
    nll, loss_mask = documents_alone(name, plain, x0, training)
    assert loss_mask.sum() > 10
    assert torch.equal(loss.loss_mask, loss_mask)
    assert_within(loss.nll, nll.detach(), 1e-5)
    (loss.mean * loss_mask.sum()).backward()
    nll.sum().backward()
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
    nll, _ = documents_alone(name, network(name), x0, training=True)
    assert_within(loss.nll, nll, 1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_changing_one_document_changes_no_other(name):
    x0, ids = texts(2, LENGTH, MASK), document_ids()
    before = packed(OBJECTIVES[name], network(name), x0, training=True).nll
    changed = torch.where(ids == 2, (x0 + 1) % MASK, x0)
    after = packed(OBJECTIVES[name], network(name), changed, training=True).nll
    mine = ids[:, -before.shape[1] :] == 2
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.equal(before[mine], after[mine])


@pytest.mark.parametrize("padding", [0, MASK])
@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_padding_counts_nowhere_whatever_its_id(name, padding):
    x0, ids = texts(2, LENGTH, MASK), document_ids()
    loss = packed(OBJECTIVES[name], network(name), x0, training=True)
    other = packed(
        OBJECTIVES[name], network(name), x0.masked_fill(ids == 0, padding), training=True
    )
    assert torch.equal(loss.nll, other.nll)
    assert torch.equal(loss.mean, other.mean)
    ends = ids[:, -loss.nll.shape[1] :] == 0
    assert not loss.nll[ends].any()
    assert not loss.loss_mask[ends].any()


@pytest.mark.parametrize("name", ["bamdlm", "mdlm", "sedd", "ar"])
@torch.no_grad()
def test_one_document_that_fills_the_row_is_a_wrapped_row(name):
    x0, one = texts(2, LENGTH, MASK), torch.ones(2, LENGTH, dtype=torch.int64)
    objective, net = OBJECTIVES[name], network(name)
    apart = packed(objective, net, x0, training=False, ids=one)
    if name == "ar":
        plain = objective.loss(net, x0, one, training=False)
    else:
        plain = objective.loss(net, x0, one, noise(objective), interval=INTERVAL, training=False)
    assert torch.equal(apart.loss_mask, plain.loss_mask)
    assert_within(apart.nll, plain.nll, 1e-5)


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
    wanted = positions(document_ids())
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
    """There the attention mask is the document_ids: padding is one, the text the other."""
    x0, mask = texts(2, LENGTH, MASK), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, 9:] = 0
    before = packed(OBJECTIVES[name], network(name), x0, training=True, ids=mask)
    other = x0.masked_fill(mask == 0, MASK)
    after = packed(OBJECTIVES[name], network(name), other, training=True, ids=mask)
    assert torch.equal(before.nll, after.nll)
    if name != "ar":
        assert after.loss_mask.sum() == mask.sum()


def test_the_clip_search_sees_no_padding():
    """The variance is that of the blocks alone, each a mean over its real tokens."""
    nll, real = torch.rand(2, 12), torch.ones(2, 12, dtype=torch.int64)
    real[0, 6:], real[1, 11:] = 0, 0
    loss = TokenLoss(nll=nll * real, loss_mask=real, per_place=nll.mean())
    blocks = [nll[0, :4], nll[0, 4:6], nll[1, :4], nll[1, 4:8], nll[1, 8:11]]
    means = torch.stack([block.mean() for block in blocks]).double()
    found = variance(loss.block_means(4, real))
    torch.testing.assert_close(found, means.var(), rtol=1e-6, atol=0)
    whole = torch.ones_like(real)
    assert torch.equal(loss.block_means(4, whole), loss.block_means(4))
