"""What training costs: floating-point operations of the steps as this project computes them, and
what the device can do.

The count is of multiplications and additions in matrix products (2 per pair) that are really made:
attention over the pairs that may see each other, the head at masked positions, the last layer only
where it is read. The backward pass costs twice the forward pass; where the weights are frozen and
adapters are trained, once for products with weights, because their gradients are not made. Norms,
rotary positions, modulation (one row per batch) and the optimizer are left out; together they are a
few percent.
"""

import time
from dataclasses import dataclass

import torch

from objectives.algorithms import get_algorithm

PEAK_SIZE = {"cpu": 768}  # side of the square matrices that measure the peak; else 8192
PEAK_TRIES = 24  # the machine may have other work
BACKWARD = 2  # times the forward pass
# memory in GB and TFLOP/s of dense bf16 matrix products, as NVIDIA's data sheets state them: the
# SXM form where there are several; half of the figure where that is with sparsity; for the RTX 4090
# the figure with sums in float32. `device`: in the name that CUDA reports, for these forms alone.
GPUS = {
    "RTX4090-24GB": {"memory": 24, "peak": 165.2, "device": "RTX 4090"},
    "L40S-48GB": {"memory": 48, "peak": 362.0, "device": "L40S"},
    "A100-40GB": {"memory": 40, "peak": 312.0, "device": "A100-SXM4-40GB"},
    "A100-80GB": {"memory": 80, "peak": 312.0, "device": "A100-SXM4-80GB"},
    "H100-80GB": {"memory": 80, "peak": 989.0, "device": "H100 80GB HBM3"},
    "H200-141GB": {"memory": 141, "peak": 989.0, "device": "H200"},
    "B200-180GB": {"memory": 180, "peak": 2250.0, "device": "B200"},
}


@dataclass(frozen=True)
class NetworkShape:
    """Of a network and the sequences it is trained on; `block_size` where it is in blocks, and in
    its place `sizes` where sequences differ in it: which share has blocks of each size."""

    algo: str
    hidden_size: int
    n_blocks: int
    vocab_size: int
    length: int
    block_size: int
    masked_share: float = 0.5  # of the tokens, on average: the mean of p(t)
    views: int = 1  # noised versions of a sequence that share its clean half
    sizes: dict[int, float] | None = None
    causal_clean: bool = False  # a clean token sees those before it, not all of its block
    answers_clean: bool = False  # the last layer asks for the clean half too
    ar_loss: bool = False  # on the clean half, whose tokens then reach the head
    # of a layer; None: the DiT's
    query_width: int | None = None  # of all heads
    key_width: int | None = None  # of keys, and of values
    mlp_weights: int | None = None
    qk_norm: bool = False
    adapters: int | None = None  # weights of those of a layer; None: all weights are trained

    @property
    def causal(self) -> bool:
        return get_algorithm(self.algo).causal

    @property
    def shares(self) -> dict[int, float]:
        """Of the sequences, by the size of their blocks."""
        return self.sizes or {self.block_size: 1}

    @property
    def clean_half(self) -> bool:
        """Whether the pass is over [x_t ; x0]."""
        one = self.sizes is None and self.block_size == self.length and not self.ar_loss
        return get_algorithm(self.algo).blocks and not one

    @property
    def parts(self) -> int:
        """Of the length of a sequence, in a pass."""
        return 1 + self.views if self.clean_half else 1

    @property
    def read(self) -> float:
        """Rows of a sequence that reach the head."""
        if self.causal:
            return self.length - 1
        return self.length * self.masked_share + (self.length - 1) * self.ar_loss


@dataclass(frozen=True)
class Flops:
    """Of the forward pass over one sequence."""

    layers: float
    attention: float
    head: float
    inner: float  # of these, one layer that is not the last, with its attention
    adapters: float | None = None  # None: all weights are trained

    @property
    def forward(self) -> float:
        return self.layers + self.attention + self.head + (self.adapters or 0)

    @property
    def step(self) -> float:
        """Forward and backward; without what activation checkpointing makes a second time, so that
        a share of the peak is of work that is needed."""
        frozen = 0 if self.adapters is None else self.layers + self.head
        return (1 + BACKWARD) * self.forward - frozen


def seen_pairs(shape: NetworkShape) -> tuple[float, float]:
    """(query, key) pairs that may see each other: in an inner layer, and in the last one."""
    length = shape.length
    if not shape.clean_half:
        pairs = length * (length + 1) // 2 if shape.causal else length**2
        return pairs, pairs
    own = sum(share * length * size for size, share in shape.shares.items())
    earlier = (length**2 - own) / 2
    noised = shape.views * (own + earlier)  # own block, and x0 of the blocks before
    clean = length * (length + 1) / 2 if shape.causal_clean else own + earlier
    return noised + clean, noised + clean * shape.answers_clean


def flops(shape: NetworkShape) -> Flops:
    width, length = shape.hidden_size, shape.length
    rows = length * shape.parts
    inner, last = seen_pairs(shape)
    queries = width * (shape.query_width or width)  # weights; as many after attention
    keys = 2 * width * (shape.key_width or width)
    mlp = shape.mlp_weights or 8 * width**2
    layer = 2 * (2 * queries + keys + mlp) * rows
    asked = (shape.views + (shape.answers_clean and shape.clean_half)) * length
    last_layer = 2 * (keys * rows + queries * asked + (queries + mlp) * shape.read)
    per_pair = 4 * (shape.query_width or width)  # q k^T and the weighted sum
    return Flops(
        layers=(shape.n_blocks - 1) * layer + last_layer,
        attention=per_pair * ((shape.n_blocks - 1) * inner + last),
        head=2 * width * shape.vocab_size * shape.read,
        inner=layer + per_pair * inner + 2 * (shape.adapters or 0) * rows,
        adapters=None
        if shape.adapters is None
        else 2 * shape.adapters * ((shape.n_blocks - 1) * rows + shape.read),
    )


def matmul_dtype(precision: str) -> torch.dtype:
    """What matrix products are made in under a setting of trainer.precision."""
    names = {"bf16": torch.bfloat16, "16": torch.float16}
    return names.get(precision.split("-")[0], torch.float32)


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the best of many."""
    size = PEAK_SIZE.get(device.type, 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(PEAK_TRIES):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def nominal_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s as the maker states them; None for products in float32, and where GPUS lacks the
    device."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next((1e12 * gpu["peak"] for gpu in GPUS.values() if gpu["device"] == name), None)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
