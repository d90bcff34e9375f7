"""Two processes, started by torchrun or by Lightning: equal, and none waits for a dead one."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from runs import ALGORITHMS, finish, ranks, tiny

from benchmarks.chaos import differences, read

LAST = "run/checkpoints/last.ckpt"
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "lightning": [],
}
FEW = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
PROGRAM = f"""\
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import main
from diffusion import Diffusion

real, calls = Diffusion.training_step, []

def step(self, batch, index):
    calls.append(index)
    if len(calls) == 3 and os.environ.get("LOCAL_RANK", "0") == os.environ["FAULT_RANK"]:
        if os.environ["FAULT"] == "raises":
            raise ZeroDivisionError("a fault of one rank")
        os.kill(os.getpid(), getattr(signal, os.environ["FAULT"]))
    return real(self, batch, index)

Diffusion.training_step = step
if os.environ["FAULT"] == "late" and os.environ.get("LOCAL_RANK", "0") == os.environ["FAULT_RANK"]:
    import time
    from sampling import run as generation
    from training import health
    health.TIDY_SECONDS = 1
    real_write = generation.SamplingRun._write
    generation.SamplingRun._write = lambda self, rows: (time.sleep(5), real_write(self, rows))
if os.environ["FAULT"] == "waits":
    import torch
    real_start, real_validation, real_end = (
        Diffusion.on_fit_start, Diffusion.on_validation_start, Diffusion.on_train_end
    )

    def start(self): # recorded without the compiler, which takes long
        self.backbone.compiled = True
        real_start(self)
        self.backbone.compiled = False

    def step(self, batch, index): # the last one ends with a checkpoint
        polls = [each._poll for each in self.trainer.callbacks if hasattr(each, "_poll")]
        assert polls and all((each.coming is None) == (index == 0) for each in polls)
        torch.cuda.set_sync_debug_mode("error" if 4 < index < 9 else "default")
        return real(self, batch, index)

    def validation(self):
        torch.cuda.set_sync_debug_mode("default")
        real_validation(self)

    def end(self):
        recorded = str(self.graphed.graph is not None)
        print("its steps were recorded: " + recorded + "\\n", end="", flush=True) # in one piece
        real_end(self)

    Diffusion.on_fit_start, Diffusion.training_step = start, step
    Diffusion.on_validation_start, Diffusion.on_train_end = validation, end
code = main.main(sys.argv[1:])
if os.environ["FAULT"] == "late" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("at the end the report is", "there" if os.path.exists("texts.json") else "missing")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [*tiny(folder), *ALGORITHMS["bamdlm"], "trainer.devices=2"]


def launched(launcher, arguments, folder, *, rank="none", fault="raises", timeout=60):
    """(exit code, output) of two processes started by the launcher.

    In its third step `rank` raises an error or sends itself the signal that `fault` names; or it is
    late with its texts. With the fault "waits" all record their steps as CUDA graphs, and asking
    the device for anything is an error from the sixth to the last but one.
    """
    program = folder / "program.py"
    program.write_text(PROGRAM)
    dropped = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_",
        "SLURM_",
        "NODE_RANK",
        "PL_",
        "BAMDLM_",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder if fault == "late" else None,
        env={**kept, **FEW, "FAULT_RANK": rank, "FAULT": fault},
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


def test_both_launchers_train_the_same(overrides, tmp_path):
    arguments = [*overrides, f"checkpointing.save_dir={tmp_path / 'run'}"]
    code, text = launched("lightning", arguments, tmp_path)
    assert code == 0, text
    assert "Warning" not in text
    ours = read(tmp_path / LAST)
    (tmp_path / "run").rename(tmp_path / "first")
    started = ranks(2, arguments, tmp_path / "log.txt")
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    assert differences(ours, read(tmp_path / LAST)) == []


def test_who_is_done_with_its_texts_ends_nobody(overrides, tmp_path):
    """The first process may be the first one to be done; it waits for the others."""
    run = [*overrides, f"checkpointing.save_dir={tmp_path / 'run'}"]
    code, text = launched("lightning", run, tmp_path)
    assert code == 0, text
    words = [*overrides, "mode=sample_eval", f"eval.checkpoint_path={tmp_path / LAST}"]
    words += ["eval.gen_ppl_eval_model_name_or_path=null", "sampling.batch_size=4"]
    words += ["sampling.logdir=texts.csv"]
    code, text = launched("lightning", words, tmp_path, rank="1", fault="late")
    assert code == 0, text
    assert "at the end the report is there" in text
    assert json.loads((tmp_path / "texts.json").read_text())["rows"] == 4


DEATHS = [
    ("torchrun", "1", "SIGKILL"),
    ("torchrun", "1", "raises"),
    ("lightning", "1", "SIGKILL"),
    ("lightning", "1", "raises"),
    ("lightning", "0", "SIGKILL"),  # with the first process goes the one that watches the others
]


@pytest.mark.parametrize(("launcher", "rank", "fault"), DEATHS)
def test_a_rank_that_dies_brings_the_job_down(launcher, rank, fault, overrides, tmp_path):
    arguments = [*overrides, f"checkpointing.save_dir={tmp_path / 'run'}"]
    dies(launcher, arguments, tmp_path, rank=rank, fault=fault)


def dies(launcher, arguments, folder, *, rank, fault, timeout=60):
    code, text = launched(launcher, arguments, folder, rank=rank, fault=fault, timeout=timeout)
    assert code, text
    if fault == "raises":  # the traceback of the fault comes before those of its consequences
        begun, told = text.index("Traceback"), text.index("a fault of one rank")
        assert text.index("rank 1 failed in step 3") < begun < told
        assert text.count("Traceback", 0, told) == 1
