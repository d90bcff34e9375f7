"""The run's own log: metrics.csv in its folder, one row a step.

The row of step n holds what is known after n optimizer steps. A cell is empty where its figure was
not measured at that step. A resumed run goes on with the same file. It drops the rows of later
steps, because it makes those steps again.
"""

import csv
import itertools
import math
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from training.log_reading import NO_FIGURES, is_old, log_rows
from utils import atomic_file, check_place, naming, reason, write_whole


def record(trainer: L.Trainer, figures: dict[str, float]) -> None:
    """Figures into the row of the last optimizer step, in all logs of the run."""
    figures = {name: float(value) for name, value in figures.items()}
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)


class CSVLog(Logger):
    """unix_time: when a row was begun. A log in the old format is kept as metrics.old.csv, and its
    figures go into the new one."""

    name = "metrics"  # Lightning asks for it, and for the version
    version = ""

    def __init__(self, path: Path):
        """ValueError where something else than a file has its place."""
        super().__init__()
        self.path = Path(path)
        check_place(self.path)
        self._columns: list[str] = []
        self._row: dict[str, str] = {}  # the last one
        self._begin = 0  # of the last row in the file, in bytes
        self._waiting: list[tuple[int, dict[str, str]]] = []  # figures to be written, by step
        self.failure: str | None = None  # why some are left

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Nothing: the settings are in the run folder's settings.json and in every checkpoint."""

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        """Where they cannot be written now, they are with the next ones."""
        figures = {name: repr(float(value)) for name, value in metrics.items() if name != "epoch"}
        self._waiting.append((step, figures))
        try:
            with naming(self.path):
                while self._waiting:
                    self._write(*self._waiting[0])
                    del self._waiting[0]
            self.failure = None
        except OSError as error:  # training is worth more than its log
            if self.failure is None:
                print(f"{reason(error)}; training goes on", file=sys.stderr, flush=True)
            self.failure = f"rows of the log are missing: {reason(error)}"

    def _write(self, step: int, figures: dict[str, str]) -> None:
        if not self._columns or not self.path.exists():
            self._open()
        last = int(self._row.get("step", -1))
        if step < last or not figures.keys() <= set(self._columns):
            self._rewrite(log_rows(self.path), step, [*figures])
            last = int(self._row.get("step", -1))
        if step != last:
            self._begin = self.path.stat().st_size
            self._row = {"step": str(step), "unix_time": f"{time.time():.3f}"}
        self._row |= figures
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._begin)
            write_whole(file, self._line())

    def _open(self) -> None:
        """The file of the run so far, or a new one."""
        rows = []
        if self.path.exists():
            rows = log_rows(self.path)
            if is_old(self.path):
                shutil.copyfile(self.path, self.path.with_name("metrics.old.csv"))
        self._rewrite(rows, math.inf, [])

    def _rewrite(self, rows: Iterable[dict], step: float, more: list[str]) -> None:
        """With the rows up to this step, and columns for the figures `more`."""
        rows = (row for row in rows if int(row["step"]) <= step)
        last = first = next(rows, {})
        columns = [*dict.fromkeys([*NO_FIGURES, *self._columns, *first, *more])]
        with atomic_file(self.path, "w") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for last in itertools.chain([first] * bool(first), rows):
                writer.writerow(last)
        self._columns, self._row = columns, last
        self._begin = self.path.stat().st_size - len(self._line() if last else b"")

    def _line(self) -> bytes:
        return (",".join(self._row.get(name, "") for name in self._columns) + "\n").encode()
