"""How fast training is and how much of the device it uses, in the run's log.

Logged with the loss (step_log.py), per device, over the steps since the last time:

    throughput/tokens_per_second    of x0, validation left out
    throughput/tflops               those of flops.py per second
    throughput/mfu                  as a share of a matrix product's speed, measured here once
    throughput/memory_gib           peak: of the accelerator, or of the process on a CPU
"""

import resource
import time

import torch

from training.flops import matmul_peak
from training.step_log import StepRows

GIB = 1 << 30


class Throughput(StepRows):
    """step_flops: of a sequence, forward and backward; dtype: of the matrix products."""

    def __init__(self, step_flops: float, dtype: torch.dtype):
        super().__init__()
        self.step_flops, self.dtype = step_flops, dtype
        self._peak: float | None = None
        self._rows = self._tokens = 0
        self._since = self._paused = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._rows += len(batch["input_ids"])
        self._tokens += batch["input_ids"].numel()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _begin(self) -> None:
        self._rows = self._tokens = 0
        self._since = time.monotonic()

    def figures(self, trainer, module) -> dict[str, float]:
        device, seconds = module.device, max(time.monotonic() - self._since, 1e-9)
        if self._peak is None:
            self._peak = matmul_peak(device, self.dtype)
        flops_per_second = self.step_flops * self._rows / seconds
        found = {
            "throughput/tokens_per_second": self._tokens / seconds,
            "throughput/tflops": flops_per_second / 1e12,
            "throughput/mfu": flops_per_second / self._peak,
            "throughput/memory_gib": peak_memory(device) / GIB,
        }
        self._begin()
        return found

    def on_validation_start(self, trainer, pl_module) -> None:
        super().on_validation_start(trainer, pl_module)
        self._paused = time.monotonic()

    def on_validation_end(self, trainer, pl_module) -> None:
        self._since += time.monotonic() - self._paused


def peak_memory(device: torch.device) -> int:
    """Bytes, since the process began."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)
