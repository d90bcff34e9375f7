"""Steps that wait for no device: inputs with rows to spare, CUDA graphs, late judgements."""

import lightning as L
import pytest
import torch
from networks import GRADIENTS, small
from test_training import ALGORITHMS, COUNTED, GLOBAL, LENGTH, MASK, SIZES, module, trainer

from models.masks import Full
from objectives.counts import within
from objectives.graphs import ROWS, GraphedLoss, rows_for
from objectives.loss import LossInputs

KINDS = [*ALGORITHMS, *COUNTED, "sizes"]


def made(kind, **settings):
    if kind == "sizes":
        return module("bamdlm", counts=within(1, 4, 4), sizes=SIZES, **settings)
    return module(kind, **settings)


def batch(step):
    ids = torch.randint(0, MASK, (GLOBAL, LENGTH), generator=torch.Generator().manual_seed(step))
    rows = torch.arange(GLOBAL) + step * GLOBAL
    mask = torch.ones_like(ids)
    mask[step % 3 :, -4:] = 0  # rows differ in how many tokens count
    return {"input_ids": ids, "attention_mask": mask, "row": rows}


def asked(m, step):
    given = batch(step)
    return m.training_inputs(given, m.noise(given, 1, GLOBAL, m.objective.sizes))


def gradients(m, loss):
    return torch.autograd.grad(loss, list(m.backbone.parameters()), allow_unused=True)


def assert_same(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= GRADIENTS * b.norm() + 1e-9


@pytest.mark.parametrize("algo", [kind for kind in KINDS if kind != "ar"])
@pytest.mark.parametrize("more", [0, 5, 10**6])
def test_rows_to_spare_change_no_loss_and_no_gradient(algo, more):
    m = made(algo)
    inputs = asked(m, 0)
    padded = inputs.padded(len(inputs.loss_positions) + more)
    most = inputs.views * GLOBAL * LENGTH
    assert len(padded.loss_positions) == min(len(inputs.loss_positions) + more, most)
    assert len(padded.loss_positions.unique()) == len(padded.loss_positions)
    plain, ours = (m.objective.compute_loss(m.backbone, q) for q in (inputs, padded))
    torch.testing.assert_close(ours.mean, plain.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.nll, plain.nll, rtol=1e-5, atol=1e-7)
    assert_same(gradients(m, ours.mean), gradients(m, plain.mean))


def test_all_rows_read_leave_nothing_to_spare():
    inputs = asked(module("ar"), 0)
    assert inputs.padded(10**6) is inputs


def test_the_rows_of_a_graph():
    assert rows_for(1, 10**6) == ROWS
    for n in (500, 16_384, 400_000):
        assert n + n // 64 <= rows_for(n, 10**6) < n + n // 64 + 2 * ROWS
        assert rows_for(n, 10**6) % ROWS == 0
    assert rows_for(100, 120) == 120


def test_documents_and_empty_inputs_are_computed_as_they_are():
    """The graph would need a CUDA device, of which there is none here."""
    ids, none = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    empty = LossInputs(ids, Full(), torch.ones(1, 4), none, none, none.float())
    documents = LossInputs(
        ids, Full(), torch.ones(1, 4), none[:0], ids[0], torch.ones(4), document_ids=ids
    )
    graphed = GraphedLoss(torch.nn.Module(), lambda net, q: q.tokens.sum(), lambda q: q, False)
    for _ in range(4):
        assert graphed(empty) == 0
        assert graphed(documents) == 0
    assert graphed.shape is None


@pytest.mark.gpu
@pytest.mark.parametrize("algo", [*KINDS, "sizes by flex"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_graphs_give_the_losses_and_gradients_of_plain_steps(cuda, algo, half, dropout):
    m = made(algo.removesuffix(" by flex"), dropout=dropout)
    if algo.endswith("flex"):  # which has no heads as narrow as the others have here
        m.backbone = small(MASK + 1, hidden_size=32, attn_backend="flex")
        for layer in m.backbone.blocks:
            layer.dropout = dropout
    m.to(cuda).train()

    def loss(*asked):
        return m.objective.compute_loss(*asked).per_place

    def plain(inputs):
        return loss(m.backbone, inputs.to(cuda))

    graphed = GraphedLoss(m.backbone, loss, lambda q: q.to(cuda), shared=False)
    spare = 0
    for step in range(7):
        # without the memory of casts, in which the gradients of two uses are added up in bf16
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            results = []
            inputs = asked(m, step)
            if len(inputs.targets) > spare:
                spare = rows_for(len(inputs.targets), inputs.loss_mask.numel())
            for graphs in (False, True):
                torch.manual_seed(step)
                value = graphed(inputs) if graphs else plain(inputs.padded(spare))
                results.append((value.detach(), gradients(m, value)))
            (value, wanted), (ours, found) = results
            torch.testing.assert_close(ours, value, rtol=1e-6, atol=0)
            assert_same(found, wanted)
            with torch.no_grad():  # the recording must see the weights change
                for p in m.backbone.parameters():
                    p.mul_(1.01)
    assert graphed.graph is not None


class NoWaiting(L.Callback):
    """From step 5 on asking the device for anything is an error, and a step is judged during the
    next one."""

    recorded = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= 5:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")
        if trainer.global_step >= 5:
            assert len(pl_module.health._coming) == 1
        graphed = pl_module.graphed
        self.recorded = graphed is not None and graphed.graph is not None


class Poison(L.Callback):
    """In one step a weight's gradient is not a number. After it: what a checkpoint counts."""

    def __init__(self, step=4):
        self.step, self.loss_mask = step, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and self.loss_mask is None:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            self.loss_mask = checkpoint["ema"]["num_updates"]

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step - 1:
            next(pl_module.backbone.parameters()).grad[:1] = torch.nan


def fitted(
    algo, device, *, graphs=False, late=None, callbacks=(), steps=9, accumulate=1, masters=False
):
    """late: None leaves the choice to the module."""
    m = made(algo, dropout=0.1, eps=1e-4, masters=masters)
    fit_start = m.on_fit_start

    def on_fit_start():
        m.backbone.compiled = graphs  # without the compiler: what is tested here is not its work
        fit_start()
        m.backbone.compiled = False
        m.health.late = m.health.late if late is None else late

    m.on_fit_start = on_fit_start
    m.train()
    given = {"accumulate": accumulate, "callbacks": callbacks, "accelerator": device.type}
    t = trainer(None, steps, precision="bf16-mixed" if masters else None, **given)
    batches = [batch(step) for step in range(steps * accumulate)]
    try:
        t.fit(m, torch.utils.data.DataLoader(batches, batch_size=None))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return m


def assert_same_runs(ours, plain, rtol):
    assert ours.ema.num_updates == plain.ema.num_updates
    assert ours.health.bad_steps == plain.health.bad_steps
    for (name, a), (_, b) in zip(
        ours.backbone.named_parameters(), plain.backbone.named_parameters(), strict=True
    ):
        assert (a.cpu() - b.cpu()).norm() <= rtol * b.norm().cpu() + 1e-7, name
        average, wanted = ours.ema.shadow[name].cpu(), plain.ema.shadow[name].cpu()
        assert (average - wanted).norm() <= rtol * wanted.norm() + 1e-7, name


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("bad", [None, 1, 4, 9])
def test_late_judgement_makes_the_same_run(bad, masters):
    """On a CPU, where both are to be had; the last step is judged at the end."""
    cpu, runs = torch.device("cpu"), []
    for late in (False, True):
        callbacks = [] if bad is None else [Poison(bad)]
        runs.append(fitted("bamdlm", cpu, late=late, callbacks=callbacks, masters=masters))
        assert all(poison.loss_mask == bad - 1 for poison in callbacks)
        assert (runs[-1].health.found is not None) == late
        assert runs[-1].health.bad_steps == len(callbacks)
        assert runs[-1].ema.num_updates == 9 - len(callbacks)
    assert_same_runs(*runs, rtol=0)


def test_what_a_cpu_counts_is_known_at_once():
    assert not fitted("ar", torch.device("cpu")).health.late


@pytest.mark.gpu
@pytest.mark.parametrize("algo", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("masters", [False, True])
def test_a_training_step_waits_for_no_device(cuda, algo, accumulate, graphs, masters):
    """Also with weights in bfloat16, which are rounded where they lie: a recording sees them."""
    watch, given = NoWaiting(), {"accumulate": accumulate, "masters": masters}
    m = fitted(algo, cuda, graphs=graphs, callbacks=[watch, Poison()], **given)
    assert watch.recorded == graphs
    assert m.health.late
    assert m.health.bad_steps == 1
    plain = fitted(algo, cuda, late=False, callbacks=[Poison()], **given)
    # what is rounded otherwise once makes another gradient
    assert_same_runs(m, plain, rtol=1e-2 if masters else 1e-4)
