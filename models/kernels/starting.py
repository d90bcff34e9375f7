"""What every kernel needs: a GPU and a compiler to start on; a way to say what its gradient is."""

import functools
import os
import re
import shutil
from collections.abc import Callable

import torch

try:  # see decode.py
    import triton
except ImportError:
    triton = None

SHARED_MEMORY = 99 << 10  # bytes per block; decode.py takes up to 96 K


def can_start(device: torch.device) -> bool:
    """Whether this is a GPU and Triton is there, which finds the C compiler that it starts kernels
    with, and the GPU has room for the largest tiles: NVIDIA's from Ampere on. Inside what
    torch.compile compiles nobody can look; there Triton runs already, and kernels with large tiles
    must have been chosen outside (flex in attention.py)."""
    if triton is None or device.type != "cuda":
        return False
    if torch.version.hip is not None:  # AMD's: not tried, and some options are NVIDIA's
        return False
    return torch.compiler.is_compiling() or _can_start(device)


@functools.cache
def _can_start(device: torch.device) -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return compiler is not None and room >= SHARED_MEMORY


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def operator(module: str, name: str, *, mutates_args: tuple[str, ...]) -> Callable:
    """A decorator: torch.library.custom_op under the name of its module. An export brings these
    files along, and a second operator of one name would end the process at the next use of the
    first."""
    space = re.sub(r"\W", "_", module)
    return torch.library.custom_op(f"{space}::{name}", mutates_args=mutates_args)


def differentiated_by(backward: Callable, keep: Callable) -> Callable:
    """A decorator of an operator; both as torch's register_autograd takes them."""

    def add(operator):
        operator.register_autograd(backward, setup_context=keep)
        return operator

    return add
