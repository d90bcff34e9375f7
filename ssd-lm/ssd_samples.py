"""The file of samples: one line of JSON each, appended when the sample is done.

A line has the reference's keys

    context_sequences      the prompt as text, null without one
    sampled_sequences      the sample as text, special tokens shown, without the prompt
    total_seq_time         seconds for the sample; samples of one batch share the clock
    avg_block_time         the same per block
    avg_decode_step_time   the same per step (network evaluation and projection)

and index, nfe, token_ids, batch_size, model, settings. A half-written last line (a killed run) is
dropped when the file is opened again, and the run goes on. The blocks of an unfinished batch are
beside it, in .<name>.part.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from utils import atomic_file, lock


class SamplesError(ValueError):
    """The file cannot serve this run; the message says what to do."""


class SampleStream:
    """Samples of one run, locked against a second writer while it is open."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.part = path.with_name(f".{path.name}.part")

    def __enter__(self):
        with ExitStack() as opened:
            try:
                opened.enter_context(lock(self.part, timeout=0))
            except Timeout as error:
                raise SamplesError(
                    f"{self.path}: another process is writing samples into it"
                ) from error
            self.stream = opened.enter_context(self.path.open("a+b"))
            self.done = self._resume()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_):
        self._opened.close()

    def _resume(self) -> set[int]:
        """Indices that exist; cuts a torn last line off."""
        self.stream.seek(0)
        data = self.stream.read()
        self.stream.truncate(data.rfind(b"\n") + 1)
        return finished(self.path, self.settings)

    def unfinished(self, rows: list[int]) -> list:
        """The blocks that a killed run had of this very batch, as `keep` was given them."""
        try:
            found = json.loads(self.part.read_text())
        except (FileNotFoundError, ValueError):
            return []
        if not isinstance(found, dict) or not isinstance(found.get("blocks"), list):
            return []
        same = found.get("settings") == self.settings and found.get("rows") == rows
        return found["blocks"] if same else []

    def keep(self, rows: list[int], blocks: list) -> None:
        """The finished blocks of an unfinished batch, until it is appended; whole or not at all."""
        content = {"settings": self.settings, "rows": rows, "blocks": blocks}
        with naming(self.part), atomic_file(self.part) as file:
            json.dump(content, file)

    def append(self, records: list[dict]) -> None:
        """On the disk when this returns."""
        lines = [json.dumps(r | {"settings": self.settings}, ensure_ascii=False) for r in records]
        with naming(self.path):
            self.stream.write("".join(line + "\n" for line in lines).encode())
            self.stream.flush()
            os.fsync(self.stream.fileno())
        self.done.update(record["index"] for record in records)
        self.part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of writing tells which file: "No space left on device" alone does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def finished(path: Path, settings: dict) -> set[int]:
    """Indices of the samples in the file, which must be of this run; none if there is no file."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    records = parse(data[: data.rfind(b"\n") + 1].decode("utf-8", "replace"), path)
    for record in records:
        check_settings(record, settings, path)
    return {record["index"] for record in records}


def parse(text: str, path: Path) -> list[dict]:
    """Samples from lines of JSON."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SamplesError(
                f"{path}, line {number} is no JSON ({error}); remove it or the file"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("sampled_sequences"), str):
            raise SamplesError(f"{path}, line {number} is no sample: it has no sampled_sequences")
        records.append(record)
    return records


def check_settings(record: dict, settings: dict, path: Path) -> None:
    """Samples of another run must not mix with this one's."""
    theirs = record.get("settings")
    if not isinstance(theirs, dict) or "index" not in record:
        raise SamplesError(f"{path} was not written by this program: choose another --out_fn")
    differing = [key for key in settings if theirs.get(key) != settings[key]]
    if differing:
        pairs = ", ".join(
            f"{key} {theirs.get(key)!r} there, {settings[key]!r} here" for key in differing
        )
        raise SamplesError(
            f"{path} holds samples of another run ({pairs}): choose another --out_fn"
        )


def read(path: Path) -> list[dict]:
    """Samples of a finished or running file in order of index; a torn last line is left out.

    Also takes one JSON document: a sample, or a list of them.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SamplesError(f"{path} cannot be read: {error.strerror}") from error
    try:
        whole = json.loads(text)
    except ValueError:
        records = parse(text[: text.rfind("\n") + 1], path)
    else:
        records = whole if isinstance(whole, list) else [whole]
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("sampled_sequences"), str):
                raise SamplesError(
                    f"{path} holds something that is no sample with sampled_sequences"
                )
    return sorted(records, key=lambda record: record.get("index", 0))
