"""One GPU: are the numbers right, how fast are training and sampling? Run by gpu.sh.

    python benchmarks/gpu.py check train sample      the parts to run; a table, a line of JSON
    python benchmarks/gpu.py --tiny check train sample        on a CPU, to try the script itself
    python benchmarks/gpu.py train sample --check    exit code 1 where a target is missed

What is wrong in `check` gives exit code 1 in any case.

check             flex (compiled), sdpa and, where installed, flash_attn, forward and backward,
                  against dense float32; the network in float32 and bf16 against the CPU; cached
                  against uncached
train             model=small, L = 1024, vocabulary 50 258, synthetic ids, bf16: tokens/s, MFU,
                  memory; of compiled bamdlm the largest batch
sample            bamdlm S = 16, bf16: batch 1 and 512; 2 048 against 8 192 tokens
parallel          the same by sampling.steps=threshold, which may reveal several tokens at once:
                  by a network that is never certain of a token, and by one that always is
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_check import check
from benchmarks.gpu_network import SMALL, TINY, device_name
from benchmarks.gpu_sample import parallel, sample
from benchmarks.gpu_table import missed
from benchmarks.gpu_train import ALGORITHMS, BACKENDS, train
from benchmarks.support.conclusion import conclude
from training.signals import end_on_interrupt
from utils import write_json

# each yields {name: what was found} as far as it has come
PARTS = {"check": check, "train": train, "sample": sample, "parallel": parallel}


def main(argv=None) -> int:
    args = parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.monotonic()
    found = {"device": device_name(args.device), "torch": torch.__version__}
    for part in args.parts:
        for so_far in PARTS[part](args):
            found[part] = so_far
            if args.out is not None:  # whatever comes, this was measured
                write_json(args.out, found)
        print(f"-- {part} done after {time.monotonic() - started:.0f} s", flush=True)
    wrong = [name for name, entry in found.get("check", {}).items() if not entry["right"]]
    for name in wrong:
        print(f"WRONG: {name}")
    found["wrong"] = wrong
    targets = [] if args.tiny else missed(found)
    return max(conclude(found, targets, check=args.check, out=args.out), int(bool(wrong)))


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="a small network, on the CPU")
    parser.add_argument("--check", action="store_true", help="exit code 1 for a missed target")
    parser.add_argument("--steps", type=int, default=8, help="timed, after the warm-up (8)")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step (32)")
    parser.add_argument(
        "--seconds", type=float, default=600, help="for `train`; then it begins with no other step"
    )
    add_choices(parser, "--backend", BACKENDS)
    add_choices(parser, "--algo", sorted({algo for algo, _ in ALGORITHMS}))
    parser.add_argument(
        "--turn",
        type=Path,
        metavar="FOLDER",
        help="compile (not for `check`); make FOLDER/ready; measure once FOLDER/go is there",
    )
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    args = parser.parse_args(argv)
    accelerator = None if args.tiny else torch.accelerator.current_accelerator()
    if accelerator is None and not args.tiny:
        parser.error("no accelerator here; --tiny tries the script on the CPU")
    if args.tiny and args.check:
        parser.error("--tiny is too small for the targets: leave out one of the two")
    args.device = accelerator or torch.device("cpu")
    args.length = 64 if args.tiny else 1024
    args.vocab = 101 if args.tiny else 50_258
    args.sizes = TINY if args.tiny else SMALL
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: at least 1")
    if args.batch < 8:
        parser.error(f"--batch={args.batch}: at least 8, or a largest batch cannot be looked for")
    if args.tiny:
        args.steps, args.batch = 2, 2
    return args


def add_choices(parser, name: str, choices: list[str]) -> None:
    parser.add_argument(
        name, nargs="+", default=choices, choices=choices, help="those that `train` measures"
    )


if __name__ == "__main__":
    end_on_interrupt()
    sys.exit(main())
