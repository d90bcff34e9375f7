"""trainer.profiler=torch, and the figures of a step and of a validation, in one run."""

import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch
from runs import run, tiny

import settings
from training.log_reading import read_log
from training.validation import SHARES, Validation

VOCABULARY = 34  # of text8, without the mask


def test_a_run_writes_a_trace_and_its_figures(tmp_path):
    """The network begins by giving all tokens the same chance; here it hardly changes, so each
    masked token costs ln V, however many others are masked."""
    words = [*tiny(tmp_path), "block_size=4", "training.noise=counts", "optim.lr=1e-12"]
    words += ["trainer.profiler=torch", f"checkpointing.save_dir={tmp_path / 'run'}"]
    code, text = run(words, tmp_path / "log")
    assert code == 0, text
    # ten steps; validation, after the eighth, ends the trace of the last five
    path = tmp_path / "run/trace-step=6-8.json.gz"
    assert f"trace of steps 6 to 8: {path}" in text
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if "name" in event]
    counts = {f"step {number}": 2 for number in (6, 7, 8)}  # of two micro-batches
    assert {name: names.count(name) for name in names if name.startswith("step ")} == counts
    assert names.count("aten::addmm") > 10
    assert [p.name for p in (tmp_path / "run").iterdir() if "trace" in p.name] == [path.name]
    log = read_log(tmp_path / "run/metrics.csv")
    for share in (25, 50, 75, 100):
        for value in log[f"val/nll_masked_{share}"].values():
            assert value == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    assert len(log["trainer/masked_share"]) == len(log["trainer/grad_norm"]) == 10
    for value in log["trainer/masked_share"].values():
        assert value == pytest.approx(0.625, abs=0.05)  # the mean of 1 .. 4 of 4
    assert all(value > 0 for value in log["trainer/grad_norm"].values())


def test_the_loss_by_masked_share_by_hand():
    """Blocks of 8 and of 3 scored tokens, and of none; their losses are weighed by n / m."""
    held = SimpleNamespace(shares=torch.zeros(2, SHARES, dtype=torch.float64))
    m, n = torch.tensor([[1, 2, 3], [8, 1, 0]]), torch.tensor([[8, 8, 8], [8, 3, 0]])
    nats = torch.tensor([[5.0, 7.0, 9.0], [40.0, 2.0, 0.0]])
    Validation._add_shares(held, nats * n / m.clamp(min=1), m, n)
    wanted = [[12, 11, 0, 40], [3, 4, 0, 8]]
    torch.testing.assert_close(held.shares, torch.tensor(wanted, dtype=torch.float64))


def test_other_modes_say_that_they_have_no_trace():
    _, _, notes = settings.examine(["mode=prepare", "data=text8", "trainer.profiler=torch"])
    assert "trainer.profiler has no effect: mode=prepare trains nothing" in notes
    _, problems, _ = settings.examine(["data=text8", "trainer.profiler=simple"])
    assert any("trainer.profiler=simple must be one of torch" in each for each in problems)
