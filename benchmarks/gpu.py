"""One GPU: are the numbers right, how fast are training and sampling? Run by gpu.sh.

    python benchmarks/gpu.py check train sample      the parts to run; a table, a line of JSON
    python benchmarks/gpu.py --tiny check train sample        on a CPU, to try the script itself
    python benchmarks/gpu.py train sample --check    exit code 1 where a target is missed

What is wrong in `check` gives exit code 1 in any case.

check    flex (compiled), sdpa and, where installed, flash_attn, forward and backward, against
         dense float32; the network in float32 and bf16 against the CPU; cached against uncached
compile  what `train` or `sample` compiles (--of), found by them in the compiler's cache
train    model=small, L = 1024, vocabulary 50 258, synthetic ids, bf16: tokens/s, MFU, memory,
         and of steps that are not compiled the largest batch
sample   bamdlm S = 16, bf16: batch 1 and 512; 2 048 against 8 192 tokens
"""

import argparse
import gc
import importlib.util
import math
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.conclusion import conclude
from benchmarks.gpu_table import missed, step_speed
from flops import Shape, flops, matmul_peak
from models.attention import dense, get_backend
from models.dit import DiT
from models.ema import EMA
from models.masks import BlockCausal, BlockDiffusion, Causal
from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import draw_examples
from objectives.graphs import GraphedLoss

SMALL = {"hidden_size": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12}
TINY = {"hidden_size": 32, "cond_dim": 8, "n_blocks": 2, "n_heads": 2}


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
TRIES = 6  # of a largest batch


def main(argv=None) -> int:
    args = parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.monotonic()
    found = {"device": device_name(args.device), "torch": torch.__version__}
    for part in args.parts:
        found[part] = PARTS[part](args)
        print(f"-- {part} done after {time.monotonic() - started:.0f} s", flush=True)
    wrong = [name for name, entry in found.get("check", {}).items() if not entry["right"]]
    for name in wrong:
        print(f"WRONG: {name}")
    found["wrong"] = wrong
    targets = [] if args.tiny else missed(found)
    return max(conclude(found, targets, check=args.check, out=args.out), int(bool(wrong)))


def device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name()


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit code 1 for a missed target")
    parser.add_argument("--steps", type=int, default=8, help="timed, after the warm-up")
    parser.add_argument("--batch", type=int, default=32, help="sequences per training step")
    parser.add_argument("--seconds", type=float, default=300, help="for `train`; then it stops")
    parser.add_argument(
        "--of",
        nargs="+",
        default=BACKENDS,
        choices=[*BACKENDS, "sampling"],
        metavar="NAME",
        help="flex, sdpa: steps of these backends; `compile` takes sampling too",
    )
    parser.add_argument("--index", type=int, help="which device, where there are several")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    args = parser.parse_args(argv)
    accelerator = None if args.tiny else torch.accelerator.current_accelerator()
    if accelerator is None and not args.tiny:
        parser.error("no accelerator here; --tiny tries the script on the CPU")
    if args.tiny and args.check:
        parser.error("--tiny is too small for the targets: leave out one of the two")
    if accelerator is not None and args.index is not None:
        torch.accelerator.set_device_index(args.index)
        accelerator = torch.device(accelerator.type, args.index)
    args.device = accelerator or torch.device("cpu")
    args.length = 64 if args.tiny else 1024
    args.vocab = 101 if args.tiny else 50_258
    args.sizes = TINY if args.tiny else SMALL
    if args.tiny:
        args.steps, args.batch = 2, 2
    return args


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def network(args, *, algo="bamdlm", backend="sdpa", compiled=False, dropout=0.0) -> DiT:
    torch.manual_seed(0)
    net = DiT(
        vocab_size=args.vocab,
        dropout=dropout,
        adaln=algo != "ar",
        attn_backend=backend,
        compile=compiled,
        **args.sizes,
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("output_layer") or "adaLN" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    return net.to(args.device)


# ---- check --------------------------------------------------------------------------------------


def check(args) -> dict:
    found = {}
    for backend in ("sdpa", "flex"):
        if backend == "flex" and args.device.type == "cpu":
            continue  # no backward pass there
        for rule, both in ((BlockDiffusion(4), True), (BlockDiffusion(16), False)):
            found[f"{backend} {rule}"] = attention_gap(backend, rule, both, args)
        name = f"{backend} {BlockDiffusion(4)}, packed documents"
        found[name] = attention_gap(backend, BlockDiffusion(4), True, args, documents=5)
    half = torch.bfloat16
    if args.device.type != "cpu":
        found["flex bf16"] = attention_gap("flex", BlockDiffusion(16), True, args, half)
    if importlib.util.find_spec("flash_attn"):
        found["flash_attn bf16"] = attention_gap("flash_attn", Causal(), True, args, half)
    else:
        print("     flash_attn is not installed here")
    found["network float32 against CPU"] = network_gap(args, None, 1e-4)
    found["network bf16 against CPU float32"] = network_gap(args, torch.bfloat16, 0.1)
    found["cached against uncached"] = cache_gap(args)
    found["a short last batch compiles nothing"] = short_batch(args)
    for name, entry in found.items():
        print(f"{'ok   ' if entry['right'] else 'WRONG'} {name}: {entry['gap']:.1e}", flush=True)
    return found


def verdict(gap: float, limit: float) -> dict:
    return {"gap": gap, "limit": limit, "right": gap <= limit}


def attention_gap(
    backend: str, rule, both: bool, args, dtype=torch.float32, documents: int = 1
) -> dict:
    """Largest difference of output and gradients in `dtype` to dense float32, of the scale."""
    keys = 2 * args.length
    queries = keys if both else args.length
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, n, 64) for n in (queries, keys, keys, queries)]
    made = [torch.randn(s, generator=generator).to(args.device) for s in shapes]
    results, segments = [], None
    if documents > 1:  # borders at another place in each row
        starts = torch.rand(2, args.length, generator=generator).argsort(-1) < documents - 1
        segments = starts.cumsum(-1).repeat(1, 2).to(args.device)
    made = [x.to(dtype).float() for x in made]
    for prepare, made_in in ((dense, torch.float32), (get_backend(backend), dtype)):
        qkv = [x.to(made_in, copy=True).requires_grad_() for x in made[:3]]
        out = prepare(rule, queries, keys, segments, args.device)(*qkv)
        out.backward(made[3].to(made_in))
        results.append([out.detach(), *(x.grad for x in qkv)])
    pairs = zip(*results, strict=True)
    gap = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    limits = {torch.bfloat16: 2e-2, torch.float32: 1e-3 if backend == "flex" else 1e-4}
    return verdict(gap, limits[dtype])


@torch.no_grad()
def network_gap(args, dtype, limit: float) -> dict:
    net = network(args).eval()
    tokens = torch.randint(args.vocab - 1, (2, 2 * args.length), device=args.device)
    rule = BlockDiffusion(16)
    with autocast(args.device, dtype):
        ours = net.logits(net.hidden(tokens, rule=rule)).float().cpu()
    net, tokens = net.to("cpu"), tokens.cpu()
    reference = net.logits(net.hidden(tokens, rule=rule))
    return verdict(float((ours - reference).abs().max() / reference.abs().max()), limit)


def autocast(device: torch.device, dtype):
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@torch.no_grad()
def cache_gap(args) -> dict:
    net = network(args).eval()
    tokens = torch.randint(args.vocab - 1, (3, 64), device=args.device)
    whole = net.hidden(tokens, rule=BlockCausal(16))
    cache, parts = net.new_cache(3, 64, 16), []
    for start in range(0, 64, 16):
        block = tokens[:, start : start + 16]
        parts.append(net.hidden(block, rule=cache.rule, cache=cache))
        cache = cache.commit(16)
    gap = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())
    return verdict(gap, 1e-4)


def short_batch(args) -> dict:
    """Graphs made by a smaller batch after a larger one."""
    if args.device.type == "cpu":
        return verdict(0, 0)
    from torch._dynamo.utils import counters

    net = network(args, backend="flex")
    graphs = []
    for rows in (4, 3):
        tokens = torch.randint(args.vocab - 1, (rows, 2 * args.length), device=args.device)
        with autocast(args.device, torch.bfloat16):
            net.hidden(tokens, rule=BlockDiffusion(16)).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    return verdict(graphs[1] - graphs[0], 0)


# ---- train --------------------------------------------------------------------------------------


def compile_steps(args) -> dict:
    """Of each compiled kind one step; of sampling the first blocks. Nothing is timed."""
    work = {"sampling": lambda: compile_sampling(args)} if "sampling" in args.of else {}
    for kind in (kind for kind in kinds(args) if kind.compiled):
        work[kind.name] = lambda kind=kind: stepper(kind, args)(0)
    seconds = {}
    for name, make in work.items():
        started = time.perf_counter()
        with suppress(torch.OutOfMemoryError):  # `train` says so
            make()
        release(args.device)
        seconds[name] = time.perf_counter() - started
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    return seconds


def compile_sampling(args) -> None:
    denoise = sampler(args)
    for rows in (1, many(args), 8):
        sampled(denoise, rows, args.length // 4, 1, args)


def kinds(args) -> list[Kind]:
    """On a CPU FlexAttention has no backward pass, and compiling takes minutes."""
    able = [k for k in KINDS if not args.tiny or not (k.compiled or k.backend == "flex")]
    return [kind for kind in able if kind.backend in args.of]


def train(args) -> dict:
    peak = matmul_peak(args.device, torch.float32 if args.tiny else torch.bfloat16)
    print(f"matrix product: {peak / 1e12:.1f} TFLOP/s", flush=True)
    found, deadline = {"peak": peak}, time.monotonic() + args.seconds
    for kind in kinds(args):
        if time.monotonic() > deadline:
            found[kind.name] = {"left_out": f"--seconds={args.seconds:.0f} are over"}
            continue
        release(args.device)
        try:
            found[kind.name] = entry = measure(kind, peak, args)
        except torch.OutOfMemoryError:
            found[kind.name] = {"left_out": f"{args.batch} sequences need more memory"}
            continue
        print(f"{kind.name:<24} {step_speed(entry)}  first step {entry['first_step']:.0f} s")
    return found


def stepper(kind: Kind, args):
    """A function of a step's number and batch that makes one whole step: draws, loss, gradients,
    clipping, AdamW, EMA."""
    torch._dynamo.reset()  # its limit of graphs per function is for one network
    net = network(
        args, algo=kind.algo, backend=kind.backend, compiled=kind.compiled, dropout=0.1
    ).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    ema = EMA(net.named_parameters(), 0.9999)
    mask_id, size = args.vocab - 1, kind.size or args.length
    if kind.algo == "ar":
        objective = Autoregressive(mask_id)
    else:
        objective = MaskedDiffusion(mask_id, size, get_schedule("loglinear"))

    def question(step: int, batch: int):
        x0 = torch.randint(mask_id, (batch, args.length))
        ones = torch.ones_like(x0)
        if kind.algo == "ar":
            return objective.question(x0, ones, training=True)
        draws = draw_examples(
            1,
            torch.arange(batch) + step * batch,
            global_batch=batch,
            length=args.length,
            block_size=size,
            antithetic=True,
        )
        return objective.question(x0, ones, draws, interval=(1e-3, 1.0), training=True)

    def loss(backbone, asked):
        return objective.answer(backbone, asked).mean

    def sent(asked):
        return asked.to(args.device)

    graphed = GraphedLoss(net, loss, sent, shared=False)

    def run(step: int, batch: int = args.batch) -> torch.Tensor:
        """Returns the loss."""
        optimizer.zero_grad()
        asked = question(step, batch)
        with autocast(args.device, None if args.tiny else torch.bfloat16):
            # as in diffusion.py
            value = graphed(asked) if kind.compiled else loss(net, sent(asked))
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.update(net.named_parameters())
        return value.detach()

    return run


def measure(kind: Kind, peak: float, args) -> dict:
    run = stepper(kind, args)
    started = time.perf_counter()
    run(0)
    synchronise(args.device)
    first = time.perf_counter() - started
    run(1), run(2), run(3)  # with compilation the third records
    synchronise(args.device)
    started = time.perf_counter()
    losses = [run(4 + step) for step in range(args.steps)]
    synchronise(args.device)
    seconds = (time.perf_counter() - started) / args.steps
    if not torch.stack(losses).isfinite().all():  # numbers that are not are quickly made
        raise ArithmeticError(f"{kind.name}: a loss is not finite: {losses}")
    sizes, size = args.sizes, kind.size or args.length
    shape = Shape(kind.algo, sizes["hidden_size"], sizes["n_blocks"], args.vocab, args.length, size)
    memory = 0 if args.device.type == "cpu" else torch.accelerator.max_memory_allocated()
    entry = {
        "seconds": seconds,
        "loss": losses[-1].item(),
        "first_step": first,
        "tokens_per_second": args.batch * args.length / seconds,
        "mfu": flops(shape).step * args.batch / seconds / peak,
        "memory_gib": memory / 2**30,
    }
    if memory and not kind.compiled:  # another batch would be compiled anew
        entry["largest_batch"] = largest_batch(run, memory, args)
    return entry


def largest_batch(run, memory: int, args) -> int:
    """A multiple of BATCHES that fits while the next does not (or as far as TRIES go); `memory`:
    bytes that args.batch needs."""
    low, high, guess = args.batch, math.inf, 2 * args.batch
    last = None  # as far as memory goes if it grows evenly
    for _ in range(TRIES):
        if fits(run, guess, args):
            low = guess
        else:
            high = guess
        if last is None and low > args.batch:
            each = (torch.accelerator.max_memory_allocated() - memory) / (low - args.batch)
            last = args.batch + int((capacity(args.device) - memory) / each)
        if high - low <= BATCHES:
            break
        middle = (low + high) // 2 if last is None else last
        guess = max(low + BATCHES, min(middle // BATCHES * BATCHES, high - BATCHES))
    return low


def capacity(device: torch.device) -> int:
    """Bytes that tensors of this process can take."""
    free = torch.get_device_module(device).mem_get_info()[0]
    return free + torch.accelerator.memory_reserved()


def fits(run, batch: int, args) -> bool:
    release(args.device)
    try:
        run(0, batch)
        synchronise(args.device)
    except torch.OutOfMemoryError:
        return False
    return True


def release(device: torch.device) -> None:
    """Memory that nothing holds any more goes back to the device."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


# ---- sample -------------------------------------------------------------------------------------


def sample(args) -> dict:
    found, denoise = {}, sampler(args)
    for name, rows, texts in (("one", 1, 3), ("many", many(args), 1)):
        sampled(denoise, rows, args.length // 4, 1, args)  # compiles
        found[name] = entry = sampled(denoise, rows, args.length, texts, args)
        print(
            f"{rows} x {args.length} tokens: {entry['seconds'][-1]:.2f} s,"
            f" {entry['tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )
    # 2 048 tokens and 8 192: what a block costs once the window is full
    cost = [block_seconds(denoise, 8, start, args) for start in (2 * args.length, 8 * args.length)]
    found["block_seconds"], found["cost_ratio"] = cost, cost[1] / cost[0]
    print(
        f"a block of 8 texts behind {2 * args.length} and {8 * args.length} tokens:"
        f" {1000 * cost[0]:.2f} and {1000 * cost[1]:.2f} ms, {found['cost_ratio']:.3f} x",
        flush=True,
    )
    return found


def many(args) -> int:
    """Texts of a large batch."""
    return 4 if args.tiny else 512


def sampler(args):
    net = network(args, compiled=not args.tiny).eval()
    if not args.tiny:
        net.freeze(torch.bfloat16)
    objective = MaskedDiffusion(args.vocab - 1, 16, get_schedule("loglinear"))
    return objective.denoiser(net, whole_window=False)


def sampled(denoise, rows: int, length: int, texts: int, args) -> dict:
    """`texts` batches of texts one after the other; tokens/s of the last one."""
    seconds = []
    synchronise(args.device)
    started = time.perf_counter()
    for group in groups(denoise, rows, length, rows * texts, args):
        if group:
            synchronise(args.device)
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    return {"seconds": seconds, "tokens_per_second": rows * length / seconds[-1]}


def block_seconds(denoise, rows: int, start: int, args, warm_up: int = 4, blocks: int = 8) -> float:
    """Of one more block behind `start` tokens."""
    made = groups(denoise, rows, start + 16 * (warm_up + blocks + 1), rows, args, given=start)
    for _ in range(warm_up):
        next(made)
    synchronise(args.device)
    started = time.perf_counter()
    for _ in range(blocks):
        next(made)
    synchronise(args.device)
    return (time.perf_counter() - started) / blocks


def groups(denoise, rows: int, length: int, texts: int, args, given: int = 1):
    """Rounds of one block; `given`: tokens that are there already."""
    from samplers import Request, Settings, generate

    settings = Settings(
        length=length,
        bos_id=0,
        eos_id=0,
        batch_size=rows,
        block_size=16,
        context_size=args.length,
        kv_cache=True,
        nucleus_p=0.9,
    )
    requests = [Request(row, (0,) * given) for row in range(texts)]
    with autocast(args.device, None if args.tiny else torch.bfloat16):
        yield from generate("bamdlm", denoise, requests, settings, device=args.device)


PARTS = {"check": check, "compile": compile_steps, "train": train, "sample": sample}


if __name__ == "__main__":
    sys.exit(main())
