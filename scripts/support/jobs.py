"""Commands of main.py side by side, spread over the GPUs."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from scripts.support.study_runs import Run
from utils import say

ROOT = Path(__file__).resolve().parents[2]


def devices() -> list[str | None]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them; None: what there is, one at most."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if count <= 1:
        return [None]
    return named if len(named) == count else [str(i) for i in range(count)]


def side_by_side(
    todo: Sequence[Run],
    places: Sequence[str | None],
    work: Callable[[Run, str | None], bool],
    what: str = "",
) -> list[Run]:
    """One run at a time in each of the places, which are its GPU. Those of which `work` says that
    they failed."""
    free: SimpleQueue = SimpleQueue()
    for place in places:
        free.put(place)
    failed, done, began, told = [], 0, time.monotonic(), threading.Lock()

    def one(run: Run) -> None:
        nonlocal done
        place = free.get()
        try:
            good = work(run, place)
        finally:
            free.put(place)
        with told:
            done += 1
            failed.extend([] if good else [run])
            left = (time.monotonic() - began) / done * (len(todo) - done)
            said = "done" if good else "failed"
            say(f"{what}{run.name} {said}; {done} of {len(todo)}, about {left:,.0f} s left")

    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(one, todo))
    return failed


def called(words: Sequence[str], folder: Path, place: str | None) -> bool:
    """Whether main.py ended well; its output goes to a log beside the folder."""
    where = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
    command = [sys.executable, str(ROOT / "main.py"), *words]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.log").open("a") as log:
        ended = subprocess.run(command, stdout=log, stderr=log, check=False, env=os.environ | where)
    return ended.returncode == 0
