"""When the figures of training are logged. The row of step n tells of n optimizer steps."""

import time

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from training.csv_log import record
from training.flops import matmul_peak
from training.logged import Steps, figures


class StepLog(L.Callback):
    """Logs the figures of logged.py every trainer.log_every_n_steps and before each validation, so
    that no row lacks them.

    step_flops: of a sequence, forward and backward. dtype: of the matrix products. rates: whether
    the learning rate is among the figures.
    """

    def __init__(self, step_flops: float, dtype: torch.dtype, *, rates: bool):
        super().__init__()
        self.step_flops, self.dtype, self.rates = step_flops, dtype, rates
        self._written = 0  # the step of the last row
        self._rate = 0.0
        self._peak: float | None = None
        self._rows = self._tokens = 0
        self._since = self._paused = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self._written = trainer.global_step
        self._begin()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._rows += len(batch["input_ids"])
        self._tokens += batch["input_ids"].numel()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(trainer, pl_module)
        self._paused = time.monotonic()

    def on_validation_end(self, trainer, pl_module) -> None:
        self._since += time.monotonic() - self._paused

    def _begin(self) -> None:
        self._rows = self._tokens = 0
        self._since = time.monotonic()

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == self._written:
            return  # between two micro-batches, or a run that goes on with a validation
        self._written = trainer.global_step
        if trainer.is_global_zero and trainer.loggers:
            record(trainer, figures(self._steps(module)))

    def _steps(self, module: L.LightningModule) -> Steps:
        """Those since the last row; the next ones begin."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        if self._peak is None:
            self._peak = matmul_peak(module.device, self.dtype)
        done = Steps(
            module=module,
            lr=self._rate if self.rates else None,
            tokens=self._tokens,
            seconds=seconds,
            flops=self.step_flops * self._rows,
            peak=self._peak,
        )
        self._begin()
        return done
