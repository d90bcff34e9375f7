"""Activation checkpointing (arXiv:1604.06174): what layers keep for the backward pass takes most of
the memory of training; the backward pass can make it again from the layer's input.

A network runs its layers through Recompute. Values and gradients are those without it, bit for bit:
the random numbers of dropout are drawn again from the same state.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from .compiling import compiling

# Which layers are made again: of the number of a layer and of how many there are. Never the last
# one, whose turn comes as soon as it is made. Half of them: every second one, counted from the last
# but one, which is kept: its memory is free when the one before it is made again.
ACTIVATION_CHECKPOINTING = {
    "none": lambda number, layers: False,
    "full": lambda number, layers: number < layers - 1,
    "selective": lambda number, layers: number < layers - 1 and (layers - number) % 2 == 1,
}


class Recompute:
    """`name`: of ACTIVATION_CHECKPOINTING, model.activation_checkpointing; or ValueError."""

    def __init__(self, name: str):
        if name not in ACTIVATION_CHECKPOINTING:
            raise ValueError(
                "model.activation_checkpointing must be one of"
                f" {', '.join(ACTIVATION_CHECKPOINTING)}, got {name!r}"
            )
        self.name = name

    def __bool__(self) -> bool:
        return self.name != "none"

    def layers(self, count: int) -> list[int]:
        """The numbers of those that are made again, of `count`."""
        again = ACTIVATION_CHECKPOINTING[self.name]
        return [number for number in range(count) if again(number, count)]

    def __call__(self, run: Callable, layers: torch.nn.ModuleList, number: int, *arguments):
        """run(layer, *arguments) of a layer; where its gradients may be wanted and it is one of
        those, without keeping more than the arguments. run may be compiled."""
        layer = layers[number]
        again = ACTIVATION_CHECKPOINTING[self.name](number, len(layers))
        if not again or not torch.is_grad_enabled():
            return run(layer, *arguments)
        return checkpoint(_run, run, layer, *arguments, use_reentrant=False)


def _run(run: Callable, *arguments):
    with compiling():  # the second time nobody else holds it
        return run(*arguments)
