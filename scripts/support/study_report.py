"""What the study found, as tables and a picture. runs.csv alone is enough to make the others:

python scripts/support/study_report.py docs/results/study
"""

import csv
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modes.tables import csv_text, markdown, text
from scripts.support.picture import picture
from utils import say, write_text

RECIPE = "clipped"  # what the others are compared with
COLUMNS = (
    *("corpus", "S", "variant", "seeds", "nats", "error", "perplexity", "difference"),
    *("its error", "steps in equal time", "nats then", "difference then", "error then"),
    "tokens/s",
)


@dataclass(frozen=True)
class Line:
    """One evaluation. `timed`: of a run that takes the recipe's time; a variant without one is as
    fast as the recipe."""

    corpus: str
    size: str  # S; "" where there are no blocks
    variant: str
    seed: int
    steps: int
    timed: bool
    nats: float  # per token
    rate: float | None  # tokens per second of the variant alone on its device, where measured


def report(found: Sequence[Line], out: Path) -> None:
    header = [field.name for field in fields(Line)]
    write_text(out / "runs.csv", csv_text([header, *([*asdict(each).values()] for each in found)]))
    rows = table(found)
    read = [rows[0], *([digits(cell, i) for i, cell in enumerate(row)] for row in rows[1:])]
    print(text(read))
    write_text(out / "study.csv", csv_text(rows))
    write_text(out / "study.md", markdown(read) + "\n")
    draw(rows, out / "study.png")
    say(f"written to {out}: runs.csv, study.csv, study.md and study.png")


def read_runs(path: Path) -> list[Line]:
    """The lines of a runs.csv."""
    with path.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    kinds = {"seed": int, "steps": int, "nats": float, "timed": "True".__eq__}
    kinds["rate"] = lambda text: float(text) if text else None
    return [Line(**{name: kinds.get(name, str)(row[name]) for name in row}) for row in rows]


def table(found: Sequence[Line]) -> list[list[object]]:
    """A header and a line for each variant of a block size and a corpus."""
    groups: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for each in found:
        group = groups.setdefault((each.corpus, each.size), {})
        group.setdefault(each.variant, []).append(each)
    rows: list[list[object]] = [[*COLUMNS]]
    for (corpus, size), group in groups.items():
        for variant, made in group.items():
            recipe = None if variant == RECIPE else group.get(RECIPE)
            rows.append([corpus, size or "-", variant, *compared(made, recipe)])
    return rows


def compared(made: Sequence[Line], recipe: Sequence[Line] | None) -> list[object]:
    """The cells behind the name of a variant."""
    steps = {each.seed: each for each in made if not each.timed}
    timed = steps | {each.seed: each for each in made if each.timed}
    theirs = {each.seed: each.nats for each in recipe or () if not each.timed}

    def apart(ours: dict[int, Line]) -> tuple[float | None, float | None]:
        both = sorted(ours.keys() & theirs.keys())
        return mean_and_error([ours[seed].nats - theirs[seed] for seed in both])

    nats = [each.nats for each in steps.values()]
    first = next(iter(timed.values()))
    then = [first.steps, statistics.fmean(each.nats for each in timed.values())]
    return [
        len(nats),
        *mean_and_error(nats),
        math.exp(statistics.fmean(nats)),
        *apart(steps),
        *(then if first.size else [None, None]),
        *apart(timed),
        first.rate,
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The standard error over seeds, None for fewer than two."""
    if not values:
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def digits(cell: object, column: int) -> object:
    """Nats to three or four digits behind the point."""
    if not isinstance(cell, float) or COLUMNS[column] == "perplexity":
        return cell
    return f"{cell:,.0f}" if COLUMNS[column] == "tokens/s" else f"{cell:.4f}"


def draw(rows: list[list[object]], target: Path) -> None:
    """A panel for each block size and corpus: nats per token of each variant with its error; hollow
    where it is of equal time."""
    panels: dict[str, list[dict]] = {}
    for row in rows[1:]:
        named = dict(zip(COLUMNS, row, strict=True))
        title = named["corpus"] + ("" if named["S"] == "-" else f", S = {named['S']}")
        panels.setdefault(title, []).append(named)
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    tall = 1 + 0.3 * max(map(len, panels.values()))
    with picture(target, 4 * across, tall * down, rows=down, columns=across) as axes:
        flat = [*getattr(axes, "flat", [axes])]
        for axis in flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, lines) in zip(flat, panels.items(), strict=False):
            for place, named in enumerate(lines):
                axis.errorbar(named["nats"], place, xerr=named["error"] or 0, fmt="oC0", capsize=3)
                if named["nats then"] not in (None, named["nats"]):
                    axis.plot(named["nats then"], place, "oC0", fillstyle="none")
            axis.set_yticks(range(len(lines)), [named["variant"] for named in lines])
            axis.set_ylim(len(lines) - 0.5, -0.5)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("nats per token (hollow: equal time)", fontsize=8)
            axis.grid(True, axis="x", alpha=0.2)


def main() -> int:
    out = Path(sys.argv[1])
    report(read_runs(out / "runs.csv"), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
