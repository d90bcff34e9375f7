"""One run of several: its process here, the signals that end it, and what it has written."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import settings
from modes.results import LOG, number, reports
from samplers.params import SamplingParams
from sampling.sample_file import SampleFile
from settings import Config
from settings.keys import get
from settings.multirun import Job
from training.log_reading import read_log
from training.signals import HEARD
from utils import CIRCUMSTANCES, say, shown

MAIN = Path(__file__).parent.parent / "main.py"
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class Run:
    """A job and what became of it."""

    job: Job
    config: Config
    code: int | None = None  # exit code, negative for a signal; None: it did not end
    seconds: float | None = None
    job_id: str | None = None  # of Slurm
    figures: dict[str, object] = field(default_factory=dict)  # {column: what it wrote last}

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(MAIN), *self.job.words]

    @property
    def outcome(self) -> str:
        if self.code is None:
            return "-"
        return signal.Signals(-self.code).name if self.code < 0 else str(self.code)


class Told:
    """Signals that end the jobs: the first is kept, and all are passed on to the one that runs."""

    def __init__(self):
        self.by: signal.Signals | None = None
        self.child: subprocess.Popen | None = None

    def _hear(self, number: int, frame) -> None:
        # a terminal sends Ctrl-C to the child as well, where a second one would end it at once
        again = self.by is not None
        self.by = self.by or signal.Signals(number)
        if self.child is not None:
            self.child.send_signal(number if again else signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[None]:
        heard = [each for each in HEARD if signal.getsignal(each) is not signal.SIG_IGN]  # nohup
        before = {each: signal.signal(each, self._hear) for each in heard}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def run_here(runs: list[Run]) -> signal.Signals | None:
    """One after the other, with this process's output. The signal that ended it, or None."""
    told = Told()
    with told.listening():
        for index, run in enumerate(runs, 1):
            say(f"job {index} of {len(runs)}: {run.job.name}")
            started = time.monotonic()
            told.child = subprocess.Popen(run.command, preexec_fn=_end_with_parent)
            if told.by is not None:  # while it was started
                told.child.send_signal(signal.SIGTERM)
            run.code = told.child.wait()
            told.child, run.seconds = None, time.monotonic() - started
            run.figures = last_figures(run)
            if told.by is not None:
                say(f"{told.by.name}: stopped; the same command goes on with what is not finished")
                break
    return told.by


def _end_with_parent() -> None:
    """In the new process: it is told to stop where the one that started it is killed, or the same
    command would find its run folder in use."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


def last_figures(run: Run) -> dict[str, object]:
    """The last figures that a run has written, by the names of their columns."""
    config, folder = run.config, settings.local_folder(run.config.checkpointing.save_dir)
    if config.mode == "train":
        return _trained(folder)
    if run.code != 0:
        return {}
    if config.mode == "ppl_eval":
        wanted = {"checkpoint": config.eval.checkpoint_path, "data": config.data.valid}
        paths = sorted(folder.glob("ppl_*.json"), key=lambda path: path.stat().st_mtime)
        found = _matching(paths, wanted | {"ema": not config.eval.disable_ema})
        newest = [each for path, each in found if path == found[-1][0]]
        return {f"PPL {shown(each.get('likelihood'))}": _with_error(each) for each in newest}
    if config.mode == "sample_eval":
        path = SampleFile(config.sampling.logdir).summary
        wanted = {"checkpoint": config.eval.checkpoint_path, "seed": config.seed}
        found = [each for _, each in _matching([path], wanted) if _asked_for(each, config)]
        columns = {"gen PPL": "gen_ppl", "entropy": "gen_entropy", "NFE": "gen_nfes"}
        last = found[-1] if found else {}
        return {name: number(last.get(key)) for name, key in columns.items()}
    return {}


def _matching(paths: list[Path], wanted: dict) -> list[tuple[Path, dict]]:
    """The reports about what was asked for; a file that cannot be read has none."""
    found, _ = reports(paths)
    return [(p, each) for p, each in found if all(each.get(k) == v for k, v in wanted.items())]


def _asked_for(report: dict, config: Config) -> bool:
    """Whether a report is about these settings: jobs that share a file may run side by side."""
    if config.sampling.sweep is not None:  # then it is about one of its points
        return True
    names = [each.name for each in fields(SamplingParams) if each.metadata]
    asked = {name: get(config, f"sampling.{name}") for name in (*names, "nucleus_p")}
    asked["block_size"] = config.block_size
    if report.get("steps") != report.get("algo"):  # ar has no step rule
        asked["steps"] = config.sampling.steps
    return all(report.get(name) in (None, value) for name, value in asked.items())


def _with_error(report: dict) -> str | None:
    ppl, error = number(report.get("ppl")), number(report.get("ppl_error"))
    if ppl is None:
        return None
    return f"{ppl:,.2f}" if error is None else f"{ppl:,.2f} ± {error:,.2f}"


def _trained(folder: Path) -> dict[str, object]:
    try:
        valid = read_log(folder / LOG).get("val/ppl", {})
    except (ValueError, *CIRCUMSTANCES):
        return {}  # it was stopped before its first row
    return {"validated at step": max(valid), "val PPL": valid[max(valid)]} if valid else {}
