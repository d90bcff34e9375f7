"""The CSV of a sampling run: one row a text, added as soon as it is done, by any number of
processes.

Columns are those of the authors, `row` and `run`, so that several runs can share a file and each
knows its own rows, then how the text was made. A file keeps the columns that it was begun with.
Beside PATH lie PATH.log.jsonl: what the columns cannot hold (time, tries), one line per added
group; and the report, with every run of the file.

Each process reads what the others have added since its last look, under a lock, so a row costs the
same however many there are. The lock is held for that and one write, and another process waits for
no text. Rows are flushed to the disk after the lock is free: add() returns when they are there, and
rows() flushes what other processes have written. What a killed process left unfinished is cut off
by the next one that writes.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO

from sampling.csv_records import cells, records
from utils import check_place, lines_of, lock, naming, read_json, write_json, write_whole

WAIT = 0.002  # seconds between looks at the lock, which is held for about so long


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
    made: Mapping[str, object] = field(default_factory=dict)  # more columns; None: an empty cell


COLUMNS = tuple(column.name for column in fields(SampleRow) if column.name != "made")


class SampleFile:
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.log = self.path.with_name(self.path.name + ".log.jsonl")
        self._forget(None)

    def _forget(self, identity: tuple[int, int] | None) -> None:
        """Nothing of the file is known; identity: of the file that is read from now on."""
        self._identity = identity
        self._end = 0  # of the whole records that were read, in bytes
        self._columns: tuple[str, ...] = ()
        self._places: dict[str, dict[int, tuple[int, int]]] = {}  # run, row: begin and end in bytes

    @property
    def summary(self) -> Path:
        """Where the reports of the file's runs are written."""
        named = self.path.suffix == ".csv"
        return self.path.with_suffix(".json") if named else Path(f"{self.path}.json")

    def check(self) -> None:
        """ValueError or OSError if the path cannot be such a file; nothing is written."""
        if self.path.is_dir():
            raise ValueError(f"sampling.logdir={self.path} is a folder: name a file in it")
        for path in (self.path, self.log):
            check_place(path)
        for _ in self:
            pass
        self.reports()

    def __iter__(self) -> Iterator[SampleRow]:
        """All whole rows; none where there is no file. ValueError: it is a file of something
        else."""
        if not self.path.exists():
            return
        columns = ()
        with naming(self.path), open(self.path, "rb") as file:
            for record in self._records(file):
                if (row := self._row(record, columns)) is not None:
                    yield row
                columns = columns or self._header(record)
            if not columns:
                file.seek(0)
                begun, content = ",".join(COLUMNS).encode(), file.read(1 << 10)
                if content[: len(begun)] != begun[: len(content)]:
                    self._header(content)  # not a header that was cut off

    def numbers(self, run: str) -> set[int]:
        """The rows of this run that are there."""
        with self._read():
            return set(self._places.get(run, {}))

    def rows(self, run: str) -> dict[int, SampleRow]:
        """The complete rows of this run, by row. They are on the disk, whoever wrote them."""
        with self._read() as file:
            if file is None:
                return {}
            with naming(self.path):
                os.fsync(file.fileno())
            places = self._places.get(run, {})
            return {number: self._row_at(file, *place) for number, place in places.items()}

    def add(self, rows: Sequence[SampleRow], note: dict) -> None:
        """Adds what is not there yet. `note` goes to the log with the run's name."""
        if not rows:
            return
        with ExitStack() as opened:
            with lock(self.path, wait=WAIT):
                file = opened.enter_context(open(self.path, "a+b", buffering=0))
                self._follow(file)
                with naming(self.path):
                    self._append(file, rows)
                with naming(self.log):
                    self._add_note({"run": rows[0].run, **note})
            with naming(self.path):
                os.fsync(file.fileno())

    def notes(self, run: str) -> list[dict]:
        if not self.log.exists():
            return []
        found = []
        for line in lines_of(self.log):
            with suppress(ValueError, RecursionError):  # its writer was killed
                found.append(json.loads(line))
        return [note for note in found if isinstance(note, dict) and note.get("run") == run]

    def reports(self) -> dict[str, dict]:
        """{run: its report}, in the order they were written. ValueError: it is something else."""
        if not self.summary.exists():
            return {}
        content = None
        with suppress(ValueError):
            content = read_json(self.summary)
        if isinstance(content, dict) and isinstance(content.get("run"), str):
            # one of a version that kept the last alone has no runs
            runs = content.get("runs", {content["run"]: content})
            if isinstance(runs, dict):
                return runs
        raise ValueError(
            f"sampling.logdir={self.path}: the report goes to {self.summary}, which is there and is"
            " something else. Name another file"
        )

    def report(self, run: str, summary: dict) -> None:
        """Puts the report of a run beside those of the others. The figures of the run that was
        reported last stand at the top level as well."""
        with lock(self.path, wait=WAIT):
            runs = self.reports()
            runs.pop(run, None)
            write_json(self.summary, {**summary, "runs": {**runs, run: summary}})

    @contextmanager
    def _read(self) -> Iterator[IO[bytes] | None]:
        """The file, of which all whole records are known; None where there is none."""
        with ExitStack() as opened:
            file = None
            if self.path.exists():
                with lock(self.path, wait=WAIT):
                    file = opened.enter_context(open(self.path, "rb", buffering=0))
                    self._follow(file)
            yield file

    def _follow(self, file: IO[bytes]) -> None:
        """Reads what was added since the last time. The lock is held: without it one could take
        records for whole of which a full disk is just about to take away a part."""
        there = os.fstat(file.fileno())
        if self._identity != (there.st_dev, there.st_ino) or there.st_size < self._end:
            self._forget((there.st_dev, there.st_ino))
        file.seek(self._end)
        for record in self._records(file):
            row = self._row(record, self._columns)
            begin, self._end = self._end, self._end + len(record)
            if row is not None:
                self._places.setdefault(row.run, {})[row.row] = begin, self._end
            self._columns = self._columns or self._header(record)

    def _records(self, file: IO[bytes]) -> Iterator[bytes]:
        try:
            yield from records(file)
        except ValueError as error:
            raise ValueError(f"sampling.logdir={self.path}: {error}: name another file") from error

    def _append(self, file: IO[bytes], rows: Sequence[SampleRow]) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        columns = self._columns or (*COLUMNS, *rows[0].made)
        if not self._columns:
            writer.writerow(columns)
        for row in rows:
            if row.row not in self._places.get(row.run, {}):
                known = {**row.made, **vars(row)}
                writer.writerow(known.get(name) for name in columns)
        file.truncate(self._end)
        file.seek(self._end)
        write_whole(file, text.getvalue().encode())

    def _add_note(self, note: dict) -> None:
        with open(self.log, "a+b", buffering=0) as log:
            torn = False
            if log.seek(0, os.SEEK_END):
                log.seek(-1, os.SEEK_END)
                torn = log.read(1) != b"\n"
            write_whole(log, ("\n" * torn + json.dumps(note) + "\n").encode())

    def _row_at(self, file: IO[bytes], begin: int, end: int) -> SampleRow:
        file.seek(begin)
        return self._row(file.read(end - begin), self._columns)

    def _row(self, record: bytes, columns: Sequence[str]) -> SampleRow | None:
        """None: it is the header, or has another number of cells."""
        if not columns:
            return None
        try:
            found = cells(record)
            if len(found) != len(columns):
                return None
            cell = dict(zip(columns, found, strict=True))
            return SampleRow(
                gen_ppl=float(cell["gen_ppl"]) if cell["gen_ppl"] else None,
                gen_nfes=int(cell["gen_nfes"]),
                gen_entropy=float(cell["gen_entropy"]),
                gen_lengths=int(float(cell["gen_lengths"])),
                samples=cell["samples"],
                seed=int(cell["seed"]),
                row=int(cell["row"]),
                run=cell["run"],
                made={name: text for name, text in cell.items() if name not in COLUMNS and text},
            )
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"sampling.logdir={self.path} has a row that is no sample ({error}): name another"
                " file"
            ) from error

    def _header(self, record: bytes) -> tuple[str, ...]:
        line = record.decode("utf-8", errors="replace").rstrip("\r\n")
        columns = tuple(name.strip('"') for name in line.split(","))
        if columns[: len(COLUMNS)] == COLUMNS and len({*columns}) == len(columns):
            return columns
        raise ValueError(
            f"sampling.logdir={self.path} is not a file of samples: it begins with"
            f" {line[:60]!r} instead of {','.join(COLUMNS)!r}. Name another file"
        )
