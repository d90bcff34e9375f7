"""Gather finished evaluations into one table: Markdown on the screen, or CSV.

    python scripts/summarize.py [FOLDER ...] [--csv FILE]

FOLDER (default: outputs; samples lie in sampling.logdir) is searched for what evaluations write:
ppl_*.json, and the .json beside a CSV of samples. A file that cannot be read is named on stderr
and skipped. compare.py shows what the runs themselves were.
"""

import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modes.results import Summary, reports
from modes.tables import csv_text, filled, markdown
from samplers.params import SamplingParams
from scripts.support.command import new_parser
from utils import reason, say, shown, write_text

# column: the key in a summary
COLUMNS = {
    "algo": "algo",
    "block size": "block_size",
    "data": "data",
    "likelihood": "likelihood",
    "PPL": "ppl",
    "±": "ppl_error",
    "gen. PPL": "gen_ppl",
    "entropy": "gen_entropy",
    "length": "gen_lengths",
    "NFEs": "gen_nfes",
    "steps": "steps",
    "rows": "rows",
    "tokens": "tokens",
    "EMA": "ema",
    "seed": "seed",
    "checkpoint": "checkpoint",
}
# The numbers of sampling; of these a column is shown where one is not the default.
NUMBERS = {each.name: each.default for each in fields(SamplingParams) if each.metadata}
NUMBERS |= {"nucleus_p": 1.0}


def find(folders: list[Path]) -> list[tuple[Path, Summary]]:
    """Every summary in these folders, with its file, in the order of their paths."""
    paths = [
        path
        for folder in folders
        for path in ([folder] if folder.is_file() else sorted(folder.rglob("*.json")))
    ]
    found, trouble = reports(paths)
    for line in trouble:
        print(shown(line), file=sys.stderr)
    return found


def table(summaries: list[tuple[Path, Summary]]) -> list[list[str]]:
    """A header and a row for each summary; columns that no summary fills are left out."""
    told = [content for _, content in summaries]
    numbers = [
        name
        for name, default in NUMBERS.items()
        if any(content.get(name) not in (None, default) for content in told)
    ]
    keys = [*COLUMNS.values(), *numbers]
    rows = [[*(figure(content.get(key)) for key in keys), str(path)] for path, content in summaries]
    return filled([[*COLUMNS, *numbers, "file"], *sorted(rows)])


def figure(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")])
    parser.add_argument("--csv", type=Path, help="also write the table there")
    asked = parser.parse_args(argv)
    absent = [str(folder) for folder in asked.folders if not folder.exists()]
    if absent:
        print(shown(f"does not exist: {', '.join(absent)}"), file=sys.stderr)
        return 2
    summaries = find(asked.folders)
    if not summaries:
        searched = ", ".join(map(str, asked.folders))
        print(shown(f"no finished evaluation in {searched}"), file=sys.stderr)
        return 1
    rows = table(summaries)
    say(markdown(rows))
    try:
        if asked.csv is not None:
            write_text(asked.csv, csv_text(rows))
    except OSError as error:
        print(shown(reason(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
