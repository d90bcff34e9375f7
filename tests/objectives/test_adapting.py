"""Losses with causal clean halves, shifted labels and an AR loss."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hub_folders import saved, transformers_model
from networks import small, small_llama, texts

from checkpointing.layouts import read_checkpoint
from checkpointing.load import build_network, load_into
from evaluation import estimators
from evaluation.estimators import AskedTexts
from evaluation.network import asker
from models.adaptation import Adaptation
from noise_schedule import LogLinear
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import EXACT, draw_noise
from objectives.counts import UNIFORM
from objectives.sizes import SizeLaw

VOCAB, LENGTH = 7, 12
MASK = VOCAB - 1
FACTOR = 0.3
NETWORKS = {"dit": small, "llama": small_llama}
ADAPTATIONS = [Adaptation(*given) for given in itertools.product([False, True], repeat=2)]
CAUSAL = [adapt for adapt in ADAPTATIONS if adapt.causal]
LAW = SizeLaw((1, 4, 12), (0.25, 0.5, 0.25))
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
each_adaptation = pytest.mark.parametrize("adapt", ADAPTATIONS, ids=repr)


def objective(adapt, size=4, **settings):
    return MaskedDiffusion(MASK, size, LogLinear(), adapt=adapt, **settings)


def noise(rows, size=4, **settings):
    given = {"global_batch": 8, "length": LENGTH, "block_size": size, "antithetic": True}
    return draw_noise(1, 0, rows, **given, **settings)


def batch(kind, adapt, rows=4, x0=None, ar_loss=0.0, size=4, ids=None, numbers=None):
    """(inputs of training, texts): by times, counts, of two views, or of rows that differ in S."""
    x0 = texts(rows, LENGTH, MASK) if x0 is None else x0
    numbers = torch.arange(rows) if numbers is None else numbers
    asked = objective(adapt, size, ar_loss=ar_loss, sizes=LAW if kind == "sizes" else None)
    valid = torch.ones_like(x0)
    valid[0, -2:] = 0
    drawn = noise(numbers, size, sizes=asked.sizes)
    if kind == "views":
        inputs = asked.inputs_by_views(x0, valid, drawn, document_ids=ids)
    elif kind == "times":
        settings = {"interval": (0.1, 1.0), "training": True, "document_ids": ids}
        inputs = asked.loss_inputs(x0, valid, drawn, **settings)
    else:
        inputs = asked.inputs_by_counts(x0, valid, drawn, law=UNIFORM, document_ids=ids)
    return asked.with_ar_loss(inputs, x0, ids), asked, x0


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad()
    return found


# ---- the loss of one pass is what likelihoods ask


@each_network
@each_adaptation
@pytest.mark.parametrize("kind", ["times", "counts", "views", "sizes"])
@torch.no_grad()
def test_the_training_pass_is_the_likelihoods_questions(make, adapt, kind):
    """Block by block, whatever the rows have for blocks and however often they are noised."""
    net = make()
    inputs, asked, x0 = batch(kind, adapt)
    found = asked.compute_loss(net, inputs).nll
    views = inputs.tokens[:, : -x0.shape[1]].unflatten(1, (-1, LENGTH))
    weights = torch.zeros(views.numel())
    weights[inputs.predicted] = inputs.weights
    weights = weights.view(views.shape)
    expected = torch.zeros(x0.shape, dtype=torch.float64)
    sizes = [asked.block_size] * 4 if inputs.block_sizes is None else inputs.block_sizes.tolist()
    for row, size in enumerate(sizes):
        text = x0[row : row + 1]
        ask = asker(net, text, block_size=size, mask_id=MASK, adapt=adapt)
        for view, weight in zip(views[row], weights[row], strict=True):
            some = AskedTexts(text, weight[None] > 0, size, MASK)
            nll = some.surprisal(lambda _, *asked: ask(view[None], *asked), some.scored)  # noqa: B023
            expected[row] += weight * nll[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@each_network
@each_adaptation
def test_gradients_are_those_of_the_whole_output(make, adapt):
    """Rows that are not read matter no more than a loss of weight 0 there."""
    net = make()
    inputs, asked, _ = batch("counts", adapt)
    ours = gradients(net, asked.compute_loss(net, inputs).per_place)
    settings = {"positions": inputs.positions, "document_ids": inputs.document_ids}
    whole = net.hidden(inputs.tokens, attention_mask=inputs.attention_mask, **settings)
    logits = net.logits(whole).flatten(0, 1)[inputs.loss_positions]
    logits = logits.masked_fill(torch.arange(VOCAB) == MASK, -torch.inf)
    nll = F.cross_entropy(logits, inputs.targets, reduction="none")
    plain = gradients(net, (nll * inputs.weights).sum() / inputs.loss_mask.numel())
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@each_adaptation
@pytest.mark.parametrize("law", ["exact", "first_hitting", "greedy", "threshold", "left_to_right"])
@torch.no_grad()
def test_all_texts_of_a_tiny_vocabulary(adapt, law):
    """Laws of samplers sum to 1 over all texts: no prediction sees its own token, or a later block.
    exp of the exact bound sums to less."""
    net, words, size = small_llama(vocab_size=3), 2, 2
    every = torch.tensor(list(itertools.product(range(words), repeat=4)))
    x0 = torch.cat([torch.ones(len(every), 2, dtype=torch.int64), every], 1)
    scored = torch.ones_like(x0, dtype=torch.bool)
    scored[:, :2] = False
    ask = asker(net, x0, block_size=size, mask_id=words, adapt=adapt)
    number = {"number": 0.7} if law == "threshold" else {}
    nll = getattr(estimators, law)(ask, AskedTexts(x0, scored, size, words), **number)
    total = float((-nll.sum(1)).exp().sum())
    if law in ("first_hitting", "left_to_right"):
        assert total == pytest.approx(1, abs=1e-5)
    elif law == "exact":
        assert 0.5 < total < 1 + 1e-6
    else:  # a rule picks places by what it sees, which is the same for all texts so far
        assert total == pytest.approx(1, abs=1e-5)


# ---- what an AR network is worth as it stands


@functools.cache
def transformers_pair(name, folder):
    model = transformers_model(name)
    found = read_checkpoint(saved(folder / name, model))
    net = build_network(found)
    load_into(net, found, use_ema=True, algo="ar")
    return model, net.eval()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_untrained_it_is_the_model_of_transformers(name, tmp_path_factory):
    """S = 1, causal, next: the NLL of every token, by both ways of asking."""
    model, net = transformers_pair(name, tmp_path_factory.mktemp("pair"))
    x0, mask = texts(3, 24, 28), 28
    logits = model(x0[:, :-1]).logits.masked_fill(torch.arange(29) == mask, -torch.inf)
    theirs = F.cross_entropy(logits.flatten(0, 1), x0[:, 1:].flatten(), reduction="none")
    theirs = theirs.view(3, 23)
    adapt = Adaptation(causal=True, shifted=True)
    scored = torch.ones_like(x0, dtype=torch.bool)
    scored[:, 0] = False
    ask = asker(net, x0, block_size=1, mask_id=mask, adapt=adapt)
    found = estimators.exact(ask, AskedTexts(x0, scored, 1, mask))
    torch.testing.assert_close(found[:, 1:].float(), theirs, rtol=1e-4, atol=1e-5)
    one = MaskedDiffusion(mask, 1, LogLinear(), adapt=adapt)
    settings = {"interval": EXACT, "training": False}
    drawn = draw_noise(
        1, 0, torch.arange(3), global_batch=3, length=24, block_size=1, antithetic=True
    )
    loss = one.loss(net, x0, torch.ones_like(x0), drawn, **settings)
    torch.testing.assert_close(loss.nll[:, 1:], theirs, rtol=1e-4, atol=1e-5)
    assert float(loss.mean) == pytest.approx(float(theirs.mean()), rel=1e-5)


# ---- the AR loss


@each_network
@pytest.mark.parametrize("adapt", CAUSAL, ids=repr)
@pytest.mark.parametrize("kind", ["times", "counts", "views", "sizes", "one block"])
def test_the_ar_loss_is_added(make, adapt, kind):
    """Value and gradient are those of the two losses computed apart. A block of the whole row has
    a clean half for it too."""
    net, size = make(), LENGTH if kind == "one block" else 4
    kind = "counts" if kind == "one block" else kind
    both, asked, x0 = batch(kind, adapt, ar_loss=FACTOR, size=size)
    plain, without, _ = batch(kind, adapt, size=size)
    valid = torch.ones_like(x0)
    valid[0, -2:] = 0
    ar = Autoregressive(MASK).loss(net, x0, valid, training=True)
    share = (LENGTH - 1) / LENGTH  # of its places among all
    diffusion = without.compute_loss(net, plain)
    found = asked.compute_loss(net, both)
    torch.testing.assert_close(found.nll, diffusion.nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.ar, ar.per_place.detach() * share, rtol=1e-5, atol=1e-6)
    total = diffusion.per_place + FACTOR * share * ar.per_place
    torch.testing.assert_close(found.per_place, total, rtol=1e-5, atol=1e-6)
    apart, ours = gradients(net, total), gradients(net, found.per_place)
    assert (ours - apart).norm() <= 1e-4 * apart.norm()
    assert torch.equal(found.parts.detach(), torch.stack([found.per_place.detach(), found.ar]))


@pytest.mark.parametrize("adapt", CAUSAL, ids=repr)
def test_packed_documents_have_no_token_before_their_first(adapt):
    """Two texts in a row, or each in its own: the same losses."""
    net, x0 = small_llama(), texts(2, LENGTH, MASK)
    ids = torch.arange(2).repeat_interleave(LENGTH)[None]
    found = []
    for text, documents in ((x0, None), (x0.view(1, -1), ids)):
        asked = objective(adapt, ar_loss=FACTOR)
        x_t = x0.clone()
        x_t[:, 1::2] = MASK
        loss_mask = torch.ones_like(text, dtype=torch.float32)
        inputs = asked.weighted_inputs(text, x_t.view_as(text), loss_mask, loss_mask, documents)
        found.append(asked.compute_loss(net, asked.with_ar_loss(inputs, text, documents)))
    for name in ("per_place", "ar"):
        alone, packed = (getattr(each, name) for each in found)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["counts", "views", "sizes"])
@pytest.mark.parametrize("adapt", CAUSAL, ids=repr)
def test_micro_batches_add_up(kind, adapt):
    net, x0 = small_llama(), texts(4, LENGTH, MASK)
    whole, asked, _ = batch(kind, adapt, x0=x0, ar_loss=FACTOR)
    expected = gradients(net, asked.compute_loss(net, whole).per_place)
    valid = torch.ones_like(x0)
    valid[0, -2:] = 0
    parts = []
    for rows in (torch.arange(2), torch.arange(2, 4)):
        drawn = noise(rows, sizes=asked.sizes)
        if kind == "views":
            inputs = asked.inputs_by_views(x0[rows], valid[rows], drawn)
        else:
            inputs = asked.inputs_by_counts(x0[rows], valid[rows], drawn, law=UNIFORM)
        inputs = asked.with_ar_loss(inputs, x0[rows])
        parts.append(gradients(net, asked.compute_loss(net, inputs).per_place))
    torch.testing.assert_close(sum(parts) / 2, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["counts", "views", "sizes"])
@each_adaptation
def test_padded_inputs_have_the_same_losses(kind, adapt):
    net, factor = small_llama(), FACTOR * adapt.causal
    inputs, asked, _ = batch(kind, adapt, ar_loss=factor)
    expected = asked.compute_loss(net, inputs)
    for more in (1, 7):
        padded = inputs.padded(len(inputs.loss_positions) + more)
        assert len(padded.loss_positions) == len(padded.loss_positions.unique())
        assert int(padded.loss_positions.max()) < inputs.outputs
        found = asked.compute_loss(net, padded)
        torch.testing.assert_close(found.nll, expected.nll, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.parts, expected.parts, rtol=1e-5, atol=1e-6)


def test_each_row_is_read_once():
    """With two views and an AR loss: no row twice, each scored token for each of its losses."""
    inputs, _, x0 = batch("views", Adaptation(True, True), ar_loss=FACTOR)
    assert len(inputs.loss_positions.unique()) == len(inputs.loss_positions)
    assert int(inputs.ar_weights.sum()) == x0.numel() - 4 - 2  # first tokens, and two not valid
    assert int((inputs.weights > 0).sum()) == x0.numel() - 4 - 2
    shared = (inputs.weights > 0) & (inputs.ar_weights > 0)
    assert int(shared.sum()) == 2 * 4  # the first tokens of blocks but those of rows


def test_without_it_nothing_changes():
    inputs, asked, x0 = batch("counts", Adaptation(causal=True))
    assert replace(asked, ar_loss=0.0).with_ar_loss(inputs, x0) is inputs
