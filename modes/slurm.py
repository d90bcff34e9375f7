"""`-m hydra/launcher=submitit_slurm`: each job of a command as one job of Slurm, by submitit.

Ahead of its time limit Slurm sends USR1; training saves, and the job goes back into the queue. What
submitit keeps in its folder is pickled, by this command and for this user.
"""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modes.launching import Run, Told, last_figures
from settings.multirun import ON_ANY_CLUSTER, Multirun
from training.run_lock import process_start
from utils import Failure, rank, read_json, say, write_json

ROOT = Path(__file__).parent.parent
LOGS = Path("watch_folder")  # as of scripts/job.sh
PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
MOST_REQUEUES = 1000  # at the time limit
SIGNAL_SECONDS = 90  # hydra.launcher.signal_delay_s where it is not given, as of submitit
EARLY_SECONDS = 60  # that Slurm may send the signal before them (man sbatch)
POLL_SECONDS = 10.0
LOST_SECONDS = 20.0  # that a result of a job which has left the queue may take to be seen


def problems(multirun: Multirun) -> Iterator[str]:
    """Why nothing can be submitted from here."""
    launcher = f"hydra/launcher={multirun.launcher}"
    if importlib.util.find_spec("submitit") is None:
        yield f"{launcher}: submitit is not installed: pip install -r requirements-submitit.txt"
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        yield f"{launcher}: there is no Slurm here ({', '.join(absent)} not found)"
    if "timeout_min" not in multirun.slurm:
        yield (
            f"{launcher} needs hydra.launcher.timeout_min=MINUTES: after these a job saves and goes"
            " back into the queue"
        )
    elif limit := multirun.slurm["timeout_min"]:
        early = (multirun.slurm.get("signal_delay_s", SIGNAL_SECONDS) or 0) + EARLY_SECONDS
        if limit * 60 <= early:
            yield (
                f"hydra.launcher.timeout_min={limit} leaves no time for work: Slurm may tell a job"
                f" {early} seconds before its limit to save; give more, or a smaller"
                " hydra.launcher.signal_delay_s"
            )


@dataclass
class SlurmJob:
    """What runs in a job of Slurm, in each of its tasks; submitit pickles it. `result`: where the
    exit code and the seconds of its last start are written."""

    command: list[str]
    folder: str  # of the launch
    result: str

    def __call__(self) -> None:
        started, first = time.monotonic(), rank() == 0
        if first:
            Path(self.result).unlink(missing_ok=True)
        self.child = subprocess.Popen(self.command, cwd=self.folder)
        while self.child.poll() is None:  # in wait() a handler could not ask about the child
            time.sleep(0.2)
        code = self.child.returncode
        if first:
            write_json(Path(self.result), {"code": code, "seconds": time.monotonic() - started})
            sys.exit(code if code >= 0 else 128 - code)  # for Slurm; the result is for this command

    def checkpoint(self):
        """Called in a signal handler: training saves, then submitit requeues this again."""
        import submitit

        os.kill(self.child.pid, signal.SIGUSR1)
        while process_start(self.child.pid) is not None:
            time.sleep(0.1)
        again = SlurmJob(self.command, self.folder, self.result)
        return submitit.helpers.DelayedSubmission(again)


def run(runs: list[Run], multirun: Multirun) -> signal.Signals | None:
    """Submits the jobs and waits until they have left the queue, saying how each ended. The signal
    that ended the waiting, or None. Failure: sbatch refuses a job."""
    told = Told()
    with told.listening():
        places = _submit(runs, multirun)
        waiting, missed = list(range(len(runs))), {}
        while waiting and told.by is None:
            time.sleep(POLL_SECONDS)
            queued, now = _queued(), time.monotonic()
            for index in waiting:
                if queued is not None and runs[index].job_id not in queued:
                    missed.setdefault(index, now)
            for index, since in missed.items():
                late = now - since > LOST_SECONDS
                if index in waiting and (places[index][0].exists() or late):
                    waiting.remove(index)
                    _finish(runs[index], index + 1, *places[index])
    if waiting:
        ids = " ".join(runs[index].job_id for index in waiting)
        say(f"{told.by.name}: the jobs stay in the queue; `scancel {ids}` ends them")
    return told.by if waiting else None


def _submit(runs: list[Run], multirun: Multirun) -> list[tuple[Path, Path]]:
    """For each job where it will write its exit code, and its log."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # what training listens to; read in the import
    import submitit

    folder = (LOGS / f"multirun-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").absolute()
    executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=MOST_REQUEUES)
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    asked = {"name": "bamdlm", "slurm_setup": [path], "slurm_stderr_to_stdout": True}
    for name, value in multirun.slurm.items():
        asked[name if name in ON_ANY_CLUSTER else f"slurm_{name}"] = value
    places = []
    try:
        executor.update_parameters(**asked)
        for index, run in enumerate(runs, 1):
            result = folder / f"{index}.json"
            job = executor.submit(SlurmJob(run.command, str(Path.cwd()), str(result)))
            run.job_id = job.job_id
            places.append((result, job.paths.stdout))
            say(f"job {index} of {len(runs)} is job {job.job_id} of Slurm: {run.job.name}")
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
        ids = " ".join(run.job_id for run in runs if run.job_id)
        before = f"; submitted before it: {ids}" if ids else ""
        said = "; ".join(re.sub("^sbatch: (error: )?", "", x) for x in str(error).splitlines())
        raise Failure(f"sbatch: {said}{before}") from error
    return places


def _queued() -> set[str] | None:
    """Numbers of this user's jobs that wait or run; None: Slurm does not answer."""
    done = subprocess.run(["squeue", "--me", "-h", "-o", "%A"], capture_output=True, text=True)
    return None if done.returncode else set(done.stdout.split())


def _finish(run: Run, number: int, result: Path, log: Path) -> None:
    how = "has left the queue without an exit code"
    if result.exists():
        found = read_json(result)
        run.code, run.seconds = found["code"], found["seconds"]
        run.figures = last_figures(run)
        how = f"has ended with exit code {run.outcome}"
    say(f"job {number} ({run.job_id} of Slurm) {how}; its log: {log}")
