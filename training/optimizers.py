"""The optimizers: AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the
rest, as one optimizer that Lightning, schedules and checkpoints know; and the float32 masters of
weights that are kept in bfloat16."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.optim import AdamW, Optimizer

# Numbers of a state, beside which AdamW has its step
STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


@dataclass(frozen=True)
class OptimizerSettings:
    """`adamw`: arguments of AdamW, of which Muon takes lr and weight_decay too. `momentum`: of
    Muon; None: AdamW for all. `masters`: weights are kept in bfloat16, and their masters here."""

    adamw: dict
    momentum: float | None = None
    masters: bool = False

    @property
    def muon(self) -> dict:
        """Arguments of Muon. Its steps are as long as AdamW's (arXiv:2502.16982), so that one
        learning rate serves both."""
        shared = {name: self.adamw[name] for name in ("lr", "weight_decay")}
        return {**shared, "momentum": self.momentum, "adjust_lr_fn": "match_rms_adamw"}


def trained(backbone: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters that are not frozen, by name: what optimizer and average know. Where weights
    are kept in bfloat16, their masters."""
    masters = getattr(backbone, "masters", None) or {}
    named = backbone.named_parameters()
    return [(name, masters.get(name, p)) for name, p in named if p.requires_grad]


def matrices(backbone: nn.Module) -> list[Tensor]:
    """The weights that Muon is for: those of attention and MLP in the blocks. Embeddings, head,
    norms, biases, modulations and the embedding of the noise level are not."""
    chosen = {
        id(p)
        for name, p in backbone.blocks.named_parameters()
        if p.dim() == 2 and "adaLN_modulation" not in name
    }
    named = dict(backbone.named_parameters())
    return [p for name, p in trained(backbone) if id(named[name]) in chosen]


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


class Masters(dict[str, nn.Parameter]):
    """Float32 copies of the trained weights of a network, by name, as training in mixed precision
    keeps them (arXiv:1710.03740, section 3.1): steps, averages and checkpoints are of the masters,
    and the weights are the masters rounded to bfloat16. Frozen weights have none."""

    def __init__(self, backbone: nn.Module):
        """Rounds the weights of the network in place."""
        super().__init__((name, nn.Parameter(p.detach().clone())) for name, p in trained(backbone))
        for p in backbone.parameters():
            p.data = p.data.bfloat16()
        self.weights = {name: p for name, p in backbone.named_parameters() if name in self}
        self.of = {id(p): self[name] for name, p in self.weights.items()}

    def to(self, device: torch.device) -> None:
        for master in self.values():
            master.data = master.data.to(device)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over values by name; the weights do not change."""
        for name, master in self.items():
            master.copy_(state[name])

    @torch.no_grad()
    def round(self) -> None:
        """Into the weights."""
        torch._foreach_copy_(list(self.weights.values()), list(self.values()))

    @torch.no_grad()
    def collect(self) -> None:
        """After a backward pass: add the gradients of the weights to those of the masters."""
        for name, p in self.weights.items():
            if p.grad is not None:
                wide, master = p.grad.float(), self[name]
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                p.grad = None


def exchange(masters: Masters, bucket: GradBucket) -> Future[Tensor]:
    """A communication hook of DistributedDataParallel: the means over devices are made in float32,
    together with what the masters have from earlier passes, and lie at the masters; the weights
    get zeros."""
    narrow = bucket.buffer()
    wide = narrow.float()
    begin, pairs = narrow.storage_offset(), []
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        part = wide.as_strided(grad.size(), grad.stride(), grad.storage_offset() - begin)
        pairs.append((masters.of[id(p)], part))
    for master, part in pairs:
        if master.grad is not None:
            part += master.grad
    wide /= distributed.get_world_size()

    def arrived(_: Future) -> Tensor:
        for master, part in pairs:
            master.grad = part
        return narrow.zero_()

    return distributed.all_reduce(wide, async_op=True).get_future().then(arrived)
