"""Compare runs: what differs in their settings, their curves, likelihoods, texts and speed.

    python scripts/compare.py RUN [RUN ...] [--out FOLDER] [--reports FILE_OR_FOLDER]

RUN is a run folder, outputs/…/…. The table is printed; with --out it is also written as compare.csv
and compare.md, with compare.png (perplexity over steps and over tokens) and compare.html, one page
with all of it and the first texts of each run. Evaluations and samples of a run's checkpoints are
found in the run folders; samples also in the folder above and in the current one. --reports names
other places.
"""

import argparse
import base64
import html
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modes.results import Results, Summary, first_texts, number, read_run
from modes.tables import Rows, cell, csv_text, filled, html_table, markdown, markdown_text, text
from scripts import summarize
from scripts.plot_run import finish, losses, perplexities, smoothed
from scripts.support.command import new_parser
from scripts.support.picture import picture
from settings.rules.effects import OF_DIT, OF_LLAMA, SIZES
from utils import harmless, reason, say, shown, write_text

TEXTS, LONGEST_TEXT = 2, 4000  # of each run that are shown, and their characters
# column: the key in a report of sampling; of each run the newest report counts
QUALITY = {
    "gen PPL": "gen_ppl",
    "entropy": "gen_entropy",
    "length": "gen_lengths",
    "NFE": "gen_nfes",
    "sampling tokens/s": "tokens_per_second",
}
PAGE = Path(__file__).parent / "support" / "compare_page.html"


@dataclass(frozen=True)
class Measured:
    """A figure with its standard error."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return " ± ".join(cell(float(x)) for x in (self.value, self.error) if x is not None)


def measured(value: object, error: object) -> Measured | None:
    return None if number(value) is None else Measured(number(value), number(error))


def names(runs: Sequence[Results]) -> list[str]:
    """The names of the folders, or their paths where two have the same name."""
    short = [run.folder.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def columns(runs: Sequence[Results]) -> dict[str, list]:
    """{header: one value for each run, None where it has none}."""
    told = [used(run.settings) for run in runs]
    found = dict.fromkeys(["run"])
    found |= {key: [each.get(key) for each in told] for key in differing(told)}
    found["run"] = names(runs)  # whatever a settings.json calls its settings
    found["steps"] = [run.steps for run in runs]
    found["tokens seen"] = [run.tokens for run in runs]
    found["val PPL in training"] = [validation(run) for run in runs]
    likelihoods = [evaluated(run) for run in runs]
    for key in dict.fromkeys(key for each in likelihoods for key in each):
        found[key] = [each.get(key) for each in likelihoods]
    newest = [run.samples[-1][1] if run.samples else {} for run in runs]
    found["texts by"] = [s.get("steps") for s in newest]
    found |= {name: [number(s.get(key)) for s in newest] for name, key in QUALITY.items()}
    found["training tokens/s and device"] = [speed(run) for run in runs]
    return found


def used(settings: dict) -> dict:
    """Without the sizes of model.* where the network has those of a checkpoint."""
    if settings.get("algo.backbone") != "llama" or not settings.get("training.from_pretrained"):
        return settings
    unused = {f"model.{name}" for name in (*SIZES, *OF_DIT, *OF_LLAMA)}
    return {key: value for key, value in settings.items() if key not in unused}


def differing(told: Sequence[dict]) -> list[str]:
    """The settings that are not the same in all runs that have a settings.json."""
    told = [settings for settings in told if settings]
    keys = sorted({key for settings in told for key in settings})
    return [k for k in keys if len({json.dumps(s.get(k), sort_keys=True) for s in told}) > 1]


def validation(run: Results) -> Measured | None:
    """The last one of training; the error of a perplexity is that of its nats times it."""
    ppl, error = run.last("val/ppl"), number(run.last("val/nll_error"))
    return measured(ppl, None if error is None or number(ppl) is None else ppl * error)


def evaluated(run: Results) -> dict[str, Measured]:
    """{which likelihood of which text: the newest figure}."""
    found = {}
    for _, each in run.evaluations:
        size = number(each.get("tokens"))
        over = "" if size is None else f" ({size:,} tokens)"
        raw = ", raw weights" if each.get("ema") is False else ""
        likelihood, data = each.get("likelihood") or "", Path(str(each.get("data"))).stem
        key = f"PPL {likelihood}".strip() + f"{at(run, each)}, {data}{over}{raw}"
        if (value := measured(each.get("ppl"), each.get("ppl_error"))) is not None:
            found[key] = value
    return found


def at(run: Results, evaluation: Summary) -> str:
    """The block size of an evaluation where it is not the one of its run."""
    size = number(evaluation.get("block_size"))
    same = not run.settings or size is None or size == run.settings.get("block_size")
    return "" if same else f" at S={size}"


def speed(run: Results) -> float | None:
    rates = [*map(number, run.log.get("throughput/tokens_per_second", {}).values())]
    return statistics.median(known) if (known := [x for x in rates if x is not None]) else None


def read_rows(found: dict[str, list]) -> Rows:
    """As it is read, without empty columns."""
    return filled([list(found), *zip(*found.values(), strict=True)])


def number_rows(found: dict[str, list]) -> Rows:
    """For programs: an error is a column of its own."""
    split = {}
    for name, values in found.items():
        split[name] = [each.value if isinstance(each, Measured) else each for each in values]
        if any(isinstance(each, Measured) for each in values):
            split[f"{name}: error"] = [each and each.error for each in values]
    return read_rows(split)


def draw(runs: Sequence[Results], target: Path) -> bool:
    """Training (smoothed) and validation, over steps and over tokens. False: there is nothing to
    draw."""
    curves = [(losses(run.log), run.log.get("val/ppl", {})) for run in runs]
    if not any(any(each) for each in curves):
        return False
    with picture(target, 12, 4.8, columns=2) as (left, right):
        for index, (run, name) in enumerate(zip(runs, names(runs), strict=True)):
            for axes, size in ((left, 1), (right, run.tokens_per_step)):
                if size is not None:
                    look = {"color": f"C{index % 10}", "label": harmless(name).replace("$", r"\$")}
                    curve(axes, *curves[index], size, look)
        finish(left, "optimizer steps")
        finish(right, "tokens seen")
        left.legend(fontsize=8)
    return True


def curve(axes, training: dict[int, float], valid: dict[int, float], size: int, look: dict) -> None:
    """size: what a step counts."""
    if training:
        smooth = smoothed(list(training), list(training.values()))
        quiet = look | {"label": None if valid else look["label"]}
        axes.plot([x * size for x in training], perplexities(smooth), alpha=0.4, lw=1, **quiet)
    if valid:
        steps = sorted(valid)
        axes.plot([x * size for x in steps], [valid[x] for x in steps], "o-", ms=3, **look)


def samples(runs: Sequence[Results]) -> list[tuple[str, list[str]]]:
    """(run, its first texts) of those that have any; one without a CSV is told of in `trouble`."""
    found = []
    for run, name in zip(runs, names(runs), strict=True):
        for path, summary in reversed(run.samples):
            try:
                texts = first_texts(path, summary.get("run"), TEXTS)
            except (OSError, ValueError) as error:
                run.trouble.append(f"no texts beside {path} ({reason(error)})")
                continue
            if texts:
                found.append((f"{name}, {path}", [shortened(each) for each in texts]))
                break
    return found


def shortened(words: str) -> str:
    rest = len(words) - LONGEST_TEXT
    return harmless(words if rest <= 0 else f"{words[:LONGEST_TEXT]}… and {rest:,} characters more")


def write(out: Path, runs: Sequence[Results], found: dict[str, list]) -> None:
    """The four files; no picture where there is nothing to draw."""
    reports = [each for run in runs for each in (*run.evaluations, *run.samples)]
    tables = [("Runs", read_rows(found))]
    tables += [("Evaluations and samples", summarize.table(reports))] if reports else []
    picture, texts = out / "compare.png", samples(runs)
    if not draw(runs, picture):
        picture.unlink(missing_ok=True)
    contents = {
        "csv": csv_text(number_rows(found)),
        "md": as_markdown(tables, picture, texts),
        "html": as_html(tables, picture, texts),
    }
    for suffix, content in contents.items():
        write_text(out / f"compare.{suffix}", content)


def as_markdown(tables: list, picture: Path, texts: list) -> str:
    parts = ["# Comparison of runs", *(f"## {title}\n\n{markdown(rows)}" for title, rows in tables)]
    if picture.exists():
        parts.append(f"## Curves\n\n![perplexity over steps and tokens]({picture.name})")
    for title, each in texts:  # indented, so that nothing in a text is markup
        parts.append(f"## Texts of {markdown_text(title)}")
        parts += ["\n".join(f"    {line}" for line in words.split("\n")) for words in each]
    return "\n\n".join(parts) + "\n"


def as_html(tables: list, picture: Path, texts: list) -> str:
    parts = ["<h1>Comparison of runs</h1>"]
    parts += [f"<h2>{title}</h2>\n<div>{html_table(rows)}</div>" for title, rows in tables]
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>Curves</h2>\n<img alt="perplexity" src="data:image/png;base64,{data}">')
    for title, each in texts:
        parts.append(f"<h2>Texts of {html.escape(shown(title))}</h2>")
        parts += [f"<pre>{html.escape(words)}</pre>" for words in each]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(body="\n".join(parts))


def above(folder: Path) -> Path:
    return folder.parent if folder.name not in ("", "..") else folder.resolve().parent


def beside(folders: Sequence[Path]) -> list[Path]:
    """The reports in these folders that lie beside a CSV of samples."""
    found = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    return [p for p in found if p.with_suffix(".csv").is_file() or p.with_suffix("").is_file()]


def read(asked: argparse.Namespace) -> tuple[list[Results], list[str]]:
    """The runs, and what is wrong with the command line."""
    runs, problems, folders = [], [], {path.resolve(): path for path in asked.runs}
    if asked.out is not None and asked.out.exists() and not asked.out.is_dir():
        problems.append(f"--out={asked.out} is a file: name a folder")
    reports = beside([Path(), *dict.fromkeys(map(above, folders.values()))])
    reports += [path for folder in folders.values() for path in folder.glob("ppl_*.json")]
    for path in asked.reports:
        reports += path.rglob("*.json") if path.is_dir() else [path]
        if not path.exists():
            problems.append(f"--reports={path} does not exist: name a report or a folder of them")
    for folder in folders.values():
        try:
            runs.append(read_run(folder, reports))
        except (ValueError, OSError) as error:
            problems.append(reason(error))
    return runs, problems


def main(argv: list[str]) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the files are written")
    parser.add_argument(
        "--reports", type=Path, action="append", default=[], metavar="FILE_OR_FOLDER"
    )
    asked = parser.parse_args(argv)
    runs, problems = read(asked)
    if problems:
        print(*map(shown, problems), sep="\n", file=sys.stderr)
        return 2
    found, code = columns(runs), 0
    say(text(read_rows(found)))
    try:
        if asked.out is not None:
            write(asked.out, runs, found)
            say(shown(f"written: {asked.out}/compare.csv, .md, .html and, of curves, .png"))
    except OSError as error:
        print(shown(reason(error)), file=sys.stderr)
        code = 1
    for line in dict.fromkeys(line for run in runs for line in run.trouble):
        print(shown(line), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
