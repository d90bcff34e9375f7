"""What every kernel needs: a GPU and a compiler to start on; a way to say what its gradient is."""

import functools
import os
import shutil
from collections.abc import Callable

import torch

SHARED_MEMORY = 99 << 10  # bytes per block; the largest variant of all takes 96 K


def can_start(device: torch.device) -> bool:
    """Whether Triton finds the C compiler that it starts kernels with, and the GPU has room for the
    largest tiles: NVIDIA's from Ampere on. torch.compile, which cannot look, needs the same."""
    return torch.compiler.is_compiling() or _can_start(device)


@functools.cache
def _can_start(device: torch.device) -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return compiler is not None and room >= SHARED_MEMORY


def differentiated_by(backward: Callable, keep: Callable) -> Callable:
    """A decorator of an operator; both as torch's register_autograd takes them."""

    def add(operator):
        operator.register_autograd(backward, setup_context=keep)
        return operator

    return add
