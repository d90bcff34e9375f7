"""The exponential moving average of the weights, kept by parameter name. After n updates the decay
is min(decay, (1 + n) / (10 + n)) (the warm-up of the published runs)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class EMA:
    """`shadow`: {name: average}, in the order of the model's parameters, float32 like them."""

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"training.ema must lie in (0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.shadow = {name: p.detach().clone() for name, p in named_parameters}

    @torch.no_grad()
    def update(
        self, named_parameters: Iterable[tuple[str, Tensor]], unless: Tensor | None = None
    ) -> None:
        """Move every average towards its parameter; once per optimizer step. `unless`, on the
        device: where it is 1 and not 0 no average moves, though an update is counted."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current = dict(named_parameters)
        _same_names(self.shadow, current)
        values = [current[name].detach() for name in self.shadow]
        weight = 1 - decay if unless is None else [(1 - decay) * (1 - unless)] * len(values)
        torch._foreach_lerp_(list(self.shadow.values()), values, weight)

    @torch.no_grad()
    def swap(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Exchange the averages with the weights; a second call undoes the first, bit for bit."""
        current = dict(named_parameters)
        _same_names(self.shadow, current)
        for name, average in self.shadow.items():
            kept = current[name].detach().clone()
            current[name].copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor], num_updates: int) -> None:
        """Take over averages by name; every name must be there, with its shape."""
        _same_names(self.shadow, shadow)
        for name, average in self.shadow.items():
            if average.shape != shadow[name].shape:
                raise ValueError(
                    f"the EMA of {name} has shape {tuple(shadow[name].shape)},"
                    f" the model's is {tuple(average.shape)}"
                )
            average.copy_(shadow[name])
        self.num_updates = num_updates

    def to(self, device: torch.device) -> None:
        self.shadow = {name: average.to(device) for name, average in self.shadow.items()}


def _same_names(ours: Mapping, theirs: Mapping) -> None:
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(f"the EMA and the model differ in {len(odd)} parameters, first {odd[:3]}")
