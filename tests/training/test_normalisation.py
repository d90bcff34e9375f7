"""A step's loss is the mean over the tokens that count in its global batch, however it is cut."""

import csv
import dataclasses
import random

import pytest
import torch
from made_up_split import MadeUpSplit
from test_training import ALGORITHMS, COUNTED, LENGTH, MASK, MemoryRows, module, trainer

from data import streaming
from data.packing import RowFormat
from data.readers import Piece
from data.streaming import StreamedText
from dataloader import DataModule
from training.csv_log import CSVLog
from training.logged import StepLog

ROWS, STEPS = 32, 3  # of a global batch; of 70 rows, which end in the last step


class UnevenRows(MemoryRows):
    """Rows in which 0 to LENGTH tokens count, the rest is padding; `apart`: of two documents."""

    def __init__(self, count, seed, *, apart=False):
        super().__init__(count, seed)
        self.apart = apart
        generator = torch.Generator().manual_seed(seed)
        self.real = torch.randint(0, LENGTH + 1, (count,), generator=generator)

    def read(self, rows):
        real = torch.arange(LENGTH) < self.real[torch.tensor(rows)][:, None]
        return self.ids[rows], real.long().numpy()

    def document_ids(self, rows):
        _, real = self.read(rows)
        return (1 + (torch.arange(LENGTH) >= 4)).numpy() * real


class StreamedRows(StreamedText):
    """The same straight from a text of documents of 1 to 2 LENGTH letters."""

    def __init__(self, apart):
        how = RowFormat(
            LENGTH,
            wrap=apart,
            insert_eos=True,
            insert_special=False,
            bos=0,
            eos=1,
            pad=0,
            align=4 if apart else None,
        )
        split = MadeUpSplit(None, self.encode, how, vocab_size=MASK + 1)
        super().__init__(split, [self.text])
        self.apart = apart

    def encode(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def text(self):
        pick = random.Random(5)
        for _ in range(200):
            yield Piece("".join(pick.choices("abcdef", k=pick.randint(1, 2 * LENGTH))), True, 0.0)


class Watched(StepLog):
    """The gradients of the first step as the optimizer gets them, the loss of every step."""

    def __init__(self):
        super().__init__(1.0, torch.float32, rates=True)
        self.gradients, self.losses = None, []

    def on_fit_start(self, trainer, module):
        scale = module.health.scale

        def scaled(named, *args):
            scale(named, *args)
            self.losses.append(float(module.health.loss))
            if self.gradients is None:
                self.gradients = torch.cat([p.grad.flatten().clone() for _, p in named])

        module.health.scale = scaled


def data_of(rows, micro):
    valid = MemoryRows(4, 1)
    return DataModule(
        train=rows, valid=valid, length=LENGTH, batch_size=micro, eval_batch_size=4, seed=1
    )


def fit(algo, rows, micro, clip=None, way="norm", logger=False, steps=STEPS):
    m = module(algo, eps=1e-4)
    m.noise_settings = dataclasses.replace(m.noise_settings, global_batch=ROWS)
    m.pad_apart = not rows.apart
    data = data_of(rows, micro)
    watched = Watched()
    t = trainer(None, steps, accumulate=ROWS // micro, callbacks=[watched])
    t.gradient_clip_val, t.gradient_clip_algorithm = clip, way
    t.log_every_n_steps = 1
    if logger:
        t.loggers = [logger]
    t.fit(m, datamodule=data)
    weights = torch.cat([p.detach().flatten() for p in m.parameters()])
    return watched, weights, m


def direct(algo, rows):
    """Loss and gradient of the first step: one batch, divided by its tokens that count."""
    m = module(algo, eps=1e-4).train()
    m.pad_apart = not rows.apart
    batch = next(iter(data_of(rows, ROWS).train_dataloader()))
    inputs = m.training_inputs(batch, m.noise(batch, 1, ROWS))
    loss = m.objective.compute_loss(m.backbone, inputs)
    value = loss.nll.double().sum() / loss.loss_mask.double().sum()
    loss.mean.backward()
    found = [p.grad.flatten() for _, p in m.backbone.named_parameters() if p.grad is not None]
    return float(value), torch.cat(found)


@pytest.mark.parametrize(
    ("algo", "apart", "micro_batches"),
    [
        *((algo, False, (4, ROWS)) for algo in (*ALGORITHMS, *COUNTED)),
        *((algo, True, (1, 4, ROWS)) for algo in ("bamdlm", *COUNTED)),
    ],
)
def test_micro_batches_do_not_change_a_step(algo, apart, micro_batches):
    same_steps(algo, UnevenRows(70, 5, apart=apart), micro_batches)


@pytest.mark.parametrize("apart", [False, True])
def test_micro_batches_of_a_streamed_text_do_not_change_a_step(apart, monkeypatch):
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 300)
    same_steps("bamdlm", StreamedRows(apart), (1, 4, ROWS))


def same_steps(algo, rows, micro_batches):
    loss, gradient = direct(algo, rows)
    whole = fit(algo, rows, ROWS)
    for micro in micro_batches:
        watched, weights, _ = whole if micro == ROWS else fit(algo, rows, micro)
        assert watched.losses[0] == pytest.approx(loss, rel=1e-6)
        assert watched.losses == pytest.approx(whole[0].losses, rel=1e-5)
        assert (watched.gradients - gradient).norm() <= 1e-6 * gradient.norm()
        assert (weights - whole[1]).abs().max() <= 1e-5 * weights.abs().max()


@pytest.mark.parametrize("way", ["norm", "value"])
def test_what_is_clipped_is_the_gradient_of_the_mean(way):
    rows = UnevenRows(70, 5)
    _, gradient = direct("ar", rows)
    limit = float(gradient.norm() if way == "norm" else gradient.abs().max()) / 2
    watched, _, m = fit("ar", rows, 4, clip=limit, way=way, steps=1)
    wanted = gradient / 2 if way == "norm" else gradient.clamp(-limit, limit)
    torch.testing.assert_close(watched.gradients, wanted, rtol=1e-5, atol=1e-7)
    assert float(m.health.norm) == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_where_all_tokens_count_nothing_is_multiplied():
    rows = MemoryRows(70, 5)
    _, _, m = fit("bamdlm", rows, 4, steps=2)
    assert m.health.factor is None


def test_a_step_without_a_token_that_counts_is_left_out(capsys):
    rows = UnevenRows(70, 5)
    rows.real = torch.zeros_like(rows.real)
    _, weights, m = fit("mdlm", rows, 4, steps=3)
    assert torch.equal(weights, torch.cat([p.flatten() for p in module("mdlm").parameters()]))
    assert m.health.bad_steps == 3
    assert "step 2 left out: it has no token that counts" in capsys.readouterr().err


def test_the_row_of_a_step_holds_the_loss_of_its_global_batch(tmp_path):
    watched, _, _ = fit("bamdlm", UnevenRows(70, 5), 4, logger=CSVLog(tmp_path / "metrics.csv"))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [float(row["trainer/loss"]) for row in rows] == pytest.approx(watched.losses)
    assert [float(row["trainer/lr"]) for row in rows[:3]] == pytest.approx([0.0, 5e-3, 1e-2])
    assert all(value for row in rows for value in row.values())  # no holes
