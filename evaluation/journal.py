"""The batches that an evaluation has finished, in a file beside its result: the same command goes
on where a stopped one was.

One line of JSON for each batch and likelihood, written by one process to a file of its own. Rows
are known by their number, so the batches and the number of processes may be others next time.
"""

import json
from pathlib import Path

from evaluation.likelihood import RowResults
from utils import check_place, digest, lines_of, naming, write_whole


class Journal:
    """`facts`: all that shapes the numbers of one likelihood; another evaluation has another
    file. ValueError where something else than a file has its place."""

    def __init__(self, folder: Path, facts: dict, rank: int = 0):
        self.folder = folder
        self.key = digest(json.dumps(facts, sort_keys=True, default=str), 16)
        self.path = folder / f"{self.key}-{rank}.jsonl"
        for path in (self.path, *self._files()):
            check_place(path)

    def _files(self) -> list[Path]:
        """Those of all processes."""
        return sorted(self.folder.glob(f"{self.key}-*.jsonl"))

    def read(self, into: RowResults) -> None:
        """Everything that any process has written; what was cut off while it was written is left
        out."""
        for path in self._files():
            for line in lines_of(path):
                try:
                    batch = json.loads(line)
                    into.add(batch["rows"], batch["tokens"], batch["nll"])
                    into.seconds += batch["seconds"]
                except (ValueError, KeyError, TypeError):
                    continue

    def write(self, rows: list[int], tokens: list[int], nll: list[list[float]], seconds: float):
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"rows": rows, "tokens": tokens, "nll": nll, "seconds": seconds}
        with naming(self.path), self.path.open("ab", buffering=0) as file:
            # begins a line of its own, whatever a killed process has left
            write_whole(file, f"\n{json.dumps(line)}\n".encode())

    def remove(self) -> None:
        """When the result is written."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()
