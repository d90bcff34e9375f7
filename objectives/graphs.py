"""A loss and its gradients as two CUDA graphs: a small step is a thousand kernels, and starting
them one by one takes the host longer than the device needs to run them.

A graph has fixed shapes. The number of hidden tokens changes from batch to batch, so some more rows
are read than asked for (`Question.padded`); a batch that has more still gets a graph with more.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .question import Question

WARM_UP = 2  # steps of a shape that run as they are: what is compiled or chosen on first use is
ROWS = 128  # the number of rows read is a multiple of
BESIDE_NCCL = "thread_local"  # a recording: NCCL's own thread asks the device for events meanwhile


class _Asked(nn.Module):
    """The loss as a function of the weights. Without autocast's memory: a cast of a weight that is
    kept from before a recording would never be made again."""

    def __init__(self, backbone: nn.Module, loss: Callable):
        super().__init__()
        self.backbone, self.loss = backbone, loss

    def forward(self, question: Question) -> Tensor:
        device = question.tokens.device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype, enabled=on, cache_enabled=False):
            return self.loss(self.backbone, question)


class GraphedLoss:
    """`loss(backbone, question)`, a scalar on a CUDA device, as a graph once its shapes have been
    met; so are its gradients with respect to the weights, which must stay where they are.

    `send` brings a question to the device. `shared`: gradients of several calls are added up, so
    each gets memory of its own.
    """

    def __init__(self, backbone: nn.Module, loss: Callable, send: Callable, shared: bool):
        self.ask, self.send, self.shared = _Asked(backbone, loss), send, shared
        self.shape: torch.Size | None = None
        self.rows = 0
        self.seen = 0
        self.graph: _Graph | None = None

    def __call__(self, question: Question) -> Tensor:
        if question.segments is not None or len(question.targets) == 0:
            return self.ask(self.send(question))  # the mask of documents is another each time
        if question.tokens.shape != self.shape or len(question.targets) > self.rows:
            self.shape, self.seen, self.graph = question.tokens.shape, 0, None
            self.rows = rows_for(len(question.targets), question.counted.numel())
        question = self.send(question.padded(self.rows))
        if self.seen < WARM_UP:
            self.seen += 1
            return self.ask(question)
        if self.graph is None:
            self.graph = _Graph(self.ask, question, self.shared)
        return _Replayed.apply(self.graph, question, *self.ask.parameters())


def rows_for(asked: int, most: int) -> int:
    """A multiple of ROWS with some room above `asked`: the number of hidden tokens varies little
    where times are antithetic."""
    return min(most, -(-(asked + asked // 64 + ROWS // 2) // ROWS) * ROWS)


class _Graph:
    def __init__(self, ask: _Asked, question: Question, shared: bool):
        self.shared = shared
        # clones: what the host has sent is not ours
        self.question = replace(question, **{n: x.clone() for n, x in question.tensors().items()})
        # the same memory, but nothing in autograd's books that belongs to another stream
        weights = {n: nn.Parameter(p.detach()) for n, p in ask.named_parameters()}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, capture_error_mode=BESIDE_NCCL):
            value = torch.func.functional_call(ask, weights, (self.question,))
        self.d_value = torch.ones_like(value)
        with (
            torch.autocast(question.tokens.device.type, enabled=False),
            torch.cuda.graph(
                self.backward, pool=self.forward.pool(), capture_error_mode=BESIDE_NCCL
            ),
        ):
            self.gradients = torch.autograd.grad(
                value, list(weights.values()), self.d_value, allow_unused=True
            )
        self.value = value.detach()

    def load(self, question: Question) -> None:
        given = question.tensors()
        for name, ours in self.question.tensors().items():
            ours.copy_(given[name])


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, question: Question, *parameters) -> Tensor:
        ctx.graph = graph
        graph.load(question)
        graph.forward.replay()
        return graph.value.clone()

    @staticmethod
    def backward(ctx, d_value: Tensor):
        graph = ctx.graph
        graph.d_value.copy_(d_value)
        graph.backward.replay()
        give = Tensor.clone if graph.shared else Tensor.detach
        return None, None, *(None if g is None else give(g) for g in graph.gradients)
