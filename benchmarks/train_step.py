"""The training step against a plain step as published (plain_step.py): time, memory, equality.

    python benchmarks/train_step.py              tables, then one line of JSON
    python benchmarks/train_step.py --check      exit 1 where a bound is missed
    python benchmarks/train_step.py --only bamdlm --rounds 3 --skip growth,overhead     a quick look

Forward and backward pass, weights and batch the same for both, float32, no dropout. The two take
turns; a ratio is the median over the rounds of plain seconds / our seconds in that round. Ours also
draws its noise, the plain step is given x_t. Memory is the peak of a process of its own that made
two steps, above what it had after its imports.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.support.conclusion import conclude, options

SPEED = {"bamdlm": 4.0, "mdlm": 3.0, "sedd": 2.5, "ar": 1.3}  # at least
MEMORY = {"bamdlm": 0.4}  # at most
EQUAL = 1e-5  # loss, relative; gradients, of the norm of each tensor
OVER_MDLM = 1.75  # bamdlm / mdlm, time per token, at most
ATTENTION = 1.4  # split over dense sdpa at n = 1024, at least
GROWTH = 1.1  # exponent of the cost without attention, at most
OVERHEAD = 0.05  # data, logging, EMA, checks of a whole step, at most
NETWORK = {"hidden": 256, "blocks": 4, "heads": 4, "vocab": 50_258}
LENGTHS = (256, 512, 1024, 2048)
ALGORITHMS = ("bamdlm", "mdlm", "sedd", "ar")
PARTS = ("speed", "memory", "attention", "growth", "overhead")


@dataclass(frozen=True)
class Case:
    algo: str
    length: int
    batch: int
    block_size: int  # bamdlm's

    def __str__(self) -> str:
        return f"{self.algo} L={self.length} B={self.batch}"


def main(argv=None) -> int:
    args = parse(argv)
    if args.measure:
        print(json.dumps(peak(case_of(args.measure, args), args)))
        return 0
    import torch

    torch.set_num_threads(args.threads)
    cases = [Case(algo, n, b, args.block) for n, b in args.shapes for algo in args.only]
    figures = {"cases": [], "load_before": os.getloadavg()[0]}
    for case in cases:
        entry = {"case": str(case), "algo": case.algo, "length": case.length}
        if "speed" in args.parts:
            entry |= compare(case, args)
        if "memory" in args.parts:
            entry |= memory(case, args)
        figures["cases"].append(entry)
        print(line(entry), flush=True)
    for part, measure in (("attention", attention), ("growth", growth), ("overhead", overhead)):
        if part in args.parts:
            figures[part] = measure(args)
            print(f"{part}: {show(figures[part])}", flush=True)
    if {"bamdlm", "mdlm"} <= set(args.only) and "speed" in args.parts:
        figures["bamdlm_over_mdlm"] = over_mdlm(figures["cases"])
        print(f"bamdlm : mdlm, time per token: {show(figures['bamdlm_over_mdlm'])}")
    figures["machine"] = f"{platform.machine()}, {args.threads} threads, {args.device}"
    figures["torch"], figures["load_after"] = torch.__version__, os.getloadavg()[0]
    return conclude(figures, misses(figures), check=args.check)


def parse(argv):
    parser = options(__doc__, threads=2, rounds=10, block=16, **NETWORK)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for machines with other work on them (use --threads 1)",
    )
    parser.add_argument("--only", default=",".join(ALGORITHMS), help="algorithms")
    parser.add_argument("--skip", default="", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shapes", default="256x4,1024x2", help="length x batch, several")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="of the growth fit")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a process of its own: algo:LxB:who
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    args.parts = [part for part in PARTS if part not in args.skip.split(",")]
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    args.lengths = [int(n) for n in args.lengths.split(",")]
    return args


# ---- the two steps ----------------------------------------------------------------------------


def make(case: Case, args):
    """The Pair of a case."""
    import torch

    from benchmarks.support.pair import make_pair, network

    net = network(case.algo, args)
    ids = torch.randint(args.vocab - 1, (1, case.batch, case.length), device=args.device)
    return make_pair(case.algo, net, args.heads, ids, case.block_size, training=True)


def seconds(steps, loss, step: int, args) -> float:
    steps.net.zero_grad()
    synchronise(args)
    started = now(args)
    loss(step).backward()
    synchronise(args)
    return now(args) - started


def now(args) -> float:
    return time.process_time() if args.clock == "cpu" else time.perf_counter()


def synchronise(args) -> None:
    if args.device != "cpu":
        import torch

        torch.accelerator.synchronize()


def compare(case: Case, args) -> dict:
    steps = make(case, args)
    loss_gap, gradient_gap = gaps(steps)
    ours, plain = [], []
    for step in range(args.rounds):
        ours.append(seconds(steps, steps.ours, step, args))
        plain.append(seconds(steps, steps.plain, step, args))
    ratios = [p / o for p, o in zip(plain, ours, strict=True)]
    return {
        "ours": statistics.median(ours),
        "plain": statistics.median(plain),
        "speed": statistics.median(ratios),
        "tokens_per_second": case.batch * case.length / statistics.median(ours),
        "loss_gap": loss_gap,
        "gradient_gap": gradient_gap,
    }


def gaps(steps) -> tuple[float, float]:
    """How far loss (relative) and gradients (largest over the tensors, of the norm) are apart.

    Tensors whose whole gradient is rounding (the query and key weights see almost none at the
    start) are compared at a thousandth of the largest norm."""
    found = []
    for loss in (steps.ours_given, steps.plain):
        steps.net.zero_grad()
        value = loss(0)
        value.backward()
        gradients = {n: p.grad.clone() for n, p in steps.net.named_parameters()}
        found.append((float(value.detach()), gradients))
    (a, ours), (b, plain) = found
    floor = 1e-3 * max(float(g.norm()) for g in plain.values())
    apart = (float((ours[n] - plain[n]).norm()) / max(float(plain[n].norm()), floor) for n in ours)
    return abs(a - b) / abs(b), max(apart)


# ---- memory -----------------------------------------------------------------------------------


def memory(case: Case, args) -> dict:
    found = {}
    for who in ("ours", "plain"):
        command = [sys.executable, __file__, "--measure", f"{case.algo}:{case.length}x{case.batch}"]
        command[-1] += f":{who}"
        for name in ("device", "threads", "hidden", "blocks", "heads", "vocab", "block"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[who] = json.loads(done.stdout.splitlines()[-1])
    return {
        "memory_ours_mib": found["ours"],
        "memory_plain_mib": found["plain"],
        "memory": found["ours"] / found["plain"],
    }


def case_of(text: str, args) -> Case:
    algo, shape, args.who = text.split(":")
    length, batch = map(int, shape.split("x"))
    return Case(algo, length, batch, args.block)


def peak(case: Case, args) -> float:
    """MiB above the imports after two steps (on an accelerator: its own peak)."""
    import torch

    from benchmarks.support import pair  # all that `make` imports, and torch loads at first use

    assert pair
    torch.set_num_threads(args.threads)
    before = high_water()
    steps = make(case, args)
    for step in range(2):
        seconds(steps, getattr(steps, args.who), step, args)
    if args.device != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    return high_water() - before


def high_water() -> float:
    """Peak resident memory of this process in MiB (getrusage would count the parent's)."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith("VmHWM"):
            return int(text.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM: run this on Linux")


# ---- attention alone, growth, overhead ----------------------------------------------------------


def attention_call(length: int, batch: int, args, prepare):
    """Forward and backward of one layer's attention over 2 * length rows."""
    import torch

    from models.masks import BlockDiffusion

    rows, width = 2 * length, args.hidden // args.heads
    attend = prepare(BlockDiffusion(args.block), rows, rows, None, torch.device(args.device))
    shape = (batch, args.heads, rows, width)
    q, k, v = (torch.randn(shape, device=args.device, requires_grad=True) for _ in range(3))
    out = torch.randn(shape, device=args.device)

    def run() -> float:
        synchronise(args)
        started = now(args)
        attend(q, k, v).backward(out)
        synchronise(args)
        return now(args) - started

    return run


def attention(args) -> dict:
    """Split against dense sdpa, n = L = 1024 (2048 rows) and n = 2L = 1024."""
    from models.attention import dense, sdpa

    found = {}
    for length in (args.shapes[-1][0] // 2, args.shapes[-1][0]):
        split, plain = (attention_call(length, 2, args, prepare) for prepare in (sdpa, dense))
        split(), plain()
        ratios = [(plain(), split()) for _ in range(max(args.rounds, 10))]
        found[str(2 * length)] = statistics.median(p / s for p, s in ratios)
    return found


def growth(args) -> dict:
    """Seconds per length of a bamdlm step at a batch of one; the exponent without attention."""
    from models.attention import sdpa

    whole, rest = {}, {}
    for length in args.lengths:
        steps = make(Case("bamdlm", length, 1, args.block), args)
        layer = attention_call(length, 1, args, sdpa)
        seconds(steps, steps.ours, 0, args), layer()
        repeats = range(1, max(3, args.rounds // 2) + 1)
        whole[length] = statistics.median(seconds(steps, steps.ours, i, args) for i in repeats)
        in_attention = statistics.median(layer() for _ in repeats)
        rest[length] = whole[length] - in_attention * (args.blocks - 0.5)  # the last asks for half
    return {
        "seconds": whole,
        "without_attention": rest,
        "exponent": slope(whole),
        "exponent_without_attention": slope(rest),
    }


def slope(points: dict) -> float:
    """Least squares of log seconds over log length."""
    x = [math.log(n) for n in points]
    y = [math.log(max(s, 1e-9)) for s in points.values()]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )


def overhead(args) -> dict:
    """Shares of a whole bamdlm training step under Lightning, with all of the run's callbacks."""
    from benchmarks.step_profile import profile

    length, batch = args.shapes[0]
    steps = make(Case("bamdlm", length, batch, args.block), args)
    return profile(
        steps.net,
        vocab=args.vocab,
        length=length,
        batch=batch,
        block_size=args.block,
        steps=args.rounds,
        device=args.device,
        clock=lambda: now(args),
    )


# ---- the report -------------------------------------------------------------------------------


def over_mdlm(cases: list[dict]) -> dict:
    rate = {(c["algo"], c["length"]): c["tokens_per_second"] for c in cases}
    return {str(n): rate["mdlm", n] / rate["bamdlm", n] for algo, n in rate if algo == "bamdlm"}


def misses(figures: dict):
    for c in figures["cases"]:
        if "speed" in c:
            if c["speed"] < SPEED[c["algo"]]:
                yield f"{c['case']}: {c['speed']:.2f} times faster, wanted {SPEED[c['algo']]}"
            for what in ("loss_gap", "gradient_gap"):
                if not c[what] <= EQUAL:
                    yield f"{c['case']}: {what} {c[what]:.1e}, wanted {EQUAL:.0e}"
        most = MEMORY.get(c["algo"], 1.0)
        if "memory" in c and c["memory"] > most:
            yield f"{c['case']}: {c['memory']:.2f} of the memory, wanted {most}"
    for length, ratio in figures.get("bamdlm_over_mdlm", {}).items():
        if ratio > OVER_MDLM:
            yield f"bamdlm takes {ratio:.2f} of mdlm at L={length}, wanted {OVER_MDLM}"
    for rows, ratio in figures.get("attention", {}).items():
        if ratio < ATTENTION:
            yield f"attention over {rows} rows: {ratio:.2f} times faster, wanted {ATTENTION}"
    if "growth" in figures and figures["growth"]["exponent_without_attention"] > GROWTH:
        exponent = figures["growth"]["exponent_without_attention"]
        yield f"the cost without attention grows as L^{exponent:.2f}, wanted at most L^{GROWTH}"
    if "overhead" in figures and figures["overhead"]["overhead"] > OVERHEAD:
        yield f"{figures['overhead']['overhead']:.1%} of a step is overhead, wanted {OVERHEAD:.0%}"


def line(entry: dict) -> str:
    text = f"{entry['case']:<22}"
    if "speed" in entry:
        text += (
            f"{1000 * entry['ours']:8.0f} ms  plain{1000 * entry['plain']:8.0f} ms"
            f"{entry['speed']:7.2f} x   loss {entry['loss_gap']:.0e}"
            f"  gradients {entry['gradient_gap']:.0e}"
        )
    if "memory" in entry:
        text += (
            f"   {entry['memory_ours_mib']:6.0f} MiB of {entry['memory_plain_mib']:6.0f}"
            f"  {entry['memory']:.2f}"
        )
    return text


def show(part: dict) -> str:
    return json.dumps(rounded(part))


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
