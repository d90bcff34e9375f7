"""GPUs that a plan may name, and the share of their speed that a training reaches."""

from dataclasses import dataclass

import torch

from settings import Config
from training.flops import GPUS, matmul_dtype, matmul_peak

GIB = 1 << 30
# Of the memory, what a run may take: the rest is for CUDA's context, NCCL's buffers and gaps.
USABLE = 0.97
# docs/performance.md, one H200, model=small, 32 rows a step, with the fastest attention: the share
# of a large matrix product's speed that training reaches, compiled and not.
MFU = {"bamdlm": (0.504, 0.469), "mdlm": (0.495, 0.415), "ar": (0.510, 0.477)}
NOT_MEASURED = "mdlm"  # stands for algorithms that are not in MFU
REACHED = 0.77  # that speed as a share of `peak`: 747 to 795 of 989 TFLOP/s, H100 and H200
SEVERAL = 0.955  # of the sum of their speeds: two GPUs of one host, with ddp


def mfu(algo: str, compiled: bool) -> float:
    """Share of a large matrix product's speed."""
    return MFU.get(algo, MFU[NOT_MEASURED])[0 if compiled else 1]


def room(memory: float) -> float:
    """Bytes that a run may take of a GPU's."""
    return USABLE * memory


@dataclass(frozen=True)
class Gpu:
    """One that is named or at hand."""

    name: str
    memory: float  # bytes
    peak: float  # FLOP/s of a large matrix product
    source: str  # of the peak


def gpu_of(config: Config) -> Gpu | None:
    """The GPU of a plan; the speed of one at hand is measured."""
    if (name := config.plan.gpu) is not None:
        gpu, source = GPUS[name], f"{REACHED:.0%} of {GPUS[name]['peak']:,.0f} TFLOP/s"
        return Gpu(name, gpu["memory"] * 1e9, gpu["peak"] * 1e12 * REACHED, source)
    device = torch.accelerator.current_accelerator()
    if config.trainer.accelerator != "gpu" or device is None:
        return None
    peak = matmul_peak(device, matmul_dtype(config.trainer.precision))
    memory = torch.cuda.get_device_properties(device).total_memory
    return Gpu("this GPU", memory, peak, f"measured {peak / 1e12:.0f} TFLOP/s")
