"""What a person sees while a run works: a bar with loss, perplexity, rate and time left.

In a terminal it is a rich progress bar, in a log file a line every LINE_SECONDS. Figures are read
from the device only when they are shown, so training does not wait for them.
"""

import math
import sys
import time
from collections import deque

import torch
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich import get_console, progress
from rich.table import Table
from torch import Tensor

from utils import say

REFRESH_SECONDS = 0.5  # of the bar in a terminal
LINE_SECONDS = 30  # between lines in a log file
BAR_STEPS = 50  # whose mean loss the bar shows; a line shows that of the steps since the last line


class RunProgress(ProgressBar):
    """Training and validation progress on the first process of a job."""

    def __init__(self):
        super().__init__()
        self._enabled = True
        self._bar: progress.Progress | None = None
        self._train = self._valid = None
        self._shown = 0.0
        self._step = 0
        self._losses: deque[Tensor] = deque()
        self._tokens = 0  # since _since
        self._since = 0.0
        self._paused = 0.0

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args, **kwargs) -> None:
        (self._bar.console.print if self._bar else say)(*args, **kwargs)

    def on_train_start(self, trainer, pl_module) -> None:
        self._open()
        if self._bar:
            self._train = self._bar.add_task(
                "train", total=trainer.max_steps, completed=trainer.global_step, figures=""
            )
        self._step = trainer.global_step
        self._losses = deque(maxlen=BAR_STEPS if self._bar else None)
        self._since = self._shown = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        if self._enabled and trainer.global_step > self._step:
            self._step = trainer.global_step
            self._losses.append(pl_module.health.loss)
        if not self._losses or not self._due():
            return
        now = time.monotonic()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        losses = torch.stack([*self._losses])
        loss = float(losses[losses.isfinite()].mean())  # without steps that were left out
        figures = f"loss {loss:.3f}  ppl {_ppl(loss)}  {rate:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._train, completed=trainer.global_step, figures=figures)
        else:
            self._losses.clear()
            place = f"step {trainer.global_step:,} of {trainer.max_steps:,}"
            batches = (trainer.max_steps - self._step) * trainer.accumulate_grad_batches
            left = batches * batch["input_ids"].numel() * trainer.world_size / max(rate, 1e-9)
            say(f"{place}  {figures}  {_duration(left)} left")

    def on_train_end(self, trainer, pl_module) -> None:
        if self._bar:
            self._bar.update(self._train, completed=trainer.global_step)
        self._close()

    def on_validation_start(self, trainer, pl_module) -> None:
        self._open()
        self._paused = time.monotonic()
        if self._bar:
            batches = sum(n for n in trainer.num_val_batches if math.isfinite(n))
            name = "check" if trainer.sanity_checking else "valid"
            self._valid = self._bar.add_task(name, total=batches or None, figures="")
        elif not trainer.sanity_checking:
            self._shown = time.monotonic()

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self.on_validation_part(trainer, pl_module, batch_idx + 1)

    def on_validation_part(self, trainer, pl_module, done: float) -> None:
        """done: batches, of the last perhaps a part."""
        if not self._due():
            return
        so_far, figures = pl_module.running_likelihood(), ""
        if so_far is not None:
            figures = f"ppl {so_far.ppl:.2f} ± {so_far.ppl_error:.2f}  {so_far.rows:,} rows"
        if self._bar:
            self._bar.update(self._valid, completed=done, figures=figures)
        else:
            check, batches = trainer.sanity_checking, trainer.num_val_batches[0]
            what = "check of the validation, batch" if check else "validation batch"
            batches = trainer.num_sanity_val_batches[0] if check else batches
            part = f"{done:,.2f}".removesuffix(".00")
            say(f"{what} {part} of {batches:,}  {figures}")

    def on_validation_end(self, trainer, pl_module) -> None:
        if self._bar:
            self._bar.remove_task(self._valid)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            found = pl_module.validated
            self.print(
                f"step {trainer.global_step:,}: validation perplexity {_ppl(found.nll)} ±"
                f" {found.ppl_error:.2f} ({found.nll:.4f} nats per token, {found.rows:,} rows)"
            )
        if trainer.state.fn != TrainerFn.FITTING:
            self._close()
        self._since += time.monotonic() - self._paused

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._close()

    def _open(self) -> None:
        if self._enabled and self._bar is None and sys.stdout.isatty():
            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[figures]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar.start()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _due(self) -> bool:
        now = time.monotonic()
        due = now - self._shown > (REFRESH_SECONDS if self._bar else LINE_SECONDS)
        if due:
            self._shown = now
        return due and self._enabled


class NetworkSummary(ModelSummary):
    """Lightning's table of layers, less its FLOPs: without an example to run it counts none."""

    @staticmethod
    def summarize(columns, total_parameters, *args, **kwargs):
        columns = {name: values for name, values in columns if name not in ("Mode", "FLOPs")}
        shown = Table(*columns)
        for row in zip(*columns.values(), strict=True):
            shown.add_row(*row)
        console = get_console()
        console.print(shown)
        console.print(f"{total_parameters:,} parameters")


def _ppl(nll: float) -> str:
    return f"{math.exp(nll):.2f}" if nll < 20 else "inf"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
