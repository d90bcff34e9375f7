"""mode=plan: estimate the memory, tokens, FLOPs and hours of a training run, and train nothing.

Memory: weights in float32 (16-mixed and bf16-mixed add a copy in two bytes) or in bfloat16
(model.param_dtype), of those that are trained (with lora.rank few) also gradients, two moments (one
with Muon), the average and masters of bfloat16, the activations that the backward pass keeps, and
the head's chunk of logits with the gradient of its weight. fsdp shares out all but the last two.
With model.activation_checkpointing a layer that is made again keeps its input until its turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.recomputing import Recompute
from modes.build import build_backbone, build_shape, build_tokenizer, read_weights
from modes.lora import build_adapter, put_adapters
from objectives.head import CHUNK_LOGITS, CHUNK_LOGITS_ACCELERATOR
from settings import Config
from training.flops import NetworkShape, flops, matmul_dtype, matmul_peak
from training.optimizers import matrices, trained
from utils import listed, say

MFU = 0.4  # share of the peak that a training run reaches: what the hours assume
GIB = 1 << 30
# FLOP/s of dense matrix products as their makers state them
KNOWN = {"H100 (bf16, 989 TFLOP/s)": 989e12, "A100 (bf16, 312 TFLOP/s)": 312e12}
# Bytes kept per row, layer and unit of width (inputs of the norms, modulations, gates and products,
# q, k, v, the MLP's hidden layer before and after its gelu, dropout masks) and what is made on the
# way: fitted to peaks of bamdlm and mdlm, model=small in bf16 on an H100, model=tiny in float32.
KEPT = {2: 62, 4: 120}
# The same of models/llama.py, per unit of width, of the heads, of their norm and of the MLP: what
# autograd saves, counted, times 1.13: by so much peaks are above it in float32 on a CPU, and the
# DiT's in bf16.
KEPT_LLAMA = {2: (30, 11, 14, 9), 4: (27, 23, 18, 18)}
KEPT_COMPILED = 0.7  # of that
INPUT = 4  # bytes kept likewise of a layer that is made again: the residual stream, in float32


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
    again: float = 0.0  # as a share of these, what is made a second time in the backward pass

    @property
    def memory(self) -> float:
        return self.weights + self.activations + self.head

    def hours(self, peak: float) -> float:
        return self.flops * (1 + self.again) / (peak * MFU * self.devices) / 3600


def plan(
    config: Config, shape: NetworkShape, parameters: int, by_muon: int = 0, frozen: int = 0
) -> Plan:
    """by_muon: of the parameters, those with one moment; frozen: those with nothing."""
    trainer, loader = config.trainer, config.loader
    devices = trainer.devices * trainer.num_nodes
    size = min(matmul_dtype(trainer.precision).itemsize, 4)  # bytes of a number in products
    per_weight, if_trained = bytes_per_weight(config, size)
    weights = parameters * per_weight + (parameters - frozen) * if_trained - 4 * by_muon
    rows = loader.batch_size * shape.length * shape.parts
    again = Recompute(config.model.activation_checkpointing).layers(shape.n_blocks)
    # the last layer keeps little more than its keys and values, and the rows that are read
    last = (loader.batch_size * shape.read) / rows
    kept = kept_per_width(shape, size) * (KEPT_COMPILED if config.model.compile else 1)
    cost = flops(shape)
    logits = CHUNK_LOGITS if trainer.accelerator == "cpu" else CHUNK_LOGITS_ACCELERATOR
    sharded = config.strategy.name == "fsdp"
    sequences = float(trainer.max_steps) * loader.global_batch_size
    return Plan(
        shape=shape,
        devices=devices,
        parameters=parameters,
        weights=weights / (devices // config.strategy.replicate if sharded else 1),
        activations=rows * shape.hidden_size * most_kept(shape.n_blocks, again, kept, last),
        head=logits * (6 if size == 2 else 4)  # in half precision a float32 copy
        + 4 * shape.vocab_size * shape.hidden_size * (frozen == 0),
        tokens=sequences * shape.length,
        flops=cost.step * sequences,
        again=cost.inner * len(again) / cost.step,
    )


def bytes_per_weight(config: Config, size: int) -> tuple[int, int]:
    """In any case, and if it is trained: gradient, two moments, average. In bfloat16 there are
    masters too, and gradients in float32 where several passes or devices are summed; elsewhere a
    step makes those when the activations are gone."""
    average, trainer = 4 * (config.training.ema > 0), config.trainer
    if config.model.param_dtype == "float32":
        return 4 + 2 * (size == 2), 4 + 8 + average
    summed = trainer.accumulate_grad_batches * trainer.devices * trainer.num_nodes > 1
    return 2, 4 + 2 + 4 * summed + 8 + average


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


def kept_per_width(shape: NetworkShape, size: int) -> float:
    """Bytes per row, layer and unit of width, with products of `size` bytes a number."""
    if shape.mlp_weights is None:
        return KEPT[size]
    of_width, of_heads, of_norm, of_mlp = KEPT_LLAMA[size]
    heads = shape.query_width * (of_heads + of_norm * shape.qk_norm)
    mlp = of_mlp * shape.mlp_weights / (3 * shape.hidden_size)
    return of_width + (heads + mlp) / shape.hidden_size


def report(made: Plan, peak: float | None) -> str:
    """The plan as lines of text. peak: FLOP/s measured on the GPU of this machine, None without."""
    shape, part = made.shape, flops(made.shape)
    lines = [
        f"{shape.algo}: {made.parameters / 1e6:,.1f}M parameters, sequences of {shape.length}"
        + (f" in blocks of {listed(shape.shares)}" if shape.clean_half else ""),
        f"memory per device: {made.memory / GIB:.1f} GiB"
        f" (weights, gradients, optimizer and average {made.weights / GIB:.1f};"
        f" activations {made.activations / GIB:.1f}; head {made.head / GIB:.1f})",
        f"training tokens: {made.tokens:,.0f}",
        f"FLOPs: {made.flops:.2e} in all, {part.step / shape.length / 1e9:.2f} G per token"
        f" (layers {part.layers / part.forward:.0%}, attention {part.attention / part.forward:.0%},"
        f" head {part.head / part.forward:.0%})",
    ]
    if made.again:
        lines.append(f"made again in the backward pass: {made.again:.0%} more FLOPs")
    measured = {} if peak is None else {f"this GPU (measured {peak / 1e12:.0f} TFLOP/s)": peak}
    lines.append(f"estimated training time, at {MFU:.0%} of the device's peak (MFU):")
    for name, rate in (measured | KNOWN).items():
        lines.append(f"  {made.devices} × {name}: {duration(made.hours(rate))}")
    return "\n".join(lines)


def duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.3g} seconds"
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours > 48 else "")


def prepare(config: Config) -> Callable[[], None]:
    """mode=plan: nothing is read but the tokenizer, and nothing is trained."""
    trainer, start = config.trainer, config.training.from_pretrained
    tokenizer, asks = build_tokenizer(config), config.algo.backbone != "dit" and start is not None
    checkpoint = read_weights(config, start, tokenizer) if asks else None
    with torch.device("meta"):
        backbone = build_backbone(config, tokenizer, checkpoint)
        if (adapter := build_adapter(config, tokenizer)) is not None:
            say(put_adapters(backbone, adapter))
    parameters = sum(p.numel() for p in backbone.parameters())
    muon = config.optim.name == "muon"
    by_muon = sum(p.numel() for p in matrices(backbone)) if muon else 0
    frozen = parameters - sum(p.numel() for _, p in trained(backbone))
    made = plan(config, build_shape(config, backbone), parameters, by_muon, frozen)

    def run() -> None:
        device = torch.accelerator.current_accelerator()
        gpu = trainer.accelerator == "gpu" and device is not None
        say(report(made, matmul_peak(device, matmul_dtype(trainer.precision)) if gpu else None))

    return run
