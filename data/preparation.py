"""Preparing a split: processes tokenize parts of the text, this one reads and packs.

    read -> parts -> processes tokenize, one file a part (shards.py) -> packed in order

The parts lie in FOLDER.tmp until the rows are whole. A part's file appears under its name when it
is complete, so a killed preparation goes on with those that are there: it reads the text again,
which is quick, and tokenizes what is missing. The rows do not depend on the number of processes or
on interruptions: parts are cut by the text alone and packed in its order.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from data import packing, remote_cache, shards, token_rows
from data.packing import RowFormat
from data.readers import Piece
from data.shards import Encode, Tokens
from data.token_rows import TokenRows

log = logging.getLogger("bamdlm")

SECONDS_BETWEEN_REPORTS = 10


def prepare(
    folder: Path,
    pieces: Callable[[], Iterable[Piece]],
    encode: Encode,
    row_format: RowFormat,
    vocab_size: int,
    about: dict,
    *,
    processes: int = 1,
    remote: str | None = None,
    notes: dict | None = None,
) -> TokenRows:
    """The rows in folder, made where they are missing: by one process, while others wait.

    pieces: called where rows must be made. encode: texts -> their ids. processes: that tokenize;
    with 0 or 1 it is this one. remote: URL of a copy of the folder, which is fetched instead where
    it is complete, and is made where it is not. notes: what calling `pieces` puts in there is kept
    with `about`, and parts made under other notes are not used.
    """
    if is_whole(folder) and (remote is None or remote_cache.is_complete(remote)):
        return TokenRows(folder)
    with lock(folder):
        if folder.is_dir():  # killed, or another process's, after the folder was complete
            shutil.rmtree(work_folder(folder), ignore_errors=True)
        elif remote is None or not remote_cache.fetch(remote, folder):
            notes = {} if notes is None else notes
            write(folder, pieces, encode, row_format, vocab_size, about, processes, notes)
        made = TokenRows(folder)
        if remote is not None and not remote_cache.is_complete(remote):
            remote_cache.publish(folder, remote)
    return made


def is_whole(folder: Path) -> bool:
    """Whether the folder is there, and nothing of its making beside it."""
    return folder.is_dir() and not work_folder(folder).exists()


def work_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tmp")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Held while a folder is made; freed by the system when the process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process prepares %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        if not folder.is_dir() and not work_folder(folder).exists():
            # Nothing came of it. FileLock tries anew where the file that it waited for is gone.
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write(
    folder: Path,
    pieces: Callable[[], Iterable[Piece]],
    encode: Encode,
    row_format: RowFormat,
    vocab_size: int,
    about: dict,
    processes: int,
    notes: dict,
) -> None:
    """Make the prepared folder. The caller holds its lock."""
    work = work_folder(folder)
    new = work / "rows"
    title = f"{about['corpus']} ({about['split']})"
    text = pieces()  # before anything is kept or thrown away: it fills notes
    start_or_go_on(work, new, notes)
    try:
        with Report(f"preparing {title}") as report:
            found = shards.tokenized(text, encode, vocab_size, work, processes, report)
            count = token_rows.save(
                new, packed(found, row_format), token_rows.dtype_of(vocab_size), vocab_size
            )
        if count == 0 or report.tokens == 0:  # of empty documents rows would be EOS alone
            raise ValueError(
                f"{title} has {report.tokens} tokens in {report.documents} documents: not one row"
                f" of model.length={row_format.length}; use a smaller model.length or more text"
            )
        made = {
            "rows": count,
            "dtype": np.dtype(token_rows.dtype_of(vocab_size)).name,
            "tokens": report.tokens,
            "documents": report.documents,
            "seconds": round(time.monotonic() - report.began, 1),
        }
        whole = json.dumps(about | notes | made, indent=1, ensure_ascii=False)
        with (new / "about.json").open("w", encoding="utf-8") as file:
            file.write(whole + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, folder)
    except ValueError:  # of the data: mended, they are other data, and these parts of no use
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    log.info(
        "prepared %s: %s documents, %s tokens, %s rows of %d in %.0f s -> %s",
        title,
        *(f"{made[key]:,}" for key in ("documents", "tokens", "rows")),
        *(row_format.length, made["seconds"], folder),
    )


def start_or_go_on(work: Path, new: Path, notes: dict) -> None:
    """The folder of the parts, kept where it was cut as it would be now; rows are packed anew."""
    plan = json.dumps({"characters": shards.SHARD_CHARACTERS, "texts": shards.SHARD_TEXTS} | notes)
    note = work / "plan.json"
    if work.exists() and not (note.is_file() and note.read_text() == plan):
        shutil.rmtree(work)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for torn in work.glob("*.part"):
        torn.unlink()
    if found := sum(1 for _ in work.glob("*.npz")):
        log.info("going on with %d finished parts in %s", found, work)
    note.write_text(plan)


def packed(found: Iterable[Tokens], row_format: RowFormat) -> Iterator[packing.Chunk]:
    if row_format.wrap and row_format.align is None:
        return packing.in_rows((stream(part, row_format) for part in found), row_format)
    return packing.packed((document for part in found for document in documents(part)), row_format)


def stream(part: Tokens, row_format: RowFormat) -> np.ndarray:
    """The ids with EOS after each document."""
    if not row_format.insert_eos:
        return part.ids
    return np.insert(part.ids, part.lengths.cumsum()[part.ends], row_format.eos)


def documents(part: Tokens) -> Iterator[tuple[list[int], bool]]:
    """(ids, ends) of each piece."""
    stops = part.lengths.cumsum()
    for begin, stop, ends in zip(stops - part.lengths, stops, part.ends.tolist(), strict=True):
        yield part.ids[begin:stop].tolist(), ends


class Report:
    """Says how preparation goes: a bar on a terminal, else a log line every few seconds."""

    def __init__(self, title: str):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.title = title
        self.tokens = self.documents = 0
        self.fresh = 0  # tokens that were not there from an earlier attempt
        self.began = self.said = time.monotonic()
        self.reused = 0.0  # share of the text that was there
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True)
        self.bar = self.progress.add_task(title, total=1.0)

    def __enter__(self):
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_):
        if self.progress.console.is_terminal:
            self.progress.stop()

    def __call__(self, tokens: int, documents: int, done: float, *, fresh: bool = True) -> None:
        self.tokens += tokens
        self.documents += documents
        if fresh:
            self.fresh += tokens
        else:
            self.reused = done
        now = time.monotonic()
        elapsed = max(now - self.began, 1e-9)
        rate = f"{self.fresh / elapsed / 1e3:,.0f} k tokens/s"
        self.progress.update(self.bar, completed=done, description=f"{self.title}, {rate}")
        if not self.progress.console.is_terminal and now - self.said > SECONDS_BETWEEN_REPORTS:
            self.said = now
            here = done - self.reused
            left = f"{elapsed * (1 - done) / here:,.0f} s left" if here > 0 else "going on"
            log.info("%s: %.0f %%, %s, %s", self.title, 100 * done, rate, left)
