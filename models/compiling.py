"""Settings of torch.compile that hold while this project's compiled functions are called, and for
nothing else in the process."""

from contextlib import AbstractContextManager, nullcontext

import torch

GRAPHS = 32  # of one function: training, validation, sampling; with and without read, cache, gaps


def compiling(compiled: bool = True) -> AbstractContextManager:
    """To be held around calls of compiled functions. Under ddp a block stays one graph: it ends
    where gradients are exchanged, and torch's own cut would be in pieces of a bucket."""
    if not compiled:
        return nullcontext()
    config = torch._dynamo.config
    return config.patch(recompile_limit=max(GRAPHS, config.recompile_limit), optimize_ddp=False)
