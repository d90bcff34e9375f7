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

from models.dit import DiT
from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import draw_example_noise


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
    steps = {
        "ar": step(options, None),
        "mdlm": step(options, options.length),
        "bamdlm 16": step(options, 16),
        "bamdlm 4": step(options, 4),
    }
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(options.rounds):
        for name, run in steps.items():
            best[name] = min(best[name], run())
    for name, seconds in best.items():
        ratio = seconds / best["mdlm"]
        print(f"{name:<12}{1000 * seconds:9.1f} ms a step   {ratio:5.2f} of mdlm")


def step(options, block_size: int | None):
    """A function that makes one step and returns its seconds."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    net = DiT(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        cond_dim=128,
        n_blocks=options.blocks,
        n_heads=options.hidden // 64,
        adaln=block_size is not None,
    ).to(device)
    x0 = torch.randint(options.vocab - 1, (options.batch, options.length), device=device)
    mask, rows = torch.ones_like(x0), torch.arange(options.batch, device=device)

    def loss():
        if block_size is None:
            return Autoregressive(options.vocab - 1).loss(net, x0, mask, training=True)
        objective = MaskedDiffusion(options.vocab - 1, block_size, get_schedule("loglinear"))
        noise = draw_example_noise(
            1,
            rows,
            global_batch=options.batch,
            length=options.length,
            block_size=block_size,
            antithetic=True,
        )
        return objective.loss(net, x0, mask, noise, interval=(1e-3, 1.0), training=True)

    def run() -> float:
        started = time.perf_counter()
        loss().mean.backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        net.zero_grad()
        return time.perf_counter() - started

    return run


if __name__ == "__main__":
    main()
