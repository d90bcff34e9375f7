"""What runs left behind: settings.json, metrics.csv, the reports of evaluations and of sampling.

Read without torch. Any of the files may be missing, of an older format or broken; `trouble` has one
line for each that cannot be read.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sampling.csv_records import cells, records
from settings.run_folder import SETTINGS
from training.log_reading import read_log
from utils import CIRCUMSTANCES, check_file, read_json, reason

LOG = "metrics.csv"
MOST_STEPS = 1 << 53  # a number of more is none that was measured
TELLING = ("ppl", "gen_nfes")  # one of them is in every report
Summary = dict[str, object]  # of an evaluation or a sampling run


def number(value: object) -> float | None:
    """A finite number as it is, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < MOST_STEPS else None  # nor nan


def summaries(path: Path) -> list[Summary]:
    """Of a JSON file: one for each likelihood of an evaluation or each run of a sampling, none
    where it is another file. Those of a sampling have the oldest first."""
    content = read_json(path)
    if not isinstance(content, dict) or not any(key in content for key in TELLING):
        return []
    runs = content.get("runs")
    if isinstance(runs, dict):  # of sampling; the last one stands on top as well
        return [each for each in runs.values() if isinstance(each, dict)]
    several = content.get("likelihoods")
    several = several if isinstance(several, list) else [{}]
    return [content | each for each in several if isinstance(each, dict)]


def reports(paths: Iterable[Path]) -> tuple[list[tuple[Path, Summary]], list[str]]:
    """Every summary in these files, and a line about each that cannot be read."""
    found, trouble = [], []
    for path in paths:
        if not path.is_file():  # a FIFO would never end
            continue
        try:
            found += [(path, summary) for summary in summaries(path)]
        except (ValueError, *CIRCUMSTANCES) as error:
            trouble.append(f"left out: {path} ({reason(error)})")
    return found, trouble


@dataclass
class Results:
    """Of one run folder."""

    folder: Path
    settings: dict[str, object] = field(default_factory=dict)  # by dotted keys
    log: dict[str, dict[int, float]] = field(default_factory=dict)  # {figure: {step: value}}
    # of its checkpoints, the newest last
    evaluations: list[tuple[Path, Summary]] = field(default_factory=list)
    samples: list[tuple[Path, Summary]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        """Optimizer steps made, as far as the log and the checkpoints tell."""
        logged = [step for series in self.log.values() for step in series]
        names = [path.stem[5:] for path in self.folder.glob("checkpoints/step=*.ckpt")]
        saved = [int(name) for name in names if re.fullmatch("[0-9]{1,15}", name)]
        return max(logged + saved, default=None)

    @property
    def tokens_per_step(self) -> int | None:
        """Positions of a global batch, padding included."""
        sizes = [self.settings.get(key) for key in ("loader.global_batch_size", "model.length")]
        return math.prod(sizes) if all(type(size) is int for size in sizes) else None

    @property
    def tokens(self) -> int | None:
        """Seen in training."""
        known = self.steps is not None and self.tokens_per_step is not None
        return self.steps * self.tokens_per_step if known else None

    def last(self, name: str) -> float | None:
        """A figure of the log as it was measured last."""
        series = self.log.get(name, {})
        return series[max(series)] if series else None


def read_run(folder: Path, elsewhere: Iterable[Path] = ()) -> Results:
    """What lies in a run folder. elsewhere: JSON files that may be reports about its checkpoints;
    one in the folder may be about those of another run with the same settings. ValueError where the
    folder is none of a run."""
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {problem}: give the folder of a run, outputs/…/…")
    inside = [path for path in folder.glob("*.json") if path.name != SETTINGS]
    known = (folder / SETTINGS, folder / LOG)
    if not any(path.exists() for path in (*known, *folder.glob("ppl_*.json"))):
        raise ValueError(
            f"{folder} holds no {SETTINGS}, {LOG} or ppl_*.json: give the folder of a run,"
            " outputs/…/…"
        )
    run = Results(folder)
    found = _read(folder / SETTINGS, read_json, run.trouble)
    run.settings = found if isinstance(found, dict) else {}
    for name, series in (_read(folder / LOG, read_log, run.trouble) or {}).items():
        run.log[name] = {step: value for step, value in series.items() if step < MOST_STEPS}
    own = {path.resolve() for path in inside}
    files = {path.resolve(): path for path in (*elsewhere, *inside)}
    found, trouble = reports(sorted(files.values(), key=_age))
    for path, each in found:
        if _is_about(each, folder, inside=path.resolve() in own, trained=bool(run.settings)):
            (run.evaluations if "ppl" in each else run.samples).append((path, each))
    run.trouble += trouble
    return run


def _read(path: Path, read: Callable, trouble: list[str]):
    """What `read` finds in a file that may be missing; None, and a line, where that is nothing."""
    if not path.exists():
        return None
    try:
        if content := read(path):
            return content
        trouble.append(f"left out: {path} (nothing in it can be read)")
    except (ValueError, *CIRCUMSTANCES) as error:
        trouble.append(f"left out: {path} ({reason(error)})")
    return None


def first_texts(path: Path, run: object, count: int) -> list[str]:
    """The first texts of a run of sampling, from the CSV beside its report. OSError or ValueError
    where there is none."""
    name = path.with_suffix("")
    name = name if name.is_file() else path.with_suffix(".csv")
    check_file(name, math.inf)
    with name.open("rb") as file:
        found = map(cells, records(file))
        header = next(found, [])
        rows = (dict(zip(header, line, strict=False)) for line in found)
        own = (row["samples"] for row in rows if row.get("run") == run and row.get("samples"))
        return list(itertools.islice(own, count))


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime if path.exists() else 0.0, str(path)


def _is_about(summary: Summary, folder: Path, *, inside: bool, trained: bool) -> bool:
    """Whether a report is about a checkpoint of this run. Of one inside the folder that cannot be
    told where its checkpoint is gone, or of the hub; a folder without training has no other."""
    try:
        place = Path(str(summary.get("checkpoint")))
        if place.resolve().is_relative_to(folder.resolve()):
            return True
        return inside and not (trained and place.exists())
    except (OSError, ValueError, RuntimeError):  # no name of a file, a circle of links
        return inside
