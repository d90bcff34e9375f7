"""A loss and its gradients as two CUDA graphs: a small step is a thousand kernels, and starting
them one by one takes the host longer than the device needs to run them.

A graph has fixed shapes. The number of masked tokens changes from batch to batch, so there are some
more loss positions than needed (`LossInputs.padded`); a batch of more still gets another graph.

With noise by counts the number is the same in every step where one pass holds the global batch, all
tokens of its blocks are scored and the law deals whole strata to each count. Otherwise it varies a
little: first blocks have a law of their own, and a pass holds a part of the strata. The room is
left in any case; it costs at most 1 / 64 of the rows read, and ROWS more. With two views every
scored token is read once, so there is room for all tokens of the batch and no more.

Where rows differ in the size of their blocks, the sizes are an input: the graph makes the attention
mask from them. Packed documents have no graph.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.masks import AttentionMask

from .loss import LossInputs

WARM_UP = 2  # steps of a shape that run as they are: what is compiled or chosen on first use is
ROWS = 128  # the number of rows read is a multiple of
BESIDE_NCCL = "thread_local"  # a recording: NCCL's own thread asks the device for events meanwhile


class _Asked(nn.Module):
    """The loss as a function of the weights. Without autocast's memory: a cast of a weight that is
    kept from before a recording would never be made again."""

    def __init__(self, backbone: nn.Module, loss: Callable):
        super().__init__()
        self.backbone, self.loss = backbone, loss

    def forward(self, inputs: LossInputs) -> Tensor:
        device = inputs.tokens.device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype, enabled=on, cache_enabled=False):
            return self.loss(self.backbone, inputs)


class GraphedLoss:
    """`loss(backbone, inputs)`, TokenLoss.parts on a CUDA device, as a graph once its shapes have
    been met; so are its gradients with respect to the weights, which must stay where they are.
    `send` brings the inputs to the device. `shared`: gradients of several calls are added up."""

    def __init__(self, backbone: nn.Module, loss: Callable, send: Callable, shared: bool):
        self.ask, self.send, self.shared = _Asked(backbone, loss), send, shared
        self.shape: tuple[torch.Size, AttentionMask] | None = None
        self.rows = self.seen = 0
        self.graph: _Graph | None = None

    def __call__(self, inputs: LossInputs) -> Tensor:
        if inputs.document_ids is not None or len(inputs.targets) == 0:
            return self.ask(self.send(inputs))  # the mask of documents is another each time
        shape = inputs.tokens.shape, inputs.attention_mask  # whose blocks may have grown
        if shape != self.shape or len(inputs.targets) > self.rows:
            self.shape, self.seen, self.graph = shape, 0, None
            # each token once, and once more by an AR loss
            most = inputs.loss_mask.numel() * (1 if inputs.ar_weights is None else 2)
            self.rows = rows_for(len(inputs.targets), most)
        inputs = self.send(inputs.padded(self.rows))
        if self.seen < WARM_UP:
            self.seen += 1
            return self.ask(inputs)
        if self.graph is None:
            self.graph = _Graph(self.ask, inputs, self.shared)
        trained = [p for p in self.ask.parameters() if p.requires_grad]
        return _Replayed.apply(self.graph, inputs, *trained)


def rows_for(asked: int, most: int) -> int:
    """A multiple of ROWS with some room above `asked`: the number of masked tokens varies little
    where times are antithetic."""
    return min(most, -(-(asked + asked // 64 + ROWS // 2) // ROWS) * ROWS)


class _Graph:
    def __init__(self, ask: _Asked, inputs: LossInputs, shared: bool):
        self.shared = shared
        # clones: what the host has sent is not ours
        self.loss_inputs = replace(inputs, **{n: x.clone() for n, x in inputs.tensors().items()})
        # the same memory, but nothing in autograd's books that belongs to another stream
        weights = {n: nn.Parameter(p.detach(), p.requires_grad) for n, p in ask.named_parameters()}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, capture_error_mode=BESIDE_NCCL):
            value = torch.func.functional_call(ask, weights, (self.loss_inputs,))
        self.d_value = torch.ones_like(value)
        with (
            torch.autocast(inputs.tokens.device.type, enabled=False),
            torch.cuda.graph(
                self.backward, pool=self.forward.pool(), capture_error_mode=BESIDE_NCCL
            ),
        ):
            self.gradients = torch.autograd.grad(
                value,
                [p for p in weights.values() if p.requires_grad],
                self.d_value,
                allow_unused=True,
            )
        self.value = value.detach()

    def load(self, inputs: LossInputs) -> None:
        given = inputs.tensors()
        for name, ours in self.loss_inputs.tensors().items():
            ours.copy_(given[name])


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, inputs: LossInputs, *parameters) -> Tensor:
        ctx.graph = graph
        graph.load(inputs)
        graph.forward.replay()
        return graph.value.clone()

    @staticmethod
    def backward(ctx, d_value: Tensor):
        graph = ctx.graph
        graph.d_value.copy_(d_value)
        graph.backward.replay()
        give = Tensor.clone if graph.shared else Tensor.detach
        return None, None, *(None if g is None else give(g) for g in graph.gradients)
