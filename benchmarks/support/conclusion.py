"""How a benchmark with targets begins and ends."""

import argparse
import json
from pathlib import Path

from utils import write_json


def options(doc: str, *, threads: int, **numbers: int) -> argparse.ArgumentParser:
    """--check, --device, --threads, and an option of a whole number for each of `numbers`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bound is missed")
    parser.add_argument("--device", default="cpu", help="of torch (%(default)s)")
    for name, default in {"threads": threads, **numbers}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    return parser


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
