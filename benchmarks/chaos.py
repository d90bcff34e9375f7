"""Kill a training at random moments, resume it each time, and compare the end with an undisturbed
run; then with the other faults of FAULTS.

    python benchmarks/chaos.py [--kills 20] [--steps 240] [--seed 0] [--folder DIR] [-- OVERRIDES]

Each training is a process of its own, ended by SIGKILL: during start-up, steps, validation (which
follows every fourth step) or a save (every second step); every third kill waits for a save to
begin. Prints a line per kill and per fault; the exit code is 0 if the last checkpoints agree in
every bit, and if every process ended with the code of docs/reliability.md.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from diffusion import Diffusion  # noqa: E402  needs the path, as the others do
from tests.runs import (  # noqa: E402
    ALGORITHMS,
    TIMEOUT,
    Run,
    at_call,
    differences,
    finish,
    ranks,
    read,
    run,
    tell,
    tiny,
)

EVERY = 2  # steps from one checkpoint to the next
SAVE_SECONDS = 0.008  # about, from the first byte of a save to the last


def overrides(folder: Path, steps: int) -> list[str]:
    """A training of small steps: two micro-batches, dropout, validation with the clip search."""
    return [
        *tiny(folder),
        *ALGORITHMS["bamdlm"],
        f"trainer.max_steps={steps}",
        "trainer.limit_val_batches=4",
        f"callbacks.checkpoint_every_n_steps.every_n_train_steps={EVERY}",
        f"checkpointing.save_dir={folder / 'run'}",
    ]


def saves(last: Path) -> int | None:
    """Changes with every save."""
    try:
        return last.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def unfinished(folder: Path) -> set[Path]:
    """Files of saves that have begun and not ended."""
    return set(folder.glob(".*.partial"))


def kill_at_random(
    process: Run, last: Path, draw: random.Random, most: int, in_save: bool
) -> int | None:
    """SIGKILL at a random place between two of the next `most` saves, or in a save. The exit code
    if it ended before that."""
    wanted, seen, before = draw.randint(0, most), 0, saves(last)
    stale = unfinished(last.parent)  # of the kill before
    began = since = time.monotonic()
    interval = 0.5
    while seen < wanted:
        if (code := process.poll()) is not None:
            return code
        if (now := saves(last)) != before:
            if seen:  # the first comes after starting up
                interval = time.monotonic() - since
            since = time.monotonic()
            before, seen = now, seen + 1
        time.sleep(0.0005)
    if in_save:
        while not unfinished(last.parent) - stale:
            if (code := process.poll()) is not None:
                return code
            time.sleep(0.0005)
        interval = SAVE_SECONDS
    elif wanted == 0:
        interval = 4 * interval  # starting up
    time.sleep(draw.uniform(0, interval))
    if (code := process.poll()) is not None:
        return code
    process.send(signal.SIGKILL)
    process.wait()
    print(f"     killed {time.monotonic() - began:5.2f} s after its start, {seen} saves", end="")
    return None


# ---- other faults, when two thirds of the passes are done ---------------------------------------


def full_disk(arguments: list[str], log: Path, call: int) -> str:
    """Files of more than 20 kB cannot be written any more."""

    def act():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code, text = run(arguments, log, before=at_call(Diffusion, "training_step", call, act))
    return "" if code == 1 and "not saved: step" in text else f"ended with {code}"


def dead_worker(arguments: list[str], log: Path, call: int) -> str:
    def act():
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)

    words = [*arguments, "loader.num_workers=2"]
    code, text = run(words, log, before=at_call(Diffusion, "training_step", call, act))
    return "" if code == 1 and "the same command goes on from here" in text else f"code {code}"


def two_runs(arguments: list[str], log: Path, call: int) -> str:
    """The second one begins within the first, which is killed later."""
    first = Run(
        arguments, log, before=at_call(Diffusion, "training_step", call, tell(signal.SIGKILL))
    )
    folder = next(word for word in arguments if word.startswith("checkpointing.save_dir="))
    first.wait_for(Path(folder.partition("=")[2]) / "running.json")
    code, _ = run([*arguments, "optim.lr=1e-3"], log.with_name("second.log"))
    killed = first.wait()
    return "" if (code, killed) == (2, -signal.SIGKILL) else f"ended with {code} and {killed}"


def rank_death(arguments: list[str], log: Path, call: int) -> str:
    """Of two processes one is killed; the other one ends by itself. What they have saved is
    whole."""

    def before(rank):
        if rank == 1:
            at_call(Diffusion, "training_step", call // 2, tell(signal.SIGKILL))()

    words = [*arguments, "trainer.devices=2", "strategy=ddp", "loader.batch_size=2"]
    codes = finish(ranks(2, words, log.with_name("ranks.log"), before=before), TIMEOUT)
    return "" if codes[0] == 1 and codes[1] == -signal.SIGKILL else f"ended with {codes}"


# name -> (what is wrong with the end, whether the rest of the run ends with the same bits)
FAULTS: dict[str, tuple[Callable, bool]] = {
    "full disk": (full_disk, True),
    "dead worker": (dead_worker, True),
    "two runs at once": (two_runs, True),
    "rank death": (rank_death, False),  # two processes sum in another order
}


def other_faults(arguments: list[str], folder: Path, steps: int) -> int:
    """How many of them did not end well."""
    last, whole = (folder / name / "checkpoints/last.ckpt" for name in ("run", "whole"))
    bad = 0
    for name, (fault, same) in FAULTS.items():
        shutil.rmtree(folder / "run")
        began = time.monotonic()
        wrong = fault(arguments, folder / f"{name}.log", 4 * steps // 3)
        seconds, step = time.monotonic() - began, read(last)["global_step"]
        code, _ = run(arguments, folder / f"{name}.log", timeout=3600)
        found = differences(read(last), read(whole)) if same else []
        ended = read(last)["global_step"] == steps and code == 0
        bad += bool(wrong or found or not ended)
        print(
            f"{name}: {wrong or 'ended as it should'} after {seconds:.1f} s, at step {step}; the"
            f" rest ended with {code}, {len(found) if same else 'not compared for'} differences",
            flush=True,
        )
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("rest", nargs="*", help="overrides of main.py, after --")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*overrides(folder, asked.steps), *asked.rest]
    last = folder / "run/checkpoints/last.ckpt"

    began = time.monotonic()
    code, text = run(arguments, folder / "whole.log", timeout=3600)
    if code:
        print(text)
        return 1
    print(f"undisturbed: {asked.steps} steps, {time.monotonic() - began:.1f} s", flush=True)
    shutil.rmtree(folder / "whole", ignore_errors=True)
    (folder / "run").rename(folder / "whole")

    draw, in_saves, step = random.Random(asked.seed), 0, 0
    for killed in range(1, asked.kills + 1):
        left = (asked.steps - step) // EVERY  # saves, to be shared out among the kills to come
        most = left // (asked.kills - killed + 1)
        stale = unfinished(last.parent)
        process = Run(arguments, folder / "killed.log")
        if kill_at_random(process, last, draw, most, in_save=killed % 3 == 0) is not None:
            print("the training ended before it could be killed: give more --steps")
            return 1
        partial = bool(unfinished(last.parent) - stale)
        in_saves += partial
        step = read(last)["global_step"] if last.exists() else 0
        note = ", in the middle of a save" if partial else ""
        print(f"{note}; last checkpoint: step {step}", flush=True)
    code, text = run(arguments, folder / "killed.log", timeout=3600)
    print(f"the last run ended with {code}")
    found = differences(read(last), read(folder / "whole/checkpoints/last.ckpt"))
    print(*found[:10], sep="\n")
    print(f"{asked.kills} kills, {in_saves} of them in a save: {len(found)} differences")
    bad = other_faults(arguments, folder, asked.steps)
    print(f"{time.monotonic() - began:.0f} s in all")
    good = not (found or code or bad)
    if asked.folder is None and good:
        shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
