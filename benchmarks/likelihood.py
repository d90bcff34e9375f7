"""Evaluating the likelihood (mode=ppl_eval): tokens/s and perplexity against a plain evaluation.

    python benchmarks/likelihood.py             a table, then one line of JSON
    python benchmarks/likelihood.py --check     exit 1 where a bound is missed
    python benchmarks/likelihood.py --corpus 16 --device cuda
                                                time of AG News' size alone, in batches of 16

The plain evaluation is the published step (plain_step.py) without gradients: logits of all 2L rows,
log-softmax over the vocabulary. Both see the same masks of the same random ids, in float32; ours
once more in bf16, with the error that makes. They take turns, batch by batch; the ratio is the
median over the batches. Then `exact` and `left_to_right` beside their bare matrix products
(likelihood_cost.py).
"""

import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.support.conclusion import conclude, options

SPEED = {"bamdlm": 4.0}  # at least
NETWORK = {"hidden": 256, "blocks": 4, "heads": 4, "vocab": 50_258}
SAME = 1e-4  # of the perplexity
ALGORITHMS = ("bamdlm", "mdlm", "sedd", "ar")


def main(argv=None) -> int:
    args = parse(argv)
    import torch

    torch.set_num_threads(args.threads)
    from benchmarks import likelihood_cost

    figures = {"load_before": os.getloadavg()[0], "algorithms": {}, "costs": {}}
    if args.corpus:
        return conclude(figures, corpus_misses(figures, args), check=args.check)
    with torch.inference_mode():
        if args.rounds:
            clock = time.process_time if args.clock == "cpu" else time.perf_counter
            figures["costs"] = likelihood_cost.costs(args, clock)
        for name, cost in figures["costs"].items():
            print(
                f"{name}: {cost['over_products']:.2f} x its products,"
                f" {cost['nelbo_passes']:.1f} x one nelbo pass",
                flush=True,
            )
        for algo in args.only.split(","):
            figures["algorithms"][algo] = found = evaluate(algo, args)
            print(
                f"{algo:<8}{found['tokens_per_second']:9,.0f} tokens/s"
                f"  plain{found['plain_tokens_per_second']:9,.0f}{found['speed']:7.2f} x"
                f"   perplexity off by {found['gap']:.1e}; bf16 by {found['bf16_gap']:.1e}",
                flush=True,
            )
    figures["machine"] = f"{platform.machine()}, {args.threads} threads, {args.device}"
    figures["torch"], figures["load_after"] = torch.__version__, os.getloadavg()[0]
    missed = [*misses(figures["algorithms"]), *likelihood_cost.misses(figures["costs"])]
    return conclude(figures, missed, check=args.check)


def parse(argv):
    parser = options(__doc__, threads=2, batches=10, batch=4, length=256, block=16, **NETWORK)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=3, help="of exact and left_to_right")
    parser.add_argument("--corpus", type=int, default=0, help="rows of a batch; see above")
    parser.add_argument("--only", default=",".join(ALGORITHMS))
    return parser.parse_args(argv)


def evaluate(algo: str, args) -> dict:
    """Tokens/s and perplexity of both, over the same batches."""
    import torch

    from benchmarks.support.pair import make_pair, network

    net = network(algo, args).eval()
    shape = (args.batches, args.batch, args.length)
    ids = torch.randint(args.vocab - 1, shape, device=args.device)
    pair = make_pair(algo, net, args.heads, ids, args.block, training=False)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def timed(way, index: int) -> tuple[float, float]:
        if args.device != "cpu":
            torch.accelerator.synchronize()
        started = clock()
        nll = float(way(index))
        return nll, clock() - started

    def half(index: int):
        with torch.autocast(args.device, torch.bfloat16):
            return pair.ours(index)

    pair.ours(0), pair.plain(0)
    ways = (pair.ours, pair.plain, half)
    rounds = [[timed(way, i) for way in ways] for i in range(args.batches)]
    tokens = args.batch * args.length
    nll, plain_nll, half_nll = (statistics.fmean(r[way][0] for r in rounds) for way in range(3))
    return {
        "tokens_per_second": tokens / statistics.median(r[0][1] for r in rounds),
        "plain_tokens_per_second": tokens / statistics.median(r[1][1] for r in rounds),
        "bf16_tokens_per_second": tokens / statistics.median(r[2][1] for r in rounds),
        "speed": statistics.median(r[1][1] / r[0][1] for r in rounds),
        "nll": nll,
        # relative difference of two perplexities
        "gap": abs(math.expm1(nll - plain_nll)),
        "bf16_gap": abs(math.expm1(half_nll - plain_nll)),
    }


def corpus_misses(figures: dict, args) -> list[str]:
    """Adds the times to the figures; the bound is one for an H100."""
    import torch

    from benchmarks import likelihood_cost

    figures["corpus"] = found = likelihood_cost.corpus(args.device, args.corpus)
    figures["torch"] = torch.__version__
    for name, time_of in found.items():
        print(f"{name}: {time_of['seconds']:.1f} s", flush=True)
    most, seconds = likelihood_cost.CORPUS_SECONDS, found["exact"]["seconds"]
    return [f"exact: {seconds:.0f} s, wanted {most}"] if seconds > most else []


def misses(algorithms: dict):
    for algo, found in algorithms.items():
        if found["speed"] < SPEED.get(algo, 1.0):
            yield f"{algo}: {found['speed']:.2f} times faster, wanted {SPEED.get(algo, 1.0)}"
        if not found["gap"] <= SAME:
            yield f"{algo}: perplexity off by {found['gap']:.1e}, wanted {SAME:.0e}"


if __name__ == "__main__":
    sys.exit(main())
