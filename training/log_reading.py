"""Reading a metrics.csv, of either format; nothing here imports lightning."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from utils import check_file, lines_of

OLD_HEADER = ["step", "name", "value", "unix_time"]  # of the logs that were one line a figure
NO_FIGURES = ("step", "unix_time")


def is_old(path: Path) -> bool:
    return _cells(next(lines_of(path), "")) == OLD_HEADER


def log_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a log as text, those of the old format put together; not one that was cut off,
    nor one that was written behind it on the same line."""
    if not is_old(path):
        yield from _whole_rows(path)
        return
    rows: dict[int, dict[str, str]] = {}
    for line in _whole_rows(path):
        # but for the throughput, steps were counted from 0
        step = int(line["step"]) + (not line["name"].startswith("throughput/"))
        row = rows.setdefault(step, {"step": str(step), "unix_time": line["unix_time"]})
        row[line["name"]] = line["value"]
    names = dict.fromkeys(name for row in rows.values() for name in row)
    for step in sorted(rows):
        yield {name: rows[step].get(name, "") for name in names}


def _whole_rows(path: Path) -> Iterator[dict[str, str]]:
    """Lines with a cell for each column, all of them numbers but for a name."""
    lines = (_cells(line) for line in lines_of(path) if line.endswith("\n") and "\0" not in line)
    columns = next(lines, [])
    for line in lines:
        row = dict(zip(columns, line, strict=False))
        cells = [value for name, value in row.items() if name not in ("name", "step") and value]
        step = re.fullmatch("[0-9]{1,15}", row.get("step", ""))
        if len(line) == len(columns) and step and all(map(_number, cells)):
            yield row


def _cells(line: str) -> list[str]:
    """None where csv cannot read it."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """{name: {optimizer steps made: value}} of a metrics.csv of either format. ValueError: it is
    another file."""
    path = Path(path)
    if path.exists():  # reading names what is not there
        check_file(path)
    series: dict[str, dict[int, float]] = {}
    for row in log_rows(path):
        for name, value in row.items():
            if value and name not in NO_FIGURES:
                series.setdefault(name, {})[int(row["step"])] = float(value)
    return series
