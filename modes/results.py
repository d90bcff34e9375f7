"""What runs left behind: settings.json, metrics.csv, the reports of evaluations and of sampling.

Read without torch. Any of the files may be missing, of an older format or broken; `trouble` has one
line for each that cannot be read.
"""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from settings.run_folder import SETTINGS
from training.log_reading import read_log
from utils import CIRCUMSTANCES, read_json, reason

LOG = "metrics.csv"
TELLING = ("ppl", "gen_nfes")  # one of them is in every report
Summary = dict[str, object]  # of an evaluation or a sampling run


def number(value: object) -> float | None:
    """A finite number as it is, None for anything else."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fits else None


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


def reports(paths: Iterable[Path], trouble: list[str]) -> list[tuple[Path, Summary]]:
    """Every summary in these files."""
    found = []
    for path in paths:
        if not path.is_file():  # a FIFO would never end
            continue
        try:
            found += [(path, summary) for summary in summaries(path)]
        except (ValueError, *CIRCUMSTANCES) as error:
            trouble.append(f"left out: {path} ({reason(error)})")
    return found


@dataclass
class Results:
    """Of one run folder."""

    folder: Path
    settings: dict[str, object] = field(default_factory=dict)  # by dotted keys
    log: dict[str, dict[int, float]] = field(default_factory=dict)  # {figure: {step: value}}
    evaluations: list[tuple[Path, Summary]] = field(default_factory=list)  # the newest last
    samples: list[tuple[Path, Summary]] = field(default_factory=list)  # of its checkpoints
    trouble: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        """Optimizer steps made, as far as the log and the checkpoints tell."""
        logged = [step for series in self.log.values() for step in series]
        names = [path.stem[5:] for path in self.folder.glob("checkpoints/step=*.ckpt")]
        return max([*logged, *(int(name) for name in names if name.isdecimal())], default=None)

    @property
    def tokens_per_step(self) -> int | None:
        """Positions of a global batch, padding included."""
        sizes = [self.settings.get(key) for key in ("loader.global_batch_size", "model.length")]
        return math.prod(sizes) if all(type(size) is int for size in sizes) else None

    def last(self, name: str) -> tuple[int, float] | None:
        """The step and value of a figure's last entry."""
        return max(self.log.get(name, {}).items(), default=None)


def read_run(folder: Path, sampled: Iterable[Path] = ()) -> Results:
    """What lies in a run folder. sampled: JSON files beside those in the folder that may be reports
    of sampling with its checkpoints. ValueError where the folder is none of a run."""
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {problem}: give the folder of a run, outputs/…/…")
    run, inside = Results(folder), sorted(folder.glob("*.json"))
    settings, log = folder / SETTINGS, folder / LOG
    evaluated = [path for path in inside if path.name.startswith("ppl_")]
    if not (settings.exists() or log.exists() or evaluated):
        raise ValueError(
            f"{folder} holds no {SETTINGS}, {LOG} or ppl_*.json: give the folder of a run,"
            " outputs/…/…"
        )
    for path, read in ((settings, read_json), (log, read_log)):
        try:
            content = read(path) if path.is_file() else {}
        except (ValueError, csv.Error, *CIRCUMSTANCES) as error:
            run.trouble.append(f"left out: {path} ({reason(error)})")
            continue
        if path is settings:
            run.settings = content if isinstance(content, dict) else {}
        else:
            run.log = content
        if path.exists() and not content:
            run.trouble.append(f"left out: {path} has nothing that can be read")
    run.evaluations = reports(sorted(evaluated, key=_age), run.trouble)
    own = folder.resolve()
    others = [path for path in (*inside, *sampled) if path not in evaluated and path != settings]
    found = reports(sorted(dict.fromkeys(others), key=_age), run.trouble)
    run.samples = [(path, each) for path, each in found if _names_checkpoint(each, own)]
    return run


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _names_checkpoint(summary: Summary, folder: Path) -> bool:
    place = summary.get("checkpoint")
    return isinstance(place, str) and "\0" not in place and _inside(Path(place), folder)


def _inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # too long a name, a circle of links
        return False
