"""Several GPUs of one host: how training scales with ddp, and whether a run with fsdp resumes.

    python benchmarks/gpu_several.py            a table, a line of JSON; run by gpu.sh
    python benchmarks/gpu_several.py --tiny     two processes on a CPU, to try the script itself
    python benchmarks/gpu_several.py --check    exit code 1 where it scales worse than wanted

Exit code 1 in any case where a resumed run ends with other weights than one that was not
interrupted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning as L
import torch

from benchmarks import gpu
from benchmarks.conclusion import conclude
from diffusion import Diffusion, NoiseSettings, OptimizerSettings
from noise_schedule import get_schedule
from objectives.block_diffusion import MaskedDiffusion
from tests.runs import ALGORITHMS, tiny

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 4  # steps
EFFICIENCY = 0.9  # aim
RESUMED = 1e-6  # largest difference of a weight: sums over devices may take another order


def main(argv=None) -> int:
    args = parse(argv)
    if args.worker:
        return worker(args)
    most = 2 if args.tiny else torch.accelerator.device_count()
    counts = [n for n in (1, 2, 4, 8) if n <= most]
    wrong, missed = False, []
    found = {"tokens_per_second": {n: scaled(n, args) for n in counts}}
    for n, speed in found["tokens_per_second"].items():
        efficiency = speed / (n * found["tokens_per_second"][1])
        print(f"ddp on {n}: {speed:11,.0f} tokens/s  efficiency {efficiency:.2f}", flush=True)
        if efficiency < EFFICIENCY and not args.tiny:
            missed.append(f"ddp on {n}: efficiency {efficiency:.2f}, wanted {EFFICIENCY}")
    if most > 1:
        found["resumed"] = gap = resumed(most, args)
        wrong = gap > RESUMED
        print(f"fsdp on {most}: a resumed run's weights differ by at most {gap:.1e}")
    if wrong:
        print(f"WRONG: more than {RESUMED}")
    return 1 if conclude(found, missed, check=args.check) or wrong else 0


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit code 1 for a missed target")
    parser.add_argument("--steps", type=int, default=20, help="timed, after the warm-up")
    parser.add_argument("--batch", type=int, default=32, help="sequences per device and step")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.tiny and args.check:
        parser.error("--tiny is too small for the target: leave out one of the two")
    if args.tiny:
        args.steps, args.batch = 3, 2
    elif not torch.accelerator.is_available():
        parser.error("no accelerator here; --tiny tries the script on the CPU")
    return args


def torchrun(devices: int, words: list[str]) -> str:
    """What the processes print; a RuntimeError with it where one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={devices}", *words]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
    return ended.stdout


# ---- scaling ------------------------------------------------------------------------------------


def scaled(devices: int, args) -> float:
    """tokens/s of all devices together, the batch of each kept."""
    words = ["benchmarks/gpu_several.py", "--worker", f"--steps={args.steps}"]
    words += [f"--batch={args.batch}", *(["--tiny"] if args.tiny else [])]
    return float(torchrun(devices, words).rsplit("tokens/s:", 1)[1])


class Clock(L.Callback):
    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == WARM_UP:
            gpu.synchronise(self.device)
            self.seconds = -time.perf_counter()

    def on_train_end(self, trainer, pl_module) -> None:
        gpu.synchronise(self.device)
        self.seconds += time.perf_counter()


def worker(args) -> int:
    """One process of a training; the first prints the speed of all."""
    devices, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    here = gpu.parse(["train", *(["--tiny"] if args.tiny else [])])
    here.device, device = torch.device("cpu"), here.device  # Lightning moves the network
    net = gpu.network(
        here, backend="sdpa" if args.tiny else "flex", compiled=not args.tiny, dropout=0.1
    )
    module = Diffusion(
        backbone=net,
        objective=MaskedDiffusion(here.vocab - 1, 16, get_schedule("loglinear")),
        noise=NoiseSettings(1, (1e-3, 1.0), 1e-3, True, args.batch * devices, args.batch),
        optimizer=OptimizerSettings(3e-4, (0.9, 0.999), 1e-8, 0.0, _constant),
        ema_decay=0.9999,
    )
    clock = Clock(device)
    trainer = L.Trainer(
        accelerator="cpu" if args.tiny else "gpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="32-true" if args.tiny else "bf16-mixed",
        max_steps=WARM_UP + args.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[clock],
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(here, args, rank), batch_size=None))
    if rank == 0:
        print(f"tokens/s: {devices * args.batch * here.length * args.steps / clock.seconds}")
    return 0


def batches(here, args, rank: int) -> list[dict]:
    generator = torch.Generator().manual_seed(rank)
    made = []
    for step in range(WARM_UP + args.steps):
        ids = torch.randint(here.vocab - 1, (args.batch, here.length), generator=generator)
        row = torch.arange(args.batch) + step * args.batch
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": row})
    return made


def _constant(step: int) -> float:
    return 1.0


# ---- resume -------------------------------------------------------------------------------------


def resumed(devices: int, args) -> float:
    """Largest difference of a weight at step 8 between a run stopped at step 4 and one that was
    not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["main.py", *tiny(folder), *ALGORITHMS["bamdlm"], "strategy=fsdp"]
        words += [f"trainer.devices={devices}", f"loader.global_batch_size={8 * devices}"]
        if not args.tiny:
            words += ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]
        last = []
        for run, stops in (("whole", (8,)), ("resumed", (4, 8))):
            for stop in stops:
                more = [f"trainer.max_steps={stop}", f"checkpointing.save_dir={folder / run}"]
                torchrun(devices, [*words, *more])
            checkpoint = folder / run / "checkpoints" / "last.ckpt"
            last.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    whole, again = last
    return max(float((again[name] - value).abs().max()) for name, value in whole.items())


if __name__ == "__main__":
    sys.exit(main())
