"""Kill a training at random moments, resume it each time, and compare the end with an undisturbed
run.

    python benchmarks/chaos.py --kills 20 --steps 400 [--seed 0] [--folder DIR] [-- OVERRIDES]

Each kill is a SIGKILL; the moments are uniform over the time that a process lives, so they hit
start-up, steps, validation and saving alike (a checkpoint is due every second step). Prints a line
per kill and a table; the exit code is 0 if the last checkpoints are equal in every bit.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "night",
    "day",
    "king",
    "queen",
    "love",
    "war",
    "time",
    "and",
    "the",
    "of",
]


def differences(ours, theirs, path: str = "") -> list[str]:
    """Where two checkpoints, as plain containers, are not the same bit for bit."""
    if type(ours) is not type(theirs):
        return [f"{path}: {type(ours).__name__}, {type(theirs).__name__}"]
    if isinstance(ours, dict):
        if list(ours) != list(theirs):
            return [f"{path}: keys {list(ours)}, {list(theirs)}"]
        pairs = [(key, ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return [f"{path}: {len(ours)} entries, {len(theirs)}"]
        pairs = [(i, ours[i], theirs[i]) for i in range(len(ours))]
    elif isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if same and ours.numel():
            bits = (x.contiguous().flatten().view(torch.uint8) for x in (ours, theirs))
            same = torch.equal(*bits)
        return [] if same else [f"{path}: tensors"]
    else:
        return [] if ours == theirs else [f"{path}: {ours}, {theirs}"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{path}/{key}")]


def read(path: Path) -> dict:
    import torch_zip

    with open(path, "rb") as file:
        return torch_zip.load(file, str(path))


def overrides(folder: Path, steps: int) -> list[str]:
    """A training of small steps: two micro-batches, dropout, validation with the clip search."""
    draw = random.Random(1)
    for name, count in (("train", 4000), ("valid", 400)):
        text = " ".join(draw.choice(WORDS) for _ in range(count))
        (folder / f"{name}.txt").write_text(text)
    return [
        "algo=bamdlm",
        "algo.clip_search_widths=[0.5]",
        "block_size=4",
        "data=files",
        f"data.train={folder / 'train.txt'}",
        f"data.valid={folder / 'valid.txt'}",
        "data.tokenizer_name_or_path=text8",
        f"data.cache_dir={folder / 'cache'}",
        "model=tiny",
        "model.length=32",
        "model.hidden_size=32",
        "model.cond_dim=8",
        "model.n_blocks=2",
        "model.n_heads=2",
        "model.dropout=0.1",
        "loader.global_batch_size=8",
        "loader.batch_size=4",
        "loader.num_workers=0",
        "lr_scheduler.num_warmup_steps=20",
        f"trainer.max_steps={steps}",
        "trainer.val_check_interval=20",
        "trainer.limit_val_batches=4",
        "trainer.log_every_n_steps=50",
        "trainer.accelerator=cpu",
        "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
        "wandb=null",
        f"checkpointing.save_dir={folder / 'run'}",
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        command = [sys.executable, str(ROOT / "main.py"), *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def last_step(folder: Path) -> int:
    last = folder / "run/checkpoints/last.ckpt"
    return read(last)["global_step"] if last.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("rest", nargs="*", help="overrides of main.py, after --")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*overrides(folder, asked.steps), *asked.rest]

    began = time.monotonic()
    if start(arguments, folder / "whole.log").wait():
        print((folder / "whole.log").read_text())
        return 1
    alone = time.monotonic() - began
    print(f"undisturbed: {asked.steps} steps in {alone:.1f} s")
    (folder / "run").rename(folder / "whole")

    draw, unfinished = random.Random(asked.seed), 0
    for kill in range(1, asked.kills + 1):
        process = start(arguments, folder / "killed.log")
        wait = draw.uniform(0, alone)
        try:
            code = process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
        partial = len(list((folder / "run/checkpoints").glob(".*.partial")))
        unfinished += partial
        note = ", in the middle of saving" if partial else ""
        at = f"killed after {wait:4.1f} s" if code == -signal.SIGKILL else f"ended with {code}"
        print(f"{kill:3}  {at}{note}; last checkpoint: step {last_step(folder)}", flush=True)
    code = start(arguments, folder / "killed.log").wait()
    print(f"last run ended with {code} at step {last_step(folder)}")
    both = (read(folder / name / "checkpoints/last.ckpt") for name in ("run", "whole"))
    found = differences(*both)
    print(*found[:10], sep="\n")
    print(f"{asked.kills} kills, {unfinished} while saving: {len(found)} differences")
    if asked.folder is None and not found:
        shutil.rmtree(folder)
    return 1 if found or code else 0


if __name__ == "__main__":
    sys.exit(main())
