"""How a benchmark with targets ends."""

import json
import os
from pathlib import Path


def conclude(figures: dict, missed, *, check: bool, out: Path | None = None) -> int:
    """Says what was missed, prints the figures as the last line and writes them to `out`; "missed"
    among them says that this was the end. Gives the exit code: 1 where something was missed and
    `check` is set."""
    figures["missed"] = list(missed)
    for text in figures["missed"]:
        print("missed:", text)
    print(json.dumps(figures))
    write(figures, out)
    return 1 if check and figures["missed"] else 0


def write(figures: dict, out: Path | None) -> None:
    """All or nothing; nowhere if `out` is None."""
    if out is not None:
        unfinished = out.with_name(f"{out.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(unfinished, out)
