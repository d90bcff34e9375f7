"""Evaluations as CUDA graphs: a pass over a block is a thousand small kernels, and starting them
one by one takes the host longer than the device needs to run them.

A function is run as it is when it first meets tensors of some shapes, recorded the second time and
replayed from then on: the same kernels in the same order, so the same numbers.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Replay:
    """Recordings of functions of tensors on one CUDA device; they share their memory."""

    def __init__(self):
        self.recordings: dict[Hashable, _Recording] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, name: Hashable, function: Callable[..., None], *inputs: Tensor) -> None:
        """function(*inputs), which writes to tensors of the caller. Under one name all it reads and
        writes beside the inputs must stay where it is."""
        key = (name, *((x.shape, x.dtype) for x in inputs))
        if key not in self.recordings:
            self.recordings[key] = _Recording(inputs)
        self.recordings[key](function, inputs, self.pool)

    def forget(self) -> None:
        """The tensors beside the inputs have moved. A pool ends with the last recording in it."""
        self.recordings.clear()
        self.pool = torch.cuda.graph_pool_handle()


class _Recording:
    def __init__(self, inputs: tuple[Tensor, ...]):
        self.inputs = [x.clone() for x in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tried = False

    def __call__(self, function, inputs: tuple[Tensor, ...], pool) -> None:
        for ours, given in zip(self.inputs, inputs, strict=True):
            ours.copy_(given)
        if not self.tried:  # on the very tensors of the recording: nothing is compiled during it
            self.tried = True
            function(*self.inputs)
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                function(*self.inputs)
            self.graph = graph
        self.graph.replay()
