"""LoRA (arXiv:2106.09685): a linear layer W becomes W + alpha / rank * B A, and A and B alone are
trained; beside them the row of the embedding that belongs to the mask.

These are not peft's layers. peft puts each layer into another one, which renames the weights that
checkpoints, averages and errors call by name, and it would be needed to read a checkpoint; the
DiT's fused queries, keys and values are used in parts, of which peft knows nothing. The figures
are peft's, and checkpointing/adapter_folder.py writes its format.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED = ("lora_A", "lora_B", "mask_row")  # the last parts of the names of what is trained
TABLES = ("weight", "embedding")  # of an embedding, in either network


@dataclass(frozen=True)
class Adapter:
    """`modules`: as `choose` knows them; None: all. `mask_id`: whose row of the embedding is
    trained; None: no row. `dropout`: of what enters A."""

    rank: int
    alpha: float
    dropout: float = 0.0
    modules: tuple[str, ...] | None = None
    mask_id: int | None = None


class LoRALinear(nn.Linear):
    """Takes over weight and bias of `base`. B begins as 0, A as in peft."""

    def __init__(self, base: nn.Linear, adapter: Adapter):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.scale, self.dropout = adapter.alpha / adapter.rank, adapter.dropout
        self.lora_A = nn.Parameter(base.weight.new_empty(adapter.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, adapter.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, self.weight, self.lora_B, self.bias)

    def part(self, x: Tensor, weight: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Some outputs for x [..., in]: those of these rows of the weight and of B."""
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return F.linear(x, weight, bias) + self.scale * F.linear(inner, b)


def parts(linear: nn.Linear, sizes: tuple[int, ...]) -> list[Callable[[Tensor], Tensor]]:
    """A layer without bias as several, of so many outputs each, one after another."""
    weights = linear.weight.split(sizes)
    if not isinstance(linear, LoRALinear):
        return [partial(F.linear, weight=weight) for weight in weights]
    pairs = zip(weights, linear.lora_B.split(sizes), strict=True)
    return [partial(linear.part, weight=weight, b=b) for weight, b in pairs]


def choose(blocks: nn.Module, modules: tuple[str, ...] | None) -> dict[str, nn.Linear]:
    """{name in `blocks`: layer}: all linear layers of the blocks, or those whose name in a block
    ends with one of `modules`, as in peft. ValueError where one of them names none."""
    linear = {name: m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    if modules is None:
        return linear

    def named(name: str, by: str) -> bool:
        return f".{name.partition('.')[2]}".endswith(f".{by}")

    for each in modules:
        if not any(named(name, each) for name in linear):
            known = ", ".join(dict.fromkeys(name.partition(".")[2] for name in linear))
            raise ValueError(
                f"lora.modules: no linear layer of the blocks is {each}; known: {known}"
            )
    return {name: m for name, m in linear.items() if any(named(name, each) for each in modules)}


def adapt(network: nn.Module, adapter: Adapter) -> None:
    """Put the adapters into a network that has the weights to start from; all else is frozen.
    ValueError where a layer is not there, or none is as wide as the rank."""
    chosen = choose(network.blocks, adapter.modules)
    most = max(min(m.in_features, m.out_features) for m in chosen.values())
    if adapter.rank > most:
        raise ValueError(
            f"lora.rank={adapter.rank} is more than the rank of any layer that gets adapters: use"
            f" at most {most}, or lora.rank=null to train all weights"
        )
    network.requires_grad_(False)
    for name, module in chosen.items():
        parent, _, last = name.rpartition(".")
        setattr(network.blocks.get_submodule(parent), last, LoRALinear(module, adapter))
    if adapter.mask_id is not None:
        embed = network.embed
        embed.mask_id = adapter.mask_id
        embed.mask_row = nn.Parameter(network.embeddings[adapter.mask_id].detach().clone())
        embed.register_forward_hook(_with_row)


def _with_row(embed: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
    (tokens,) = inputs
    return torch.where((tokens == embed.mask_id)[..., None], embed.mask_row, embedded)


def of_adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the names in ADAPTED, in their order."""
    return {name: w for name, w in weights.items() if name.rpartition(".")[2] in ADAPTED}


def merged(weights: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights of the network without adapters that computes the same: W + alpha / rank * B A,
    and the mask's row in the embedding. ValueError where the tensors are not of this adapter."""
    own = of_adapter(weights)
    made = {name: w for name, w in weights.items() if name not in own}
    for name, value in own.items():
        module, _, kind = name.rpartition(".")
        if not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}")
        if kind == "mask_row":
            table = next((t for t in (f"{module}.{k}" for k in TABLES) if t in made), name)
            made[table] = _with_its_row(name, made.get(table), value, adapter.mask_id)
        elif kind == "lora_A":
            a, b, weight = value, own.get(f"{module}.lora_B"), made.get(f"{module}.weight")
            made[f"{module}.weight"] = _sum(module, weight, a, b, adapter)
        elif f"{module}.lora_A" not in own:
            raise ValueError(f"{name} has no lora_A beside it")
    return made


def _sum(module: str, weight, a: Tensor, b, adapter: Adapter) -> Tensor:
    shapes = [None if x is None else tuple(x.shape) for x in (weight, b, a)]
    outer, inner = shapes[0] if shapes[0] is not None and len(shapes[0]) == 2 else (0, 0)
    if shapes != [(outer, inner), (outer, adapter.rank), (adapter.rank, inner)]:
        raise ValueError(f"{module}: weight, lora_B and lora_A of rank {adapter.rank} are {shapes}")
    return weight + adapter.alpha / adapter.rank * (b @ a).to(weight.dtype)


def _with_its_row(name: str, table, row: Tensor, mask_id: int | None) -> Tensor:
    if table is None or mask_id is None or not mask_id < len(table) or row.shape != table[0].shape:
        raise ValueError(f"{name} is no row {mask_id} of an embedding")
    table = table.clone()
    table[mask_id] = row
    return table
