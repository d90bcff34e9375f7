"""Several GPUs of one host: how training scales with ddp and fsdp, to 2, 4, 8 as far as there are.

    python benchmarks/gpu_several.py            a table, a line of JSON; run by gpu.sh
    python benchmarks/gpu_several.py --tiny     two processes on a CPU, to try the script itself
    python benchmarks/gpu_several.py --check    exit code 1 where it scales worse than wanted

Ahead of ddp its processes train alone, beside each other; that is what ddp and fsdp are compared
with. model=xl, of a billion parameters, is trained with a quarter of the batch, and not alone.
tests/training/test_gpus.py tests that devices train what one would, and that a run resumes.
"""

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning as L
import torch

from benchmarks import gpu
from benchmarks.gpu_network import XL, await_file, await_turn, network, release, synchronise
from benchmarks.gpu_table import missed, speeds
from benchmarks.gpu_train import is_full
from benchmarks.support.conclusion import conclude
from diffusion import Diffusion, NoiseSettings
from noise_schedule import get_schedule
from objectives.block_diffusion import MaskedDiffusion
from training.distributed import Poll, Replicated, Sharded
from training.flops import NetworkShape, flops, matmul_peak
from training.lr_schedules import lr_factor
from training.optimizers import OptimizerSettings
from training.trainer import leave_signals
from utils import write_json

ROOT = Path(__file__).resolve().parent.parent
S = 16  # tokens of a block
WARM_UP = 12  # steps; in the first ten torch's ddp measures itself, and waits for the device


def main(argv=None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        sys.stdout.flush()
        # torch's cache of meshes holds the group, and threads of gloo that outlive it may abort
        os._exit(0)
    most = 2 if args.tiny else torch.accelerator.device_count()
    found = {}
    figures = {"several": found}
    counts = [n for n in (2, 4, 8) if n <= most]
    with started(list(itertools.product((False, True), counts, ("ddp", "fsdp"))), args) as runs:
        await_turn(args.turn, torch.device("cpu"))  # the devices are theirs
        for name, run in runs.items():
            found[name] = entry = scaled(run)
            if name.startswith("fsdp"):
                compare(entry, found[name.replace("fsdp", "ddp")])
            print(f"{name}: {speeds(entry)}", flush=True)
            if args.out is not None:
                write_json(args.out, figures)
    return conclude(figures, [] if args.tiny else missed(figures), check=args.check, out=args.out)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small network, on the CPU")
    parser.add_argument("--check", action="store_true", help="exit code 1 for a missed target")
    parser.add_argument("--steps", type=int, default=20, help="timed, after the warm-up (20)")
    parser.add_argument("--batch", type=int, default=32, help="sequences per device and step (32)")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument(
        "--turn",
        type=Path,
        metavar="FOLDER",
        help="compile, make FOLDER/ready, measure once FOLDER/go is there",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--strategy", default="ddp", help=argparse.SUPPRESS)
    parser.add_argument("--xl", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.steps, args.batch) < 1:
        parser.error(f"--steps={args.steps} --batch={args.batch}: at least 1 each")
    if args.tiny and args.check:
        parser.error("--tiny is too small for the target: leave out one of the two")
    if args.tiny:
        args.steps, args.batch = 3, 2
    elif (count := torch.accelerator.device_count()) < 2:
        parser.error(f"it takes two accelerators, here are {count}; --tiny tries it on the CPU")
    return args


@dataclass(frozen=True)
class Run:
    """Processes that train; they compile, make turn/ready and measure once turn/go is there."""

    process: subprocess.Popen
    log: Path
    turn: Path


@contextmanager
def started(kinds: list[tuple[bool, int, str]], args):
    """{name: Run} of (xl or not, devices, strategy) each, all of which have compiled: beside each
    other, as that takes longer than to measure. They end with this."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            for xl, n, strategy in kinds:
                name = f"{'xl ' * xl}{strategy} on {n}"
                turn = Path(folder) / name.replace(" ", "_")
                turn.mkdir()
                words = [f"--strategy={strategy}", *["--xl"] * xl, f"--turn={turn}"]
                runs[name] = start(n, words, turn, args)
            for run in runs.values():
                while not (run.turn / "ready").exists() and run.process.poll() is None:
                    time.sleep(0.1)
            yield runs
        finally:
            for run in runs.values():
                run.process.terminate()
            for run in runs.values():
                run.process.wait()


def start(devices: int, which: list[str], turn: Path, args) -> Run:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={devices}", "benchmarks/gpu_several.py", "--worker", *which]
    command += [f"--steps={args.steps}", f"--batch={args.batch}", *["--tiny"] * args.tiny]
    log = turn / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    return Run(process, log, turn)


def scaled(run: Run) -> dict:
    """Speeds in tokens/s, the batch of each device kept, of all together and, with ddp, of each
    alone; MFU and GiB of a device together. left_out: too little memory. RuntimeError with what the
    processes print where one fails."""
    (run.turn / "go").touch()
    compiled = (run.turn / "ready").exists()
    failed, said = run.process.wait(), run.log.read_text()
    if failed and not (compiled and is_full(said)):
        raise RuntimeError(f"{run.process.args}\n{said[-6000:]}")
    if failed:
        return {"left_out": "out of memory"}
    alone, (together,), (mfu,), (gib,) = (
        [float(speed) for speed in re.findall(rf"{name}: (\S+)\n", said)]
        for name in ("alone tokens/s", "together tokens/s", "mfu", "gib")
    )
    found = {"tokens_per_second": together, "mfu": mfu, "memory_gib": gib}
    if alone:
        compare(found, {"alone": alone})
    return found


def compare(entry: dict, other: dict) -> None:
    """What share of the sum of the devices' speeds alone, measured in `other`, they have together;
    where both were measured."""
    if "alone" in other and "tokens_per_second" in entry:
        entry["alone"] = other["alone"]
        entry["efficiency"] = entry["tokens_per_second"] / sum(other["alone"])


class Clock(L.Callback):
    """`seconds` of the steps after the warm-up."""

    def __init__(self, device: torch.device):
        self.device, self.begun, self.seconds, self.stopping = device, None, None, Poll()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == WARM_UP:
            synchronise(self.device)
            self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.stopping(self.device, False, False)  # as every run asks (saving.py)

    def on_train_end(self, trainer, pl_module) -> None:
        if self.begun is not None:
            synchronise(self.device)
            self.seconds = time.perf_counter() - self.begun


def worker(args) -> None:
    """One process: trains alone, where that is measured, then with the others."""
    devices, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    here = gpu.parse(["train", *(["--tiny"] if args.tiny else [])])
    here.device, device = torch.device("cpu"), here.device  # Lightning moves the network
    if args.xl:
        here.sizes, args.batch = here.sizes if args.tiny else XL, max(args.batch // 4, 1)
    backend = "sdpa" if args.tiny else "flex"
    made = partial(network, here, backend=backend, compiled=not args.tiny, dropout=0.1)
    alone = args.strategy == "ddp" and not args.xl
    fit(made(n_blocks=2), here, args, device, 1 if alone else devices, steps=2)  # compiles
    release(device)
    compiled = [args.turn / f"compiled_{each}" for each in range(devices)]
    compiled[rank].touch()
    for each in compiled:
        await_file(each)
    await_turn(args.turn, device)
    net, steps = made(), WARM_UP + args.steps
    tokens = args.batch * here.length * args.steps  # of a device, timed
    if alone:
        say("alone tokens/s", tokens / fit(net, here, args, device, steps=steps).seconds)
    peak = matmul_peak(device, torch.float32 if args.tiny else torch.bfloat16)
    release(device)
    together = fit(net, here, args, device, devices, steps=steps)
    if rank == 0:
        step = flops(shape_of(here)).step / here.length  # FLOPs of a token
        say("together tokens/s", devices * tokens / together.seconds)
        say("mfu", step * tokens / together.seconds / peak)
        full = 0 if args.tiny else torch.accelerator.max_memory_allocated() / 2**30
        say("gib", full)


def shape_of(here) -> NetworkShape:
    sizes = {name: here.sizes[name] for name in ("hidden_size", "n_blocks")}
    return NetworkShape("bamdlm", vocab_size=here.vocab, length=here.length, block_size=S, **sizes)


def say(name: str, figure: float) -> None:
    """In one piece: all processes write to the same place."""
    print(f"{name}: {figure}\n", end="", flush=True)


def fit(net, here, args, device: torch.device, devices: int = 1, *, steps: int) -> Clock:
    """Trains so many steps on so many devices."""
    module = Diffusion(
        backbone=net,
        objective=MaskedDiffusion(here.vocab - 1, S, get_schedule("loglinear")),
        noise=NoiseSettings(1, (1e-3, 1.0), 1e-3, True, args.batch * devices, args.batch),
        optimizer=OptimizerSettings({"lr": 3e-4, "weight_decay": 0.0}),
        lr_factor=lr_factor("constant", lr=3e-4, max_steps=0, warmup_steps=0),
        ema_decay=0.9999,
    )
    clock, strategy = Clock(device), "auto"
    if devices > 1:
        strategy = Sharded(devices) if args.strategy == "fsdp" else Replicated()
    mine = devices if args.tiny or devices > 1 else [int(os.environ["LOCAL_RANK"])]
    trainer = L.Trainer(
        accelerator="cpu" if args.tiny else "gpu",
        devices=mine,
        strategy=strategy,
        precision="32-true" if args.tiny else "bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[clock],
        use_distributed_sampler=False,
    )
    leave_signals(trainer)
    made = batches(here, args, devices, int(os.environ["RANK"]) % devices, steps)
    trainer.fit(module, torch.utils.data.DataLoader(made, batch_size=None))
    return clock


def batches(here, args, devices: int, rank: int, steps: int) -> list[dict]:
    """Those of one process: its share of each global batch."""
    generator = torch.Generator().manual_seed(rank)
    made = []
    for step in range(steps):
        ids = torch.randint(here.vocab - 1, (args.batch, here.length), generator=generator)
        row = torch.arange(args.batch) + (step * devices + rank) * args.batch
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": row})
    return made


if __name__ == "__main__":
    sys.exit(main())
