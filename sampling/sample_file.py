"""The CSV of a sampling run: one row a text, added as soon as it is done, by any number of
processes.

Columns are those of the authors, then `row` and `run`, so that several runs can share a file and
each knows its own rows. Beside PATH lies PATH.log.jsonl: what the columns cannot hold (time,
tries), one line per added group. Rows are added under a lock in one write and flushed to the disk;
what a killed process left unfinished is cut off by the next one that writes.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from utils import lock, naming, write_whole

LONGEST_CELL = 1 << 30  # bytes; csv's own limit is less than a text of 131 072 letters


@dataclass(frozen=True)
class SampleRow:
    """The columns, in their order."""

    gen_ppl: float | None  # None: no judge
    gen_nfes: int
    gen_entropy: float
    gen_lengths: int
    samples: str
    seed: int
    row: int
    run: str


COLUMNS = tuple(column.name for column in fields(SampleRow))


class SampleFile:
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.log = self.path.with_name(self.path.name + ".log.jsonl")

    @property
    def summary(self) -> Path:
        """Where the report of the file's last run is written."""
        named = self.path.suffix == ".csv"
        return self.path.with_suffix(".json") if named else Path(f"{self.path}.json")

    def check(self) -> None:
        """ValueError if the path cannot be such a file; nothing is written."""
        if self.path.is_dir():
            raise ValueError(f"sampling.logdir={self.path} is a folder: name a file in it")
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"sampling.logdir={self.path} is no regular file")
        if self.path.exists():
            for record in self._records(self.path.read_bytes()):
                self._row(record)

    def rows(self, run: str) -> dict[int, SampleRow]:
        """The complete rows of this run, by row."""
        if not self.path.exists():
            return {}
        records = self._records(self.path.read_bytes())
        found = [self._row(record) for record in records if record["run"] == run]
        return {row.row: row for row in found}

    def _row(self, record: dict) -> SampleRow:
        try:
            return SampleRow(
                gen_ppl=float(record["gen_ppl"]) if record["gen_ppl"] else None,
                gen_nfes=int(record["gen_nfes"]),
                gen_entropy=float(record["gen_entropy"]),
                gen_lengths=int(float(record["gen_lengths"])),
                samples=record["samples"],
                seed=int(record["seed"]),
                row=int(record["row"]),
                run=record["run"],
            )
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"sampling.logdir={self.path} has a row that is no sample ({error}): name another"
                " file"
            ) from error

    def add(self, rows: Sequence[SampleRow], note: dict) -> None:
        """Adds what is not there yet. `note` goes to the log with the run's name."""
        if not rows:
            return
        with lock(self.path), open(self.path, "a+b", buffering=0) as file:
            file.seek(0)
            content = file.read()
            whole = complete(content)
            there = {(r["run"], int(r["row"])) for r in self._records(content)}
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            if whole == 0:
                writer.writerow(COLUMNS)
            writer.writerows(astuple(row) for row in rows if (row.run, row.row) not in there)
            with naming(self.path):
                file.truncate(whole)
                file.seek(whole)
                write_whole(file, text.getvalue().encode())
                os.fsync(file.fileno())
            with naming(self.log), open(self.log, "a+b", buffering=0) as log:
                log.seek(0)
                torn = not (log.read() or b"\n").endswith(b"\n")
                line = json.dumps({"run": rows[0].run, **note}) + "\n"
                write_whole(log, ("\n" * torn + line).encode())

    def notes(self, run: str) -> list[dict]:
        if not self.log.exists():
            return []
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # its writer was killed
        return [note for note in found if isinstance(note, dict) and note.get("run") == run]

    def _records(self, content: bytes) -> list[dict]:
        text = content[: complete(content)].decode("utf-8", errors="replace")
        csv.field_size_limit(LONGEST_CELL)
        lines = csv.reader(io.StringIO(text, newline=""))
        header = next(lines, None)
        if header is None:
            return []
        if tuple(header) != COLUMNS:
            raise ValueError(
                f"sampling.logdir={self.path} is not a file of samples: it begins with"
                f" {','.join(header)[:60]!r} instead of {','.join(COLUMNS)!r}. Name another file"
            )
        return [
            dict(zip(COLUMNS, line, strict=True)) for line in lines if len(line) == len(COLUMNS)
        ]


def complete(content: bytes) -> int:
    """Length of the records that are whole: the end of the last line break outside of quotes."""
    quoted = start = whole = 0
    for line in content.splitlines(keepends=True):
        quoted += line.count(b'"')
        start += len(line)
        if quoted % 2 == 0 and line.endswith(b"\n"):
            whole = start
    return whole
