"""mode=plan: estimate the memory, tokens, FLOPs and hours of a training run, and train nothing.

Memory: weights in float32 (16-mixed and bf16-mixed add a copy in two bytes) or in bfloat16
(model.param_dtype), of those that are trained (with lora.rank few) also gradients, two moments (one
with Muon), the average and masters of bfloat16, the activations that the backward pass keeps, and
the head's chunk of logits with the gradient of its weight. fsdp shares out the weights and what
belongs to them; what it puts together for a pass (two units of layers at a time, and in float32
what is outside of the layers) comes on top, with its gradients.
With model.activation_checkpointing a layer that is made again keeps its input until its turn.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from models.kernels.residual import MOST_WIDTH
from models.network import Network
from models.recomputing import Recompute
from modes.build import build_backbone, build_shape, read_weights
from modes.build_data import build_tokenizer
from modes.lora import build_adapter, put_adapters
from modes.planning import fitting
from modes.planning.gpus import GIB, MFU, NOT_MEASURED, SEVERAL, Gpu, gpu_of, mfu, room
from objectives.algorithms import get_algorithm
from objectives.head import CHUNK_LOGITS, CHUNK_LOGITS_ACCELERATOR
from settings import Config
from settings.defaults import all_devices
from training.distributed import units
from training.flops import GPUS, NetworkShape, flops, matmul_dtype
from training.optimizers import matrices, trained
from utils import listed, say

# Bytes kept per row, layer and unit of width (inputs of the norms, modulations, gates and products,
# q, k, v, the MLP's hidden layer before and after its gelu, dropout masks) and what is made on the
# way: fitted to peaks of bamdlm and mdlm, model=small in bf16 on an H100, model=tiny in float32.
KEPT = {2: 62, 4: 120}
# The same of models/llama.py, per unit of width, of the heads, of their norm and of the MLP: what
# autograd saves, counted, times 1.13: by so much peaks are above it in float32 on a CPU, and the
# DiT's in bf16.
KEPT_LLAMA = {2: (30, 11, 14, 9), 4: (27, 23, 18, 18)}
KEPT_COMPILED = 0.7  # of that; and of KEPT_LLAMA, fitted to three peaks of SmolLM2-135M on an H200
KEPT_LLAMA_COMPILED = 0.46
# The same two of a DiT without modulation (ar): a share of KEPT, and of that if compiled.
PLAIN, PLAIN_COMPILED = 0.74, 0.82
# The same with the kernels that a GPU uses (models/kernels), compiled or not: counted, and times
# 1.03, as peaks in bf16 on an H200 are; and the share of ar.
KEPT_BY_KERNELS, PLAIN_BY_KERNELS = {2: 33, 4: 58}, 0.95
INPUT = 4  # bytes kept likewise of a layer that is made again: the residual stream, in float32


@dataclass(frozen=True)
class Weights:
    """How many numbers a network has."""

    all: int
    by_muon: int = 0  # of them, those with one moment
    frozen: int = 0  # those without gradient, moments and average
    outside: int = 0  # of the layers

    @property
    def trained(self) -> int:
        return self.all - self.frozen


@dataclass(frozen=True)
class Plan:
    shape: NetworkShape
    devices: int
    parameters: int
    weights: float  # bytes per device: with gradients, moments, average
    activations: float
    head: float
    tokens: float
    flops: float  # of the run
    gathered: float  # bytes per device: what fsdp puts together for a pass, and its gradients
    checkpoint: float  # bytes, of all devices together
    exchange: float  # bytes that a device sends in an optimizer step
    again: float = 0.0  # as a share of the FLOPs, what is made again in the backward pass

    @property
    def memory(self) -> float:
        return self.weights + self.gathered + self.activations + self.head

    def hours(self, reached: float) -> float:
        """reached: FLOP/s of one device in training."""
        several = SEVERAL if self.devices > 1 else 1
        return self.flops * (1 + self.again) / (reached * several * self.devices) / 3600


def plan(config: Config, shape: NetworkShape, count: Weights) -> Plan:
    trainer, loader = config.trainer, config.loader
    size = min(matmul_dtype(trainer.precision).itemsize, 4)  # bytes of a number in products
    per_weight, if_trained = bytes_per_weight(config, size)
    weights = count.all * per_weight + count.trained * if_trained - 4 * count.by_muon
    rows = loader.batch_size * shape.length * shape.parts
    again = Recompute(config.model.activation_checkpointing).layers(shape.n_blocks)
    # the last layer keeps little more than its keys and values, and the rows that are read
    last = (loader.batch_size * shape.read) / rows
    modulated = get_algorithm(shape.algo).noise or config.model.adaln
    kernels = by_kernels(config, shape)
    kept = kept_per_width(shape, size, modulated, config.model.compile, kernels)
    cost = flops(shape)
    logits = CHUNK_LOGITS if trainer.accelerator == "cpu" else CHUNK_LOGITS_ACCELERATOR
    sequences = float(trainer.max_steps) * loader.global_batch_size
    shards = shards_of(config)
    layer = size * (count.all - count.outside) / shape.n_blocks  # bytes
    remade = bool(Recompute(config.model.activation_checkpointing))
    together = [len(unit) * layer for unit in units([layer] * shape.n_blocks, alone=remade)]
    return Plan(
        shape=shape,
        devices=all_devices(config),
        parameters=count.all,
        weights=weights / shards,
        gathered=2 * (4 * count.outside + sum(together[:2])) if shards > 1 else 0,
        activations=rows * shape.hidden_size * most_kept(shape.n_blocks, again, kept, last),
        # in half precision a float32 copy, but for the kernels
        head=logits * (6 if size == 2 and not kernels else size)
        + 4 * shape.vocab_size * shape.hidden_size * (count.frozen == 0),
        tokens=sequences * shape.length,
        flops=cost.step * sequences,
        checkpoint=4 * (count.all - count.by_muon)  # weights, and of what is trained
        + (8 + 4 * (config.training.ema > 0)) * count.trained,  # moments and average
        exchange=exchanged(config, count, size, gathers=1 + (len(together) > 1)),
        again=cost.inner * len(again) / cost.step,
    )


def bytes_per_weight(config: Config, size: int) -> tuple[int, int]:
    """In any case, and if it is trained: gradient, two moments, average. In bfloat16 there are
    masters too, and gradients in float32 where several passes or devices are summed; elsewhere a
    step makes those when the activations are gone."""
    average, trainer = 4 * (config.training.ema > 0), config.trainer
    if config.model.param_dtype == "float32":
        return 4 + 2 * (size == 2), 4 + 8 + average
    summed = trainer.accumulate_grad_batches * all_devices(config) > 1
    return 2, 4 + 2 + 4 * summed + 8 + average


def shards_of(config: Config) -> int:
    """Devices that share out one copy of the network."""
    sharded = config.strategy.name == "fsdp"
    return all_devices(config) // config.strategy.replicate if sharded else 1


def exchanged(config: Config, count: Weights, size: int, gathers: int) -> float:
    """Bytes that a device sends in an optimizer step, in rings. Within the devices of a copy:
    layers put together `gathers` times, what is outside of them once, and gradients added up, in
    every micro-batch. Between copies: an all-reduce of the gradients, with ddp once a step."""
    passes, shards = config.trainer.accumulate_grad_batches, shards_of(config)
    copies = all_devices(config) // shards
    gradients = (2 if config.strategy.gradients == "bf16" else 4) * count.trained
    weights = gathers * size * (count.all - count.outside) + 4 * count.outside
    within = (shards - 1) / shards * (weights + gradients)
    between = 2 * (copies - 1) / copies * gradients / shards
    return passes * within + between * (passes if shards > 1 else 1)


def most_kept(layers: int, again: list[int], kept: float, last: float) -> float:
    """Bytes per row and unit of width when they are the most, on the way back through the layers:
    those not reached yet, and the one at hand, which may have been made again. kept: by a layer;
    the last one keeps the share `last` of that."""
    most, of_all = 0.0, INPUT * len(again) + kept * (layers - 1 - len(again))
    for number in reversed(range(layers)):
        share = last if number == layers - 1 else float(number in again)
        most = max(most, of_all + kept * share)
        if number < layers - 1:
            of_all -= INPUT if number in again else kept
    return most


def by_kernels(config: Config, shape: NetworkShape) -> bool:
    """Whether the kernels of a training step are used: by a DiT on a GPU, without adapters. The
    figures of models/llama.py were fitted to the head as it was without them."""
    on_gpu = config.trainer.accelerator != "cpu" and config.lora.rank is None
    return on_gpu and shape.mlp_weights is None and shape.hidden_size <= MOST_WIDTH


def kept_per_width(
    shape: NetworkShape, size: int, modulated: bool, compiled: bool, kernels: bool
) -> float:
    """Bytes per row, layer and unit of width, with products of `size` bytes a number."""
    if kernels:
        return KEPT_BY_KERNELS[size] * (1 if modulated else PLAIN_BY_KERNELS)
    if shape.mlp_weights is None:
        kept, share = (1, KEPT_COMPILED) if modulated else (PLAIN, PLAIN_COMPILED)
        return KEPT[size] * kept * (share if compiled else 1)
    of_width, of_heads, of_norm, of_mlp = KEPT_LLAMA[size]
    heads = shape.query_width * (of_heads + of_norm * shape.qk_norm)
    mlp = of_mlp * shape.mlp_weights / (3 * shape.hidden_size)
    kept = of_width + (heads + mlp) / shape.hidden_size
    return kept * (KEPT_LLAMA_COMPILED if compiled else 1)


def report(made: Plan, config: Config) -> list[str]:
    """What a run takes, on any machine."""
    shape, part = made.shape, flops(made.shape)
    gathered = f" gathered for a pass {made.gathered / GIB:.1f};" if made.gathered else ""
    lines = [
        f"{shape.algo}: {made.parameters / 1e6:,.1f}M parameters, sequences of {shape.length}"
        + (f" in blocks of {listed(shape.shares)}" if shape.clean_half else ""),
        f"memory per device: {made.memory / GIB:.1f} GiB"
        f" (weights, gradients, optimizer and average {made.weights / GIB:.1f};{gathered}"
        f" activations {made.activations / GIB:.1f}; head {made.head / GIB:.1f})",
        f"training tokens: {made.tokens:,.0f}",
        f"FLOPs: {made.flops:.2e} in all, {part.step / shape.length / 1e9:.2f} G per token"
        f" (layers {part.layers / part.forward:.0%}, attention {part.attention / part.forward:.0%},"
        f" head {part.head / part.forward:.0%})",
    ]
    if made.again:
        lines.append(f"made again in the backward pass: {made.again:.0%} more FLOPs")
    lines.append(f"a checkpoint: {in_bytes(made.checkpoint)}")
    in_parts = config.checkpointing.format == "sharded" and made.devices > 1
    if config.strategy.name == "fsdp" or in_parts:  # with ddp, too, each writes a share
        each = in_bytes(made.checkpoint / made.devices)
        lines[-1] += f"; {each} per device with checkpointing.format=sharded"
    if made.devices > 1:
        lines.append(
            f"exchange: each device sends {in_bytes(made.exchange)} per optimizer step"
            f" (strategy={config.strategy.name}, {made.devices} devices)"
        )
    return lines


def in_bytes(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / (1 << 20):.2f} MiB"


def on_gpus(made: Plan, config: Config, gpu: Gpu) -> list[str]:
    """Whether the run fits, and how long it takes."""
    trainer, algo = config.trainer, made.shape.algo
    nodes = f"{trainer.num_nodes} nodes with " if trainer.num_nodes > 1 else ""
    limit = room(gpu.memory)
    fits = "fits" if made.memory <= limit else "does not fit"
    share = mfu(algo, config.model.compile)
    lines = [
        f"on {nodes}{trainer.devices} × {gpu.name}: {fits}; {made.memory / GIB:.1f} GiB needed,"
        f" {limit / GIB:.1f} GiB of {gpu.memory / GIB:.1f} GiB usable",
        f"estimated training time: {duration(made.hours(gpu.peak * share))}",
        f"  at {share:.1%} (MFU) of a matrix product's speed ({gpu.source}), as measured on one"
        f" H200, model=small, {'compiled' if config.model.compile else 'not compiled'}",
    ]
    if algo not in MFU:
        lines.append(f"  {algo} was not measured on a GPU: the figure is that of {NOT_MEASURED}")
    if made.devices > 1:
        lines.append(
            f"  and {SEVERAL:.1%} of the sum of the GPUs, as measured with ddp on two of one host;"
            " more GPUs and several nodes were not measured"
        )
    return lines


def duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.3g} seconds"
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours > 48 else "")


def counted(backbone: Network, config: Config) -> Weights:
    parameters = sum(p.numel() for p in backbone.parameters())
    muon = config.optim.name == "muon"
    return Weights(
        parameters,
        by_muon=sum(p.numel() for p in matrices(backbone)) if muon else 0,
        frozen=parameters - sum(p.numel() for _, p in trained(backbone)),
        outside=parameters - sum(p.numel() for p in backbone.blocks.parameters()),
    )


def prepare(config: Config) -> Callable[[], None]:
    """mode=plan: nothing is read but the tokenizer, and nothing is trained."""
    start = config.training.from_pretrained
    tokenizer, asks = build_tokenizer(config), config.algo.backbone != "dit" and start is not None
    checkpoint = read_weights(config, start, tokenizer) if asks else None
    adapter = build_adapter(config, tokenizer)

    @cache
    def backbone_of(n_blocks: int) -> tuple[Network, str | None]:
        other = copy.deepcopy(config)
        other.model.n_blocks = n_blocks
        with torch.device("meta"):
            backbone = build_backbone(other, tokenizer, checkpoint)
            return backbone, None if adapter is None else put_adapters(backbone, adapter)

    def planned(config: Config) -> Plan:
        backbone, _ = backbone_of(config.model.n_blocks)
        return plan(config, build_shape(config, backbone), counted(backbone, config))

    made, (_, words) = planned(config), backbone_of(config.model.n_blocks)
    if words is not None:
        say(words)

    def run() -> None:
        lines, gpu = report(made, config), gpu_of(config)
        if gpu is None:
            lines.append(f"whether it fits, and hours: add plan.gpu={'|'.join(GPUS)}")
        else:
            lines += on_gpus(made, config, gpu)
            if made.memory > room(gpu.memory):
                lines += fitting.advice(config, planned, room(gpu.memory))
        say("\n".join(lines))

    return run
