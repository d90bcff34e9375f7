"""Tables as text, Markdown and CSV. What they quote is foreign text: it does nothing to a terminal
or a page."""

import csv
import html
import io
import re
from collections.abc import Sequence

from utils import escaped, shown

Rows = Sequence[Sequence[object]]  # a header and lines of as many cells


def cell(value: object) -> str:
    """As it is read: two digits behind the point, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else shown(value)


def text(rows: Rows) -> str:
    """Columns side by side."""
    lines = [list(map(cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(rows: Rows) -> str:
    """Columns side by side, between bars."""
    lines = [[markdown_text(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def markdown_text(value: object) -> str:
    """A cell in which nothing is a tag, a link or another cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(cell(value), quote=False))


def html_table(rows: Rows) -> str:
    def line(tag: str, row: Sequence[object]) -> str:
        return "".join(f"<{tag}>{html.escape(cell(c))}</{tag}>" for c in row)

    head, *body = rows
    lines = [f"<tr>{line('th', head)}</tr>", *(f"<tr>{line('td', row)}</tr>" for row in body)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def csv_text(rows: Rows) -> str:
    """Numbers in full."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        plain = ["" if c is None else c if type(c) in (int, float) else str(c) for c in row]
        writer.writerow([escaped(c) if isinstance(c, str) else c for c in plain])
    return file.getvalue()


def filled(rows: Rows) -> list[list[object]]:
    """Without the columns that nothing but the header fills."""
    columns = zip(*rows, strict=True)
    kept = [column for column in columns if any(each not in (None, "") for each in column[1:])]
    return [list(row) for row in zip(*kept, strict=True)]
