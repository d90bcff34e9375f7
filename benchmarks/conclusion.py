"""How a benchmark with targets ends."""

import json
from pathlib import Path

from utils import write_json


def conclude(figures: dict, missed, *, check: bool, out: Path | None = None) -> int:
    """Says what was missed, prints the figures as the last line and writes them to `out`; "missed"
    among them says that this was the end. Gives the exit code: 1 where something was missed and
    `check` is set."""
    figures["missed"] = list(missed)
    for text in figures["missed"]:
        print("missed:", text)
    print(json.dumps(figures))
    if out is not None:
        write_json(out, figures)
    return 1 if check and figures["missed"] else 0
