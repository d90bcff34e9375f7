"""Losses on answers alone: the packed row is the sum of its conversations, only scored tokens are
ever masked, and the noise by counts weighs a block by its scored tokens."""

from dataclasses import replace

import pytest
import torch
from networks import assert_within, texts
from test_document_losses import INTERVAL, LENGTH, MASK, OBJECTIVES, alone, network, noise

from objectives.autoregressive import Autoregressive
from objectives.corruption import Noise
from objectives.counts import UNIFORM, within

# where the conversations of each row begin and end, at blocks of 4; the last row ends in padding
LAYOUT = [[(0, 8), (8, 12), (12, 24)], [(0, 4), (4, 20)]]
ANSWERS = [[(3, 5), (6, 8), (9, 12), (15, 22)], [(2, 4), (9, 10), (13, 20)]]
NAMES = ["bamdlm", "bamdlm-S1", "bamdlm-no-bos", "mdlm", "sedd", "ar", "ar-no-bos"]


def spans(places, *, number=False):
    found = torch.zeros(2, LENGTH, dtype=torch.int64)
    for row, of_row in enumerate(places):
        for i, (begin, end) in enumerate(of_row, 1):
            found[row, begin:end] = i if number else 1
    return found


SEED = 10  # times of whole rows that mask some
IDS, SCORED = spans(LAYOUT, number=True), spans(ANSWERS)


def inputs(name, x0, kind, training=True, only=None):
    """What the loss is computed from; only: (row, begin, end) of one conversation, in a row of its
    own without document ids, with the noise that it has in the packed row."""
    objective, ids = OBJECTIVES[name], IDS
    row, begin, end = only or (None, 0, LENGTH)
    part = slice(None) if only is None else slice(row, row + 1), slice(begin, end)
    x0, scored, ids = x0[part], SCORED[part], None if only else IDS
    if isinstance(objective, Autoregressive):
        return objective.loss_inputs(x0, scored, training=training, document_ids=ids)
    drawn, size = noise(objective, SEED), objective.noise_block(LENGTH)
    blocks = part[0], slice(begin // size, -(-end // size))
    drawn = Noise(drawn.time[blocks], drawn.token[part], drawn.count[blocks])
    if name == "mdlm":
        objective = replace(objective, block_size=end - begin)
    if kind == "times":
        return objective.loss_inputs(
            x0, scored, drawn, interval=INTERVAL, training=training, document_ids=ids
        )
    if kind == "views":
        return objective.inputs_by_views(x0, scored, drawn, document_ids=ids)
    law = UNIFORM if kind == "counts" else within(1, 2, size)
    return objective.inputs_by_counts(x0, scored, drawn, law=law, document_ids=ids)


CASES = [(name, "times") for name in NAMES]
CASES += [("bamdlm", "counts"), ("bamdlm", "range"), ("bamdlm", "views")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_packed_row_is_the_sum_of_its_conversations(name, kind):
    """Losses and gradients, against a row for each conversation without document ids."""
    objective, x0 = OBJECTIVES[name], texts(2, LENGTH, MASK)
    net, plain = network(name), network(name)
    loss = objective.compute_loss(net, inputs(name, x0, kind))
    total, found = 0.0, torch.zeros(2, LENGTH)
    for row, conversations in enumerate(LAYOUT):
        for begin, end in conversations:
            given = inputs(name, x0, kind, only=(row, begin, end))
            each = objective.compute_loss(plain, given)
            found[row, end - each.nll.shape[1] : end] = each.nll[0]
            total = total + each.per_place * given.loss_mask.numel()
    shift = LENGTH - loss.nll.shape[1]
    assert_within(loss.nll, found[:, shift:], 1e-5)
    assert loss.nll.sum() > 10
    assert loss.loss_mask.sum() == SCORED.sum()
    assert not loss.nll[SCORED[:, shift:] == 0].any()
    (loss.per_place * loss.loss_mask.numel()).backward()
    total.backward()
    for (key, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm() + 1e-7, key


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_loss_written_out(name):
    """On the plain network: one conversation, the masked answers predicted, weight 1 / t."""
    objective, x0 = OBJECTIVES[name], texts(2, LENGTH, MASK)
    loss = objective.compute_loss(network(name), inputs(name, x0, "times"))
    plain, found = network(name), torch.zeros(2, LENGTH)
    x_t, t = x0, torch.ones(2, 1)
    if not isinstance(objective, Autoregressive):
        x_t, t = objective.corrupt(x0, noise(objective, SEED), INTERVAL, IDS)
        x_t = torch.where(SCORED > 0, x_t, x0)
    t = t.repeat_interleave(LENGTH // t.shape[1], 1)
    for row, conversations in enumerate(LAYOUT):
        for begin, end in conversations:
            part = row, slice(begin, end)
            nll, _ = alone(objective, plain, x0[part], x_t[part], t[part], True)
            found[part] = (nll * SCORED[part]).detach()
    assert_within(loss.nll, found[:, LENGTH - loss.nll.shape[1] :], 1e-5)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0][:2] != "ar"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_scored_is_always_visible(name, kind, training):
    x0 = texts(2, LENGTH, MASK)
    given = inputs(name, x0, kind, training)
    noised = given.tokens[:, : given.views * LENGTH].unflatten(1, (given.views, LENGTH))
    masked = noised == MASK
    assert masked.any()
    assert not masked[(SCORED == 0)[:, None].expand_as(masked)].any()
    assert torch.equal(given.tokens[:, -LENGTH:][SCORED == 0], x0[SCORED == 0])
    if kind == "views":
        assert masked.sum() == SCORED.sum()
    if kind == "counts":
        per_block = SCORED.unflatten(1, (-1, 4)).sum(-1)
        drawn = masked[:, 0].unflatten(1, (-1, 4)).sum(-1)
        assert ((drawn > 0) == (per_block > 0)).all()
        weight = torch.zeros(2 * LENGTH)
        weight[given.loss_positions] = given.weights
        sums = weight.view(2, -1, 4).sum(-1)  # m masked tokens of weight n / m
        torch.testing.assert_close(sums, per_block.float())
