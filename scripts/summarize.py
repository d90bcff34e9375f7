"""Gather finished evaluations into one table: Markdown on the screen, or CSV.

    python scripts/summarize.py [FOLDER ...] [--csv FILE]

FOLDER (default: outputs; samples lie in sampling.logdir) is searched for what evaluations write:
ppl_*.json, and the .json beside a CSV of samples. A file that cannot be read is named on stderr
and skipped.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

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
    "rows": "rows",
    "tokens": "tokens",
    "EMA": "ema",
    "seed": "seed",
    "checkpoint": "checkpoint",
}
TELLING = ("ppl", "gen_nfes")  # one of them is in every summary


def find(folders: list[Path]) -> list[tuple[Path, dict]]:
    """Every summary in these folders, with its file, in the order of their paths."""
    found = []
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
        paths = [path for path in paths if path.is_file()]  # a FIFO would never end
        for path in paths:
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                print(f"skipped: {path} ({error})", file=sys.stderr)
                continue
            if isinstance(content, dict) and any(key in content for key in TELLING):
                runs = content.get("runs", {"": content}).values()  # of texts, whole reports
                likelihoods = content.get("likelihoods", [{}])
                found += [(path, run | each) for run in runs for each in likelihoods]
    return found


def table(summaries: list[tuple[Path, dict]]) -> list[list[str]]:
    """A header and a row for each summary; columns that no summary fills are left out."""
    rows = [
        [*(shown(content.get(key)) for key in COLUMNS.values()), str(path)]
        for path, content in summaries
    ]
    columns = zip([*COLUMNS, "file"], *sorted(rows), strict=True)
    filled = [column for column in columns if any(column[1:])]
    return [list(row) for row in zip(*filled, strict=True)]


def shown(value) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")])
    parser.add_argument("--csv", type=Path, help="also write the table there")
    asked = parser.parse_args(argv)
    absent = [str(folder) for folder in asked.folders if not folder.exists()]
    if absent:
        print(f"does not exist: {', '.join(absent)}", file=sys.stderr)
        return 2
    summaries = find(asked.folders)
    if not summaries:
        print(f"no finished evaluation in {', '.join(map(str, asked.folders))}", file=sys.stderr)
        return 1
    rows = table(summaries)
    print(markdown(rows))
    if asked.csv is not None:
        with asked.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
