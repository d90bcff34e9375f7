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

from benchmarks.support.pair import INTERVAL, make_pair, network, noise_of
from noise_schedule import get_schedule
from objectives.block_diffusion import MaskedDiffusion
from objectives.sizes import SizeLaw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy CPU, of one thread"
    )
    options = parser.parse_args()
    options.heads = options.hidden // 64
    steps = {
        "ar": step(options, "ar"),
        "mdlm": step(options, "mdlm"),
        "bamdlm 16": step(options, "bamdlm", 16),
        "bamdlm 4": step(options, "bamdlm", 4),
        "bamdlm 1, 4, 16": step(options, "bamdlm", 4, SizeLaw((1, 4, 16), (0.25, 0.5, 0.25))),
    }
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(options.rounds):
        for name, run in steps.items():
            best[name] = min(best[name], run())
    for name, seconds in best.items():
        ratio = seconds / best["mdlm"]
        print(f"{name:<16}{1000 * seconds:9.1f} ms a step   {ratio:5.2f} of mdlm")


def step(options, algo: str, block_size: int = 1, sizes: SizeLaw | None = None):
    """A function that makes one step and returns its seconds. sizes: rows draw those of their
    blocks."""
    ids = torch.randint(
        options.vocab - 1, (1, options.batch, options.length), device=options.device
    )
    net = network(algo, options)
    loss = make_pair(algo, net, options.heads, ids, block_size, training=True).ours
    if sizes is not None:
        loss = loss_in_sizes(net, ids[0], block_size, sizes)

    now = time.process_time if options.clock == "cpu" else time.perf_counter

    def run() -> float:
        started = now()
        loss(0).backward()
        if options.device != "cpu":
            torch.accelerator.synchronize()
        net.zero_grad()
        return now() - started

    return run


def loss_in_sizes(net, ids: torch.Tensor, block_size: int, sizes: SizeLaw):
    """The loss of ids [B, L] as a function of the step."""
    objective = MaskedDiffusion(
        net.vocab_size - 1, block_size, get_schedule("loglinear"), sizes=sizes
    )

    def loss(i: int) -> torch.Tensor:
        noise = noise_of(i, *ids.shape, block_size, ids.device, sizes)
        settings = {"interval": INTERVAL, "training": True}
        return objective.loss(net, ids, torch.ones_like(ids), noise, **settings).mean

    return loss


if __name__ == "__main__":
    main()
