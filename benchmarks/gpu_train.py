"""Part of gpu.py: how fast is a training step, in which memory, and how large may the batch of
AIMED be?"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType

import torch
from torch._dynamo.utils import counters

from benchmarks.gpu_network import autocast, await_turn, network, release, synchronise
from benchmarks.gpu_table import AIMED, step_speed
from benchmarks.support.pair import INTERVAL, noise_of, objective_of
from models.ema import EMA
from models.network import _run_block
from objectives.graphs import GraphedLoss
from training.flops import NetworkShape, flops, matmul_peak
from utils import first_line


@dataclass(frozen=True)
class Kind:
    """Of a training step. `size`: S; None is L."""

    algo: str
    size: int | None
    backend: str
    compiled: bool

    @property
    def name(self) -> str:
        size = f" {self.size}" if self.algo == "bamdlm" else ""
        return f"{self.algo}{size} {self.backend}{' compiled' if self.compiled else ''}"


ALGORITHMS = (("bamdlm", 16), ("bamdlm", 4), ("mdlm", None), ("ar", 1))
BACKENDS = ["flex", "sdpa"]
KINDS = [
    Kind(*algo, backend, compiled)
    for backend in BACKENDS
    for algo in ALGORITHMS
    for compiled in (True, False)
]
BATCHES = 8  # the largest batch is looked for among multiples of
TRIES = 10  # of a largest batch


def train(args):
    found, deadline = {}, time.monotonic() + args.seconds
    if args.turn is not None:
        for kind in kinds(args):
            compile_kind(kind, args)
        await_turn(args.turn, args.device)
    peak = matmul_peak(args.device, torch.float32 if args.tiny else torch.bfloat16)
    for kind in kinds(args):
        if args.turn is None:
            compile_kind(kind, args)
        release(args.device)
        graphs = counters["stats"]["unique_graphs"]
        for entry in measured(kind, peak, deadline, args):
            entry["compiled_anew"] = counters["stats"]["unique_graphs"] - graphs
            found[kind.name] = entry
            yield found
        print(f"{kind.name:<24} {step_speed(found[kind.name])}", flush=True)


def compile_kind(kind: Kind, args) -> None:
    """All that it compiles: two blocks have the code of twelve."""
    if not kind.compiled and kind.backend != "flex":
        return
    torch._dynamo.pgo.reset_code_state()  # the sizes that other kinds had are no sign of change
    started = time.perf_counter()
    try:
        first_steps(kind, args)
    except RuntimeError as error:  # `measured` will meet it again, or have more memory
        print(f"{kind.name}: {first_line(error)}", flush=True)
    else:
        print(f"{kind.name}: compiled in {time.perf_counter() - started:.0f} s", flush=True)
    release(args.device)


def first_steps(kind: Kind, args) -> None:
    run = stepper(kind, args, n_blocks=2)
    # FlexAttention alone is compiled for any batch, and less memory will do
    run(0, args.batch if kind.compiled else half(args))
    if kind.compiled:
        run(1, half(args), any_batch=True)
    synchronise(args.device)


@cache
def run_block(kind: Kind, any_batch: bool) -> Callable:
    """The compiled blocks of a kind: for one batch, or for any once a smaller one was met.

    Each is a copy of the function, as the compiler keeps what it made with the function: what is
    timed must not run code for any batch.
    """
    return torch.compile(FunctionType(_run_block.__code__.replace(), _run_block.__globals__))


def measured(kind: Kind, peak: float, deadline: float, args):
    """What is known of a kind so far, or why nothing is."""
    if time.monotonic() > deadline:
        yield {"left_out": "no time left"}
        return
    try:
        run = stepper(kind, args)
        entry = speed(kind, run, peak, args)
    except (RuntimeError, ArithmeticError) as error:
        yield why(error)
        return
    yield entry
    if args.device.type == "cpu" or kind.name != AIMED:
        return
    if time.monotonic() > deadline:
        entry["largest_batch"] = "no time left"
    else:
        try:
            entry["largest_batch"] = largest_batch(run, args)
            entry["capacity_gib"] = capacity(args.device) / 2**30
        except RuntimeError as error:
            entry["largest_batch"] = first_line(error)
    yield entry


def why(error: Exception) -> dict:
    """Why a kind was not measured: the others shall have their turn."""
    return {"left_out" if is_full(error) else "failed": first_line(error)}


def is_full(error: Exception | str) -> bool:
    """Whether the device's memory was too small; libraries on top of torch have their own words."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def kinds(args) -> list[Kind]:
    """On a CPU FlexAttention has no backward pass, and compiling takes minutes."""
    able = [k for k in KINDS if not args.tiny or not (k.compiled or k.backend == "flex")]
    return [kind for kind in able if kind.backend in args.backend and kind.algo in args.algo]


def stepper(kind: Kind, args, n_blocks: int | None = None):
    """A function of a step's number and batch that makes one whole step: draws, loss, gradients,
    clipping, AdamW, EMA."""
    net = network(
        args,
        algo=kind.algo,
        backend=kind.backend,
        compiled=kind.compiled,
        dropout=0.1,
        n_blocks=n_blocks,
    ).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    ema = EMA(net.named_parameters(), 0.9999)
    mask_id, size = args.vocab - 1, kind.size or args.length
    objective = objective_of(kind.algo, mask_id, size)

    def loss_inputs(step: int, batch: int):
        x0 = torch.randint(mask_id, (batch, args.length))
        ones = torch.ones_like(x0)
        if kind.algo == "ar":
            return objective.loss_inputs(x0, ones, training=True)
        noise = noise_of(step, batch, args.length, size)
        return objective.loss_inputs(x0, ones, noise, interval=INTERVAL, training=True)

    def loss(backbone, asked):
        return objective.compute_loss(backbone, asked).per_place

    def sent(asked):
        return asked.to(args.device)

    graphed = GraphedLoss(net, loss, sent, shared=False)

    def run(step: int, batch: int = args.batch, any_batch: bool = False) -> torch.Tensor:
        """Returns the loss. `any_batch`: by blocks compiled for any."""
        if kind.compiled:
            net.run_block = run_block(kind, any_batch)
        optimizer.zero_grad()
        asked = loss_inputs(step, batch)
        with autocast(args.device, None if args.tiny else torch.bfloat16):
            # as in diffusion.py
            value = graphed(asked) if kind.compiled else loss(net, sent(asked))
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.update(net.named_parameters())
        return value.detach()

    return run


def speed(kind: Kind, run, peak: float, args) -> dict:
    for step in range(4):
        run(step)  # with compilation the third records
    synchronise(args.device)
    started = time.perf_counter()
    losses = [run(4 + step) for step in range(args.steps)]
    synchronise(args.device)
    seconds = (time.perf_counter() - started) / args.steps
    if not torch.stack(losses).isfinite().all():  # numbers that are not are quickly made
        raise ArithmeticError(f"{kind.name}: a loss is not finite: {losses}")
    sizes, size = args.sizes, kind.size or args.length
    shape = NetworkShape(
        kind.algo, sizes["hidden_size"], sizes["n_blocks"], args.vocab, args.length, size
    )
    return {
        "seconds": seconds,
        "loss": losses[-1].item(),
        "tokens_per_second": args.batch * args.length / seconds,
        "mfu": flops(shape).step * args.batch / seconds / peak,
        "peak": peak,
        "memory_gib": most_memory(args.device) / 2**30,
    }


def most_memory(device: torch.device) -> int:
    """Bytes since the last release."""
    return 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated()


def half(args) -> int:
    """Sequences of a smaller batch; of much smaller ones the compiler makes other code."""
    return args.batch // 2


def largest_batch(run, args) -> int:
    """The multiple of BATCHES that fits while the next does not, with blocks compiled for any
    batch, which are not recorded. Processes that wait beside this one hold half a GiB and more
    each. RuntimeError if it is not found in TRIES."""
    memory = most_memory(args.device)  # of args.batch
    fits(run, half(args), args)
    each = (memory - most_memory(args.device)) / (args.batch - half(args))
    more = (capacity(args.device) - memory) / each  # if memory grows evenly
    return bracketed(lambda batch: fits(run, batch, args), args.batch, args.batch + int(more))


def bracketed(fitting: Callable[[int], bool], low: int, guess: int) -> int:
    """The same of any `fitting`; `low` fits."""
    high, step = math.inf, BATCHES
    guess = max(guess // BATCHES * BATCHES, low + BATCHES)
    for _ in range(TRIES):
        if fitting(guess):
            low = guess
        else:
            high = guess
        if high - low <= BATCHES:
            return low
        if high < math.inf:
            middle = (low + high) // 2 // BATCHES * BATCHES
            guess = max(middle, high - step)
        else:
            guess = low + step
        step *= 2
    raise RuntimeError(f"the largest batch is at least {low}, more was not found in {TRIES} tries")


def capacity(device: torch.device) -> int:
    """Bytes that tensors of this process can take."""
    free = torch.get_device_module(device).mem_get_info()[0]
    return free + torch.accelerator.memory_reserved()


def fits(run, batch: int, args) -> bool:
    release(args.device)
    try:
        run(0, batch, any_batch=True)
        synchronise(args.device)
    except RuntimeError as error:
        if not is_full(error):
            raise
        return False
    return True
