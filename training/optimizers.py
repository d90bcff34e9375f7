"""The optimizers: AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the
rest, as one optimizer that Lightning, schedules and checkpoints know."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# Numbers of a state, beside which AdamW has its step
STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


@dataclass(frozen=True)
class OptimizerSettings:
    """`adamw`: arguments of AdamW, of which Muon takes lr and weight_decay too. `momentum`: of
    Muon; None: AdamW for all."""

    adamw: dict
    momentum: float | None = None

    @property
    def muon(self) -> dict:
        """Arguments of Muon. Its steps are as long as AdamW's (arXiv:2502.16982), so that one
        learning rate serves both."""
        shared = {name: self.adamw[name] for name in ("lr", "weight_decay")}
        return {**shared, "momentum": self.momentum, "adjust_lr_fn": "match_rms_adamw"}


def trained(backbone: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters that are not frozen, by name: what optimizer and average know."""
    return [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]


def matrices(backbone: nn.Module) -> list[Tensor]:
    """The weights that Muon is for: those of attention and MLP in the blocks. Embeddings, head,
    norms, biases, modulations and the embedding of the noise level are not."""
    return [
        p
        for name, p in backbone.blocks.named_parameters()
        if p.dim() == 2 and "adaLN_modulation" not in name
    ]


def shared_out(backbone: nn.Module, settings: OptimizerSettings) -> dict[str, list[Tensor]]:
    """{kind: its weights}, in the order of the groups of the optimizer."""
    everything = [p for _, p in trained(backbone)]
    if settings.momentum is None:
        return {"adamw": everything}
    chosen = matrices(backbone)
    taken = set(map(id, chosen))
    return {"muon": chosen, "adamw": [p for p in everything if id(p) not in taken]}


def build_optimizer(backbone: nn.Module, settings: OptimizerSettings, fused: bool) -> Optimizer:
    """fused: AdamW in one pass over its weights."""
    parts = shared_out(backbone, settings)
    adamw = AdamW(parts["adamw"], fused=fused, **settings.adamw)
    if settings.momentum is None:
        return adamw
    return MuonAdamW(torch.optim.Muon(parts["muon"], **settings.muon), adamw)


class MuonAdamW(Optimizer):
    """Two optimizers as one: two groups of parameters, one state. Each of them works on its group,
    whose numbers (the learning rate of a schedule, what a checkpoint has) are shared."""

    def __init__(self, muon: Optimizer, adamw: Optimizer):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        for part, group in zip((self.muon, self.adamw), self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict) -> None:
        """What load_state_dict ends with: the groups and the state are new objects."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Weights without a gradient stay as they are, and so do their states."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.muon.step()
        self.adamw.step()
        return loss
