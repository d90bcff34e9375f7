"""The run's own log: metrics.csv in its folder, one line per figure; a resumed run appends."""

import csv
import time
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

HEADER = ("step", "name", "value", "unix_time")


class CSVLog(Logger):
    """Long format: step, name, value, unix_time. A step logged again after a resume stands twice;
    the later line counts."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = Path(path)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Nothing: the settings are in the run folder's settings.json and in every checkpoint."""

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(HEADER)
            now = f"{time.time():.3f}"
            writer.writerows(
                (step, name, repr(float(value)), now)
                for name, value in metrics.items()
                if name != "epoch"
            )


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of a metrics.csv, later lines over earlier ones."""
    series: dict[str, dict[int, float]] = {}
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            series.setdefault(row["name"], {})[int(row["step"])] = float(row["value"])
    return series
