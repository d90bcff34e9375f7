"""What a run logs: one entry for each figure of metrics.csv and wandb; and when. The row of step n
tells of n optimizer steps.

A new figure takes one entry here. The search for the training interval logs its candidates as well
(objectives/clipping.py); their names depend on the settings.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor

from evaluation.likelihood import Likelihood
from training.csv_log import record
from training.flops import matmul_peak, nominal_peak

GIB = 1 << 30


@dataclass
class Steps:
    """The optimizer steps since the last row of the log, on this device."""

    module: L.LightningModule  # the Diffusion; its `health` knows the last step
    lr: float | None = None  # learning rate of the last step; None where another callback logs it
    tokens: int = 0  # of x0
    flops: float = 0.0  # floating-point operations, forward and backward (flops.py)
    seconds: float = 0.0  # without validations
    peak: float = 0.0  # FLOP/s of a large matrix product, measured on this device
    nominal: float | None = None  # FLOP/s of the device as its maker states them, where known

    @property
    def diffusion_loss(self) -> Tensor | None:
        """Of the last step, where its loss has another part."""
        health = self.module.health
        if health.ar_loss is None:
            return None
        return health.loss - self.module.objective.ar_loss * health.ar_loss


@dataclass(frozen=True)
class Logged:
    """`value` makes the figure from the Steps, or with `validation` from a validation's Likelihood;
    None leaves it out.

    doc: its line in docs/settings.md. monitor: checkpoint_monitor may keep the checkpoint with the
    least value.
    """

    value: Callable[[Steps | Likelihood], float | Tensor | None]
    doc: str
    validation: bool = False
    monitor: bool = False


LOGGED = {
    "trainer/grad_norm": Logged(
        lambda steps: steps.module.health.norm,
        doc="Norm of the gradient in the last step, before clipping",
    ),
    "trainer/loss": Logged(
        lambda steps: steps.module.health.loss,
        doc="Loss of the last step: mean over the tokens of its global batch that count",
    ),
    "trainer/diffusion_loss": Logged(
        lambda steps: steps.diffusion_loss,
        doc="With adapt.ar_loss: the part of trainer/loss that is diffusion",
    ),
    "trainer/ar_loss": Logged(
        lambda steps: steps.module.health.ar_loss,
        doc="With adapt.ar_loss: the AR loss of the last step, not yet times the setting",
    ),
    "trainer/lr": Logged(lambda steps: steps.lr, doc="Learning rate of the last step"),
    "trainer/masked_share": Logged(
        lambda steps: steps.module.health.masked,
        doc="Share of the tokens that count that the last step masked, on the first device; not of"
        " ar",
    ),
    "trainer/bad_steps": Logged(
        lambda steps: steps.module.health.bad_steps,
        doc="Steps that were left out since the process began",
    ),
    "throughput/tokens_per_second": Logged(
        lambda steps: steps.tokens / steps.seconds,
        doc="Tokens of text per second and device, without the time of validations",
    ),
    "throughput/tflops": Logged(
        lambda steps: steps.flops / steps.seconds / 1e12,
        doc="10^12 floating-point operations per second and device",
    ),
    "throughput/mfu": Logged(
        lambda steps: steps.flops / steps.seconds / steps.peak,
        doc="The same, as a share of the speed of a large matrix product on this device",
    ),
    "throughput/mfu_nominal": Logged(
        lambda steps: None if not steps.nominal else steps.flops / steps.seconds / steps.nominal,
        doc="The same, as a share of what the maker of the GPU states for bf16; in half precision,"
        " on GPUs that plan.gpu knows",
    ),
    "throughput/memory_gib": Logged(
        lambda steps: peak_memory(steps.module.device) / GIB,
        doc="Most memory in use so far, in GiB: of the GPU, or on a CPU of the process",
    ),
    "val/nll": Logged(
        lambda found: found.nll, doc="Nats per token of validation", validation=True, monitor=True
    ),
    "val/bpd": Logged(
        lambda found: found.bpd, doc="Bits per token of validation", validation=True, monitor=True
    ),
    "val/ppl": Logged(
        lambda found: found.ppl, doc="Perplexity of validation", validation=True, monitor=True
    ),
    "val/nll_error": Logged(
        lambda found: found.nll_error, doc="Standard error of val/nll", validation=True
    ),
    "val/nll_masked_25": Logged(
        lambda found: of_share(found, 0),
        doc="Nats per masked token where up to a quarter of a block is masked, with"
        " eval.likelihood=counts",
        validation=True,
    ),
    "val/nll_masked_50": Logged(
        lambda found: of_share(found, 1), doc="The same for up to a half", validation=True
    ),
    "val/nll_masked_75": Logged(
        lambda found: of_share(found, 2), doc="The same for up to three quarters", validation=True
    ),
    "val/nll_masked_100": Logged(
        lambda found: of_share(found, 3), doc="The same for more than that", validation=True
    ),
}


def of_share(found: Likelihood, part: int) -> float | None:
    """One of the four parts of Likelihood.by_share."""
    return found.by_share[part] if found.by_share else None


def figures(source: Steps | Likelihood) -> dict[str, float]:
    """Those of LOGGED that are made from `source`. Reading them may wait for the device, and under
    strategy=fsdp for the other devices."""
    validation = isinstance(source, Likelihood)
    entries = {name: each for name, each in LOGGED.items() if each.validation == validation}
    values = {name: each.value(source) for name, each in entries.items()}
    known = {name: value for name, value in values.items() if value is not None}
    return {name: float(whole(value)) for name, value in known.items()}


def whole(value: float | Tensor) -> float | Tensor:
    """What was computed from weights that are shared out, put together from all devices."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def peak_memory(device: torch.device) -> int:
    """Bytes, since the process began."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


class StepLog(L.Callback):
    """Logs the figures of training every trainer.log_every_n_steps and before each validation, so
    that no row lacks them.

    step_flops: of a sequence, forward and backward. dtype: of the matrix products. rates: whether
    the learning rate is among the figures.
    """

    def __init__(self, step_flops: float, dtype: torch.dtype, *, rates: bool):
        super().__init__()
        self.step_flops, self.dtype, self.rates = step_flops, dtype, rates
        self._written = 0  # the step of the last row
        self._peak: float | None = None
        self._nominal: float | None = None
        self._steps: Steps | None = None
        self._since = self._paused = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self._written = trainer.global_step
        self._begin(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.rates:
            self._steps.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._steps.tokens += batch["input_ids"].numel()
        self._steps.flops += self.step_flops * len(batch["input_ids"])
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(trainer, pl_module)
        self._paused = time.monotonic()

    def on_validation_end(self, trainer, pl_module) -> None:
        self._since += time.monotonic() - self._paused

    def _begin(self, module: L.LightningModule) -> None:
        self._steps, self._since = Steps(module), time.monotonic()

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == self._written:
            return  # between two micro-batches, or a run that goes on with a validation
        self._written = trainer.global_step
        if not trainer.loggers:
            return
        done = self._steps
        done.seconds = max(time.monotonic() - self._since, 1e-9)
        if self._peak is None:
            self._peak = matmul_peak(module.device, self.dtype)
            self._nominal = nominal_peak(module.device, self.dtype)
        done.peak, done.nominal = self._peak, self._nominal
        self._begin(module)
        found = figures(done)  # on all devices: they share out what it may read
        if trainer.is_global_zero:
            record(trainer, found)
