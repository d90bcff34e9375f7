"""The chunked head and loss (objectives/head.py) against torch.nn.functional.linear_cross_entropy.

    python benchmarks/head.py                    a table, then one line of JSON
    python benchmarks/head.py --threads 1 --clock cpu

Forward and backward pass over M hidden rows, all with the same factor: torch's function takes no
factor per token, which the weight 1 / t of masked diffusion needs, so only ar could use it. torch
below 2.13 has no such function. The three take turns; seconds are medians over the rounds.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from objectives.head import cross_entropy_kernel, head_loss


def main(argv=None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden = torch.randn(args.rows, args.width, requires_grad=True)
    linear = torch.nn.Linear(args.width, args.vocab)
    target = torch.randint(args.vocab - 1, (args.rows,))
    ways = {"ours": partial(ours, hidden, linear, target)}
    if hasattr(F, "linear_cross_entropy"):
        chunks = torch.nn.LinearCrossEntropyOptions()
        ways["torch, in chunks"] = partial(theirs, hidden, linear, target, chunks)
        ways["torch, whole"] = partial(theirs, hidden, linear, target, None)
    losses = {name: loss().item() for name, loss in ways.items()}
    seconds = {name: [] for name in ways}
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    for _ in range(args.rounds):
        for name, loss in ways.items():
            started = clock()
            loss().backward()
            seconds[name].append(clock() - started)
            hidden.grad = linear.weight.grad = linear.bias.grad = None
    found = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"M = {args.rows}, E = {args.width}, V = {args.vocab}, float32, {args.threads} threads")
    for name, median in found.items():
        print(f"{name:<18}{1000 * median:9.1f} ms   loss {losses[name]:.6f}")
    print(json.dumps({"seconds": found, "losses": losses}))
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512, help="that are predicted")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50_258)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return parser.parse_args(argv)


def ours(hidden, linear, target):
    """The mask is the last id, which no row asks for."""
    backbone = SimpleNamespace(
        features=lambda hidden, sigma, row: hidden,
        head_weight=linear.weight,
        head_bias=linear.bias,
        compiled=False,
    )
    factors = torch.full((len(hidden),), 1 / len(hidden))
    kernel = cross_entropy_kernel(backbone, linear.out_features - 1)
    return head_loss(backbone, hidden, target, factors, kernel).total


def theirs(hidden, linear, target, options):
    mask = F.one_hot(torch.tensor(linear.out_features - 1), linear.out_features).bool()
    bias = linear.bias.masked_fill(mask, -torch.inf)
    return F.linear_cross_entropy(hidden, linear.weight, target, linear_bias=bias, options=options)


if __name__ == "__main__":
    sys.exit(main())
