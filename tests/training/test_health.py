"""Saves that fail, steps that are not finite, data that do not come."""

import errno
import functools
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from runs import ALGORITHMS, LAST, TIMEOUT, Run, at_call, differences, read, run, tell, tiny

import utils
from checkpointing import torch_file
from diffusion import Diffusion
from training import health
from training.checkpoint_io.files import CarefulIO
from training.health import StallWatch
from training.log_reading import read_log


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of runs without a validation."""
    return [
        *tiny(tmp_path_factory.mktemp("data")),
        *ALGORITHMS["ar"],
        "trainer.limit_val_batches=0",
    ]


def disk_full_after(saves):
    """Patch: writing fails from the given save on, after some bytes."""
    real, calls = torch_file.torch.save, [0]

    def save(content, file, **kwargs):
        calls[0] += 1
        if calls[0] > saves:
            file.write(b"PK half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(content, file, **kwargs)

    torch_file.torch.save = save


@pytest.mark.parametrize(("policy", "code", "last"), [("continue", 1, 10), ("stop", 1, 8)])
def test_a_full_disk_leaves_the_checkpoint_before_it(policy, code, last, base, tmp_path):
    save_dir = f"checkpointing.save_dir={tmp_path / 'run'}"
    more = [save_dir, f"checkpointing.on_save_error={policy}"]
    ended, text = run(
        [*base, *more], tmp_path / "log", before=lambda: disk_full_after(1)
    )  # the save of step 4 succeeds
    assert ended == code, text
    assert "No space left on device" in text
    assert "the checkpoint before it is as it was" in text
    assert "Traceback" not in text
    assert read(tmp_path / LAST)["global_step"] == 4
    assert max(read_log(tmp_path / "run/metrics.csv")["trainer/loss"]) == last
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def read_only(folder):
    """Patch: from the second save on the folder cannot be written."""
    real, calls = utils._beside, [0]

    def beside(path, suffix=""):
        calls[0] += path.parent == folder
        if calls[0] > 2:  # a save makes step=N.ckpt and last.ckpt
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, suffix)

    utils._beside = beside


def vanishing(folder):
    """Patch: ahead of step 5 the folder is elsewhere, and its name is taken."""

    def act():
        folder.rename(folder.with_name("elsewhere"))
        folder.touch()

    at_call(Diffusion, "training_step", 9, act)()


@pytest.mark.parametrize(
    ("patch", "place", "message"),
    [(read_only, "checkpoints", "Read-only file system"), (vanishing, "elsewhere", "File exists")],
)
def test_a_folder_that_cannot_be_written_is_said(patch, place, message, base, tmp_path):
    run_folder = tmp_path / "run"
    more = [f"checkpointing.save_dir={run_folder}", "checkpointing.on_save_error=continue"]
    before = functools.partial(patch, run_folder / "checkpoints")
    code, text = run(
        [*base, *more, "callbacks.checkpoint_monitor=null"], tmp_path / "log", before=before
    )
    assert code == 1, text  # the last one could not be written either
    assert "step=8.ckpt could not be written" in text
    assert "not saved: step 10; " in text
    assert message in text
    assert "Traceback" not in text
    assert read(run_folder / place / "last.ckpt")["global_step"] == 4
    assert max(read_log(run_folder / "metrics.csv")["trainer/loss"]) == 10


class NoRoute(Exception):
    """What the client of a store raises: not an OSError."""


def test_a_store_that_is_gone_is_reported_like_a_full_disk(monkeypatch, capsys):
    def gone(*args, **kwargs):
        raise NoRoute("to host")

    monkeypatch.setattr(MemoryFileSystem, "open", gone)
    io = CarefulIO()
    io.save_checkpoint({}, "memory://runs/step=1.ckpt")
    assert "memory://runs/step=1.ckpt could not be written (NoRoute: to host)" in io.failure
    assert io.failure in capsys.readouterr().err


def poisoned(calls):
    """Patch: these calls of training_step give a loss that is not a number."""
    real, seen = Diffusion.training_step, [0]

    def step(self, batch, batch_idx):
        seen[0] += 1
        loss = real(self, batch, batch_idx)
        if seen[0] not in calls:
            return loss
        self.health.saw(batch, loss * torch.nan, torch.ones(1))
        return loss * torch.nan

    Diffusion.training_step = step


def overflow():
    """Patch: in step 2 a gradient is infinite, its losses are not."""
    real, calls = Diffusion.configure_gradient_clipping, [0]

    def clip(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            next(p.grad for p in self.parameters() if p.grad is not None).fill_(torch.inf)
        return real(self, *args, **kwargs)

    Diffusion.configure_gradient_clipping = clip


def test_steps_that_are_not_finite_are_left_out_and_counted(base, tmp_path):
    """In step 2 a gradient is infinite, in step 4 a loss."""

    def patch():
        overflow()
        poisoned({8})

    arguments = [*base, f"checkpointing.save_dir={tmp_path / 'run'}"]
    code, text = run(arguments, tmp_path / "log", before=patch)
    assert code == 0, text
    for step, what in ((2, "gradient"), (4, "loss")):
        assert f"step {step} left out: it has a {what} that is not finite" in text
        kept = torch.load(tmp_path / f"run/bad_steps/step={step}-rank=0.pt", weights_only=True)
        assert kept["batches"][0]["input_ids"].shape == (4, 16)
        assert kept["parameters"]
    last = read(tmp_path / LAST)
    assert last["global_step"] == 10
    assert last["ema"]["num_updates"] == 8
    assert float(last["optimizer_states"][0]["state"][0]["step"]) == 8
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def judged_late():
    """Patch: as on a GPU, the host learns of a step during the next one."""
    real = Diffusion.on_fit_start

    def on_fit_start(self):
        real(self)
        self.health.late = True

    Diffusion.on_fit_start = on_fit_start


@pytest.fixture(scope="module")
def fourth(base, tmp_path_factory):
    """The checkpoint of step 4 of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("fourth")
    words = [f"checkpointing.save_dir={folder / 'run'}", "trainer.max_steps=4"]
    code, text = run([*base, *words], folder / "log")
    assert code == 0, text
    return read(folder / LAST)


@pytest.mark.parametrize("late", [False, True], ids=["at_once", "late"])
def test_too_many_of_them_in_a_row_end_the_run(late, base, fourth, tmp_path):
    arguments = [*base, f"checkpointing.save_dir={tmp_path / 'run'}", "training.max_bad_steps=2"]
    calls = set(range(11, 100))

    def before():
        poisoned(calls)
        if late:
            judged_late()

    code, text = run(arguments, tmp_path / "log", before=before)
    assert code == 1, text
    assert "3 steps in a row had a loss that is not finite" in text
    assert "training.max_bad_steps=2" in text
    last = read(tmp_path / LAST)
    assert last["global_step"] == 4
    assert differences(last["state_dict"], fourth["state_dict"]) == []


def test_waiting_for_data_is_said(capsys):
    trainer = SimpleNamespace(
        global_rank=0, global_step=6, datamodule=SimpleNamespace(num_workers=2)
    )
    watch = StallWatch(seconds=0.05)
    watch.on_train_start(trainer, None)
    text, end = "", time.monotonic() + TIMEOUT
    while "step 7: no batch from the 2 data workers" not in text:
        assert time.monotonic() < end, text
        time.sleep(0.01)
        text += capsys.readouterr().err
    watch.on_train_end(trainer, None)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_processes_end_with_the_one_that_started_them(when, tmp_path, monkeypatch):
    """Killed, it cannot tell them: they see it, or that it had gone before they looked."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv(health.LAUNCHER, raising=False)
    logs = [tmp_path / f"{rank}.txt" for rank in "12"]
    for log in logs:
        log.touch()

    def follow():
        launcher = int(os.environ[health.LAUNCHER])
        while when == "at once" and os.getppid() == launcher:
            time.sleep(0.01)
        health.TIDY_SECONDS = 0.1
        health.follow_launcher()
        print("ready")
        time.sleep(TIMEOUT)

    def launch():
        health.follow_launcher()  # as the first process
        for rank, log in zip("12", logs, strict=True):
            Run([], log, before=follow, environment={"LOCAL_RANK": rank})
        while when == "later" and not all("ready" in log.read_text() for log in logs):
            time.sleep(0.01)
        tell(signal.SIGKILL)()

    first = Run([], tmp_path / "first.txt", before=launch)
    assert first.wait() == -signal.SIGKILL, first.text()
    end = time.monotonic() + TIMEOUT
    while not all("is gone" in log.read_text() for log in logs):
        assert time.monotonic() < end, [log.read_text() for log in logs]
        time.sleep(0.01)
    for log in logs:
        assert log.read_text() == f"ready\nthe first process ({first.pid}) is gone: ending\n"


@pytest.mark.parametrize("launcher", ["nobody", "another", "torchrun"])
def test_a_process_that_another_launcher_started_follows_nobody(launcher, monkeypatch):
    started = []
    monkeypatch.setattr(health.threading, "Thread", lambda **how: started.append(how))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv(health.LAUNCHER, raising=False)
    if launcher == "another":  # which runs, but is not the parent
        monkeypatch.setenv(health.LAUNCHER, str(os.getpid()))
    if launcher == "torchrun":
        monkeypatch.setenv(health.LAUNCHER, str(os.getppid()))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    health.follow_launcher()
    assert not started
