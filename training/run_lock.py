"""One run at a time writes to a run folder: a second one would replace its checkpoints.

The first process of the run keeps running.json in the folder, which says where it runs. What a
killed run has left is taken over: on the same machine where its process is gone, and in a Slurm job
that was requeued, or where torchrun has started the processes again. Nobody can know whether a
process of another machine still runs.
"""

import os
import socket
from pathlib import Path

from utils import lock, rank, read_json, write_json

NAME = "running.json"


class RunLock:
    """with RunLock(folder): … It is taken when it is made, and let go at the end of the block.

    ValueError where another run has the folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            "torchrun": os.environ.get("TORCHELASTIC_RUN_ID"),
        }
        if rank() == 0:  # the others of a job belong to it
            with lock(self.path):
                self._take()

    def _take(self) -> None:
        holder = _read(self.path)
        if holder is not None and not self._may_follow(holder):
            raise ValueError(
                f"{self.path.parent} is used by another run (process {holder['pid']} on"
                f" {holder['host']}): wait for its end, or give another checkpointing.save_dir;"
                f" if that process is gone, delete {self.path}"
            )
        write_json(self.path, self.me)

    def _may_follow(self, holder: dict) -> bool:
        if holder["host"] != self.me["host"]:
            if holder["job"] is None or holder["job"] != self.me["job"]:
                return False
            # torchrun ends all processes before it starts them again, the first perhaps elsewhere
            again = holder.get("torchrun") is not None
            again = again and holder["torchrun"] == self.me["torchrun"]
            return again or holder["restarts"] < self.me["restarts"]
        return holder["pid"] == os.getpid() or process_start(holder["pid"]) != holder["start"]

    def __enter__(self) -> None: ...

    def __exit__(self, *error) -> None:
        if rank() == 0 and _read(self.path) == self.me:
            with lock(self.path):
                self.path.unlink(missing_ok=True)


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in ticks: tells it from a later one with its number.
    None where there is none, or a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *numbers = status.rpartition(")")[2].split()
    return None if state in "ZX" else numbers[18]


def _read(path: Path) -> dict | None:
    """None also of what RunLock did not write."""
    try:
        holder = read_json(path)
    except (FileNotFoundError, ValueError):
        return None
    kinds = {"host": str, "pid": int, "start": str, "job": str | None, "restarts": int}
    kinds["torchrun"] = str | None  # files before had none
    right = isinstance(holder, dict) and all(isinstance(holder.get(k), t) for k, t in kinds.items())
    return holder if right else None
