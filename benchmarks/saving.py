"""How long a save holds training up: a file, and a folder of parts that is written meanwhile.

    python benchmarks/saving.py [--millions 100] [--saves 8] [--folder DIR]

One process saves weights, averages and two moments, all float32: 16 bytes a parameter. Prints the
least, median and most seconds: of a file; of the copy on the host, for which alone training waits
in the other format; and of what a thread writes then.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402  needs the path, as the others do

from checkpointing import sharded, torch_file  # noqa: E402

TENSORS = 50  # weights


def checkpoint(parameters: int) -> dict:
    def made() -> list[torch.Tensor]:
        return [torch.randn(parameters // TENSORS) for _ in range(TENSORS)]

    moments = enumerate(zip(made(), made(), strict=True))
    return {
        "global_step": 1,
        "state_dict": dict(enumerate(made())),
        "ema": {"shadow_params": made()},
        "optimizer_states": [
            {"state": {i: {"exp_avg": a, "exp_avg_sq": b} for i, (a, b) in moments}}
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--millions", type=int, default=100, help="parameters, in millions")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="saving-", dir=asked.folder))
    state, path = checkpoint(asked.millions * 1_000_000), str(folder / "step=1.ckpt")
    seconds: dict[str, list[float]] = {"file": [], "copy": [], "parts": []}
    parts = None
    try:
        for _ in range(asked.saves):
            began = time.perf_counter()
            torch_file.save(state, path)
            seconds["file"].append(time.perf_counter() - began)
            began = time.perf_counter()
            parts = sharded.take_apart(state, before=parts)
            copied = time.perf_counter()
            sharded.write(parts, path, group=None, token="0")
            seconds["copy"].append(copied - began)
            seconds["parts"].append(time.perf_counter() - copied)
            shutil.rmtree(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, found in seconds.items():
        least, most, usual = min(found), max(found), statistics.median(found)
        print(f"{name:<6} {least:.2f} s, {usual:.2f} s, {most:.2f} s")


if __name__ == "__main__":
    main()
