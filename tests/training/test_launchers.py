"""Two processes, started by torchrun or by Lightning: equal, and none waits for a dead one."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import launched as program
import pytest
from forked_python import forked_python
from lightning.fabric.strategies.launchers import subprocess_script as fabric_script
from lightning.pytorch.strategies.launchers import subprocess_script as trainer_script
from runs import ALGORITHMS, LAST, Run, differences, finish, ranks, read, run, tiny

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "lightning": [],
}
FEW = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
OTHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "NODE_RANK", "PL_", "BAMDLM_")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [*tiny(folder), *ALGORITHMS["bamdlm"], "trainer.devices=2"]


def launched(launcher, arguments, folder, *, rank="none", fault="raises", timeout=150, python=None):
    """(exit code, output) of two processes started by the launcher, of which `rank` has the fault
    (see the program, tests/launched.py). python: torchrun starts this in place of interpreters."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OTHERS)}
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], program.__file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder if fault == "late" else None,
        env={**kept, **FEW, "FAULT_RANK": rank, "FAULT": fault}
        | ({"PYTHON_EXEC": str(python)} if python else {}),
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout)  # until all that have its output are gone
    except subprocess.TimeoutExpired as error:
        process.terminate()  # torchrun ends its processes, which are no group of ours
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        raise AssertionError(f"no end after {timeout} s:\n{error.output}") from None
    finally:
        with suppress(ProcessLookupError):  # of the group, whose first process may be gone
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, text


class Forked(Run):
    """What a launcher takes for a subprocess.Popen of the same program."""

    returncode = None

    def __init__(self, args, env, cwd=None, *, arguments, log, start_new_session=False, **streams):
        assert not any(streams.values()), "they share what this process prints to"

        def begin():
            if start_new_session:
                os.setsid()
            program.patch()

        super().__init__(arguments, log, before=begin, environment=env)

    def poll(self):
        if self.returncode is None:
            self.returncode = super().poll()
        return self.returncode

    def wait(self, timeout=150):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked run", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            self.send(number)


def forked(launcher, arguments, folder, *, rank="none", fault="raises", timeout=150):
    """As `launched`; but the launcher's own code forks this process instead of starting Python."""
    log = folder / "log.txt"

    def begin():
        os.chdir(folder)
        for name in [name for name in os.environ if name.startswith(OTHERS)]:
            del os.environ[name]
        popen = functools.partial(Forked, arguments=arguments, log=log)
        for script in (trainer_script, fabric_script):
            script.subprocess = SimpleNamespace(Popen=popen)
        seconds = 0.2  # from one look at the others to the next
        fabric_script._ChildProcessObserver.__init__.__defaults__ = (seconds,)
        if launcher == "torchrun":
            from torch.distributed import run as torchrun
            from torch.distributed.elastic.multiprocessing.subprocess_handler import (
                subprocess_handler,
            )

            subprocess_handler.Popen = popen
            sys.exit(torchrun.main([*LAUNCHERS["torchrun"][2:], program.__file__]))
        program.patch()
        sys.exit(program.run(arguments))

    environment = {**FEW, "FAULT_RANK": rank, "FAULT": fault}
    return run(arguments, log, timeout, before=begin, environment=environment)


@pytest.mark.parametrize("start", [forked, pytest.param(launched, marks=pytest.mark.slow)])
def test_both_launchers_train_the_same(start, overrides, tmp_path):
    few = ["trainer.max_steps=4", "trainer.limit_val_batches=1"]
    arguments = [*overrides, *few, f"checkpointing.save_dir={tmp_path / 'run'}"]
    code, text = start("lightning", arguments, tmp_path)
    assert code == 0, text
    assert "Warning" not in text
    ours = read(tmp_path / LAST)
    (tmp_path / "run").rename(tmp_path / "first")
    started = ranks(2, arguments, tmp_path / "log.txt")
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    assert differences(ours, read(tmp_path / LAST)) == []


def test_who_is_done_with_its_texts_ends_nobody(overrides, tmp_path):
    """The first process may be the first one to be done; it waits for the others."""
    save = ["trainer.devices=1", "trainer.max_steps=1", "trainer.limit_val_batches=0"]
    save.append(f"checkpointing.save_dir={tmp_path / 'run'}")
    code, text = run([*overrides, *save], tmp_path / "trained.txt")
    assert code == 0, text
    words = [*overrides, "mode=sample_eval", f"eval.checkpoint_path={tmp_path / LAST}"]
    words += ["eval.gen_ppl_eval_model_name_or_path=null", "sampling.batch_size=4"]
    words += ["sampling.logdir=texts.csv"]
    code, text = forked("lightning", words, tmp_path, rank="1", fault="late")
    assert code == 0, text
    assert "at the end the report is there" in text
    assert json.loads((tmp_path / "texts.json").read_text())["rows"] == 4


DEATHS = [
    (forked, "torchrun", "1", "raises"),
    (forked, "lightning", "1", "SIGKILL"),
    (forked, "lightning", "1", "raises"),
    (forked, "lightning", "0", "SIGKILL"),  # with it goes the one that watches the others
    # three processes that import everything
    pytest.param(launched, "torchrun", "1", "SIGKILL", marks=pytest.mark.slow),
    pytest.param(launched, "torchrun", "1", "raises", marks=pytest.mark.slow),
    pytest.param(launched, "lightning", "0", "SIGKILL", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("start", "launcher", "rank", "fault"), DEATHS)
def test_a_rank_that_dies_brings_the_job_down(start, launcher, rank, fault, overrides, tmp_path):
    arguments = [*overrides, f"checkpointing.save_dir={tmp_path / 'run'}"]
    dies(functools.partial(start, launcher), arguments, tmp_path, rank=rank, fault=fault)


def test_a_rank_that_dies_brings_torchrun_down(overrides, tmp_path):
    """torchrun in an interpreter of its own, which starts its ranks; those are forks."""
    arguments = [*overrides, f"checkpointing.save_dir={tmp_path / 'run'}"]
    with forked_python() as python:
        start = functools.partial(launched, "torchrun", python=python)
        dies(start, arguments, tmp_path, rank="1", fault="SIGKILL")


def dies(start, arguments, folder, *, rank, fault, timeout=150):
    """start: `forked` or `launched` by one of the launchers."""
    code, text = start(arguments, folder, rank=rank, fault=fault, timeout=timeout)
    assert code, text
    assert "the fault" in text
    if fault == "raises":  # the traceback of the fault comes before those of its consequences
        begun, told = text.index("Traceback"), text.index("the fault of one rank")
        assert text.index("rank 1 failed in step 3") < begun < told
        assert text.count("Traceback", 0, told) == 1
