"""torch.compile, its settings, which hold for this project's compiled functions alone, and what a
compiler leaves behind."""

import functools
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

GRAPHS = 32  # of one function: training, validation, sampling; with and without read, cache, gaps


@functools.cache
def compiled(function: Callable) -> Callable:
    """The function, compiled. Not to be called at import: it imports the compiler."""
    return torch.compile(function)


def compiling(on: bool = True) -> AbstractContextManager:
    """To be held around calls of compiled functions. Under ddp a block stays one graph: it ends
    where gradients are exchanged, and torch's own cut would be in pieces of a bucket."""
    if not on:
        return nullcontext()
    config = torch._dynamo.config
    return config.patch(recompile_limit=max(GRAPHS, config.recompile_limit), optimize_ddp=False)


def keep_signal() -> None:
    """To be called between steps. The first kernel that Triton compiles in a process has LLVM put
    a handler of its own in place of Python's, under which SIGUSR1 does nothing: Slurm's warning
    ahead of a time limit would be lost. A handler that was set in Python is set again; without one
    nothing is changed, as the handler may be faulthandler's."""
    known = signal.getsignal(signal.SIGUSR1)
    if callable(known) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, known)
