"""metrics.csv: a row for n optimizer steps; resumed, of the old format, cut off; and what is shown
of it."""

import csv
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.plot_run import smoothed
from training import progress
from training.csv_log import CSVLog
from training.log_reading import read_log
from training.progress import RunProgress

OLD = (
    "step,name,value,unix_time\r\n"
    "9,trainer/lr,0.5,1.0\r\n"
    "9,trainer/loss,3.0,1.0\r\n"
    "10,throughput/mfu,0.25,1.5\r\n"
    "19,trainer/loss,2.0,2.0\r\n"
    "19,val/nll,2.5,2.5\r\n"
    "19,trainer/loss,2.25,3.0\r\n"
    "29,trainer/loss,1.9"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run/metrics.csv"


def rows(path):
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and name != "unix_time"}
            for row in csv.DictReader(file)
        ]


def test_the_figures_of_a_step_share_a_row(path):
    log = CSVLog(path)
    log.log_metrics({"trainer/loss": 2.0, "epoch": 0}, step=10)
    log.log_metrics({"throughput/mfu": torch.tensor(0.5)}, step=10)
    log.log_metrics({"trainer/loss": 1.5, "throughput/mfu": 0.25}, step=20)
    log.log_metrics({"val/nll": 1.75}, step=20)
    assert rows(path) == [
        {"step": "10", "trainer/loss": "2.0", "throughput/mfu": "0.5"},
        {"step": "20", "trainer/loss": "1.5", "throughput/mfu": "0.25", "val/nll": "1.75"},
    ]
    assert read_log(path)["val/nll"] == {20: 1.75}
    assert read_log(path)["trainer/loss"] == {10: 2.0, 20: 1.5}


@pytest.mark.skipif(not importlib.util.find_spec("pandas"), reason="pandas is not installed")
def test_pandas_reads_it_without_holes(path):
    import pandas

    log = CSVLog(path)
    for step in (10, 20, 30):
        log.log_metrics({"trainer/loss": 1 / step}, step=step)
        log.log_metrics({"trainer/lr": step}, step=step)
    table = pandas.read_csv(path, index_col="step")
    assert list(table.index) == [10, 20, 30]
    assert not table.isna().any().any()


def test_a_resumed_run_drops_the_rows_that_it_makes_again(path):
    for begin, end in ((1, 7), (4, 6)):
        log = CSVLog(path)
        for step in range(begin, end):
            log.log_metrics({"trainer/loss": step + begin}, step=step)
    wanted = [(1, 2.0), (2, 3.0), (3, 4.0), (4, 8.0), (5, 9.0)]
    assert [(int(row["step"]), float(row["trainer/loss"])) for row in rows(path)] == wanted


def test_a_run_that_goes_on_with_a_validation_adds_it_to_the_row(path):
    CSVLog(path).log_metrics({"trainer/loss": 2.0}, step=4)
    CSVLog(path).log_metrics({"val/nll": 1.0}, step=4)
    assert rows(path) == [{"step": "4", "trainer/loss": "2.0", "val/nll": "1.0"}]


def test_a_row_that_was_cut_off_is_left_out(path):
    log = CSVLog(path)
    for step in (1, 2):
        log.log_metrics({"trainer/loss": 0.125}, step=step)
    path.write_bytes(path.read_bytes()[:-3])
    assert read_log(path)["trainer/loss"] == {1: 0.125}
    CSVLog(path).log_metrics({"trainer/loss": 4.0}, step=3)
    assert read_log(path)["trainer/loss"] == {1: 0.125, 3: 4.0}


def test_a_log_of_the_old_format_goes_on_in_the_new_one(path):
    """There, a step was told by its number from 0, but for the throughput; the line cut off at the
    end is left out."""
    path.parent.mkdir()
    path.write_text(OLD, newline="")
    found = read_log(path)
    assert found["trainer/loss"] == {10: 3.0, 20: 2.25}
    assert found["throughput/mfu"] == {10: 0.25}
    CSVLog(path).log_metrics({"trainer/loss": 1.0}, step=30)
    assert read_log(path) == found | {"trainer/loss": {10: 3.0, 20: 2.25, 30: 1.0}}
    assert [row["step"] for row in rows(path)] == ["10", "20", "30"]
    assert path.with_name("metrics.old.csv").read_bytes() == OLD.encode()


@pytest.mark.parametrize("every", [1, 10, 100])
def test_the_smoothed_loss_ends_near_the_truth_however_often_it_was_logged(every):
    """Of a loss that falls as 8 exp(-n / 300) + 2, from 2,000 steps."""
    steps = list(range(every, 2001, every))
    losses = [8 * math.exp(-step / 300) + 2 for step in steps]
    found = smoothed(steps, losses)
    assert found[0] == losses[0]
    assert found[-1] == pytest.approx(losses[-1], rel=0.01)
    assert smoothed(steps, [3.0] * len(steps)) == pytest.approx([3.0] * len(steps))


def stand_in():
    trainer = SimpleNamespace(
        global_step=0,
        max_steps=100,
        world_size=1,
        accumulate_grad_batches=2,
        sanity_checking=True,
        num_sanity_val_batches=[2],
        num_val_batches=[9],
    )
    health = SimpleNamespace(loss=torch.tensor(0.0))
    return trainer, SimpleNamespace(health=health)


def test_a_line_shows_the_mean_of_the_steps_since_the_last_line(monkeypatch, capsys):
    """A step that was left out has no loss."""
    trainer, module = stand_in()
    bar, batch = RunProgress(), {"input_ids": torch.zeros(2, 4)}
    due = iter([False, False, True, False, True])
    bar.on_train_start(trainer, module)
    monkeypatch.setattr(bar, "_due", lambda: next(due))
    for loss in (4.0, math.nan, 2.0, 1.0, 1.5):
        trainer.global_step += 1
        module.health.loss = torch.tensor(loss)
        bar.on_train_batch_end(trainer, module, None, batch, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3 of 100", "step 5 of 100"]
    assert ["loss 3.000" in lines[0], "loss 1.250" in lines[1]] == [True, True]


def test_the_numbers_of_the_check_ahead_of_training_are_labelled(monkeypatch, capsys):
    trainer, module = stand_in()
    so_far = SimpleNamespace(ppl=9.0, ppl_error=0.5, rows=100)
    module.running_likelihood = lambda: so_far
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    RunProgress().on_validation_batch_end(trainer, module, None, None, 0)
    trainer.sanity_checking = False
    RunProgress().on_validation_batch_end(trainer, module, None, None, 0)
    check, valid = capsys.readouterr().out.splitlines()
    assert check.startswith("check of the validation, batch 1 of 2  ppl 9.00 ± 0.50  100 rows")
    assert valid.startswith("validation batch 1 of 9  ppl 9.00")


def test_the_recorded_logs_of_the_learning_check_are_read():
    log = read_log(Path(__file__).parents[2] / "docs/results/ar.csv")
    assert min(log["trainer/loss"]) == 50
    assert max(log["val/nll"]) % 100 == 0
