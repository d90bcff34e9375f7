"""trainer.profiler=torch: what the processor and the GPU do in a few steps, as a file for
https://ui.perfetto.dev."""

import gzip
import os
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from utils import reason, say

STEPS = 5  # that are recorded
END = b'"traceName"'  # the last key of a trace
BEFORE = 10  # ahead of them: the first ones compile, choose kernels and record graphs


class TorchTrace(L.Callback):
    """Writes `folder`/trace-step=N-M.json.gz, of the first process. A validation, or the end of the
    run, ends it earlier. Where it cannot be written, training goes on and `failure` says why."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.failure: str | None = None
        self.begin: int | None = None  # the step before the first one; None: it is written
        self.profile: profile | None = None
        self.mark: record_function | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            now = trainer.global_step
            self.begin = now + max(0, min(BEFORE, trainer.max_steps - now - STEPS))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.begin is None or trainer.global_step < self.begin:
            return
        if self.profile is None:
            self.begin = trainer.global_step
            gpu = [ProfilerActivity.CUDA] * (pl_module.device.type == "cuda")
            self.profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self.profile.start()
        self.mark = record_function(f"step {trainer.global_step + 1}")
        self.mark.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.mark is not None:
            self.mark.__exit__(None, None, None)
            self.mark = None
        if self.profile is not None and trainer.global_step >= self.begin + STEPS:
            self._write(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._write(trainer, pl_module)

    on_train_end = on_validation_start

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.profile = self.begin = None

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What there is of steps that have ended, if any is under way to be recorded."""
        if self.profile is None:
            return
        if module.device.type != "cpu":
            torch.accelerator.synchronize(module.device)
        self.profile.stop()
        path = self.folder / f"trace-step={self.begin + 1}-{trainer.global_step}.json.gz"
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".trace") as place:
                os.replace(_exported(self.profile, Path(place)), path)
            say(f"trace of steps {self.begin + 1} to {trainer.global_step}: {path}")
        except (OSError, RuntimeError) as error:
            self.failure = f"{path} could not be written: {reason(error)}"
            print(self.failure, file=sys.stderr, flush=True)
        self.profile = self.begin = None


def _exported(recorded: profile, folder: Path) -> Path:
    """The trace as a file in the folder, whole. By itself torch would make it in $TMPDIR, and
    take what it could not write there for written."""
    plain, made = folder / "trace.json", folder / "trace.json.gz"
    recorded.export_chrome_trace(str(plain))
    if not plain.exists() or END not in (written := plain.read_bytes())[-(1 << 16) :]:
        raise OSError("torch could not write all of it; perhaps there is no room on the disk")
    with gzip.open(made, "wb") as packed:
        packed.write(written)
    return made
