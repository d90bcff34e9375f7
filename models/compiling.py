"""torch.compile, and its settings, which hold for this project's compiled functions alone."""

import functools
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
