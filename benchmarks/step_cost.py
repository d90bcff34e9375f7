"""Time of one training step (loss and gradients) of the algorithms on the same network.

    python benchmarks/step_cost.py [--device cpu] [--hidden 256] [--blocks 4] [--length 256]

The ratio between the lines is what docs/fine-tuning.md multiplies with. Least of several rounds, in
which the algorithms take turns.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.support.pair import make_pair, network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    options.heads = options.hidden // 64
    steps = {
        "ar": step(options, "ar"),
        "mdlm": step(options, "mdlm"),
        "bamdlm 16": step(options, "bamdlm", 16),
        "bamdlm 4": step(options, "bamdlm", 4),
    }
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(options.rounds):
        for name, run in steps.items():
            best[name] = min(best[name], run())
    for name, seconds in best.items():
        ratio = seconds / best["mdlm"]
        print(f"{name:<12}{1000 * seconds:9.1f} ms a step   {ratio:5.2f} of mdlm")


def step(options, algo: str, block_size: int = 1):
    """A function that makes one step and returns its seconds."""
    ids = torch.randint(
        options.vocab - 1, (1, options.batch, options.length), device=options.device
    )
    net = network(algo, options)
    pair = make_pair(algo, net, options.heads, ids, block_size, training=True)

    def run() -> float:
        started = time.perf_counter()
        pair.ours(0).backward()
        if options.device != "cpu":
            torch.accelerator.synchronize()
        net.zero_grad()
        return time.perf_counter() - started

    return run


if __name__ == "__main__":
    main()
