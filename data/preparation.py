"""Preparing a split: processes tokenize parts of the text, this one reads and packs.

    read -> parts -> processes tokenize, one file a part (shards.py) -> packed in order

The parts lie in FOLDER.tmp until the rows are whole. The file of a part has its name once it is
complete. So a killed preparation goes on with the parts that are finished: it reads the text again,
which is quick, and tokenizes what is missing. Others that ask for the same rows meanwhile, perhaps
on other machines, tokenize parts as well. The rows do not depend on the number of processes or on
interruptions: the text alone decides where parts end, and they are packed in its order.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import Timeout

from data import packing, remote_cache, shards, token_rows
from data.packing import RowFormat
from data.readers import Piece
from data.remote_cache import CacheDir
from data.split import Split
from data.tables import Gone
from data.token_rows import TokenRows
from utils import atomic_folder, lock, read_json, write_text

log = logging.getLogger("bamdlm")

NOTE = "plan.json"  # beside the parts: how the text is cut
SECONDS_BETWEEN_REPORTS = 10
SECONDS_BETWEEN_LOOKS = 0.2  # at whether another process has begun to make parts


def prepare(split: Split, cache: CacheDir, processes: int = 1) -> TokenRows:
    """The rows of a split, made where they are missing.

    Several processes may ask at once: one makes the rows, and the others help and wait. processes:
    how many tokenize (0 or 1: this one does); the rows do not depend on it. With a cache behind a
    URL the folder is copied from there where it is complete, and to it where it is not.
    """
    try:
        folder = cache.folder / "rows" / split.folder_name
    except Gone as error:
        kept = kept_rows(split, cache.folder / "rows")
        if kept is None:
            raise
        log.warning("%s; going on with the rows made of it before, in %s", error, kept)
        return TokenRows(kept)
    remote = cache.remote(folder)
    if is_whole(folder) and (remote is None or remote_cache.is_complete(remote)):
        return TokenRows(folder)
    with suppress(Timeout), lock(folder, timeout=0):
        return made_rows(split, cache, folder, processes)
    help_out(split, cache.folder, folder, processes)
    with lock(folder, waiting=f"another process prepares {folder}; waiting for it"):
        return made_rows(split, cache, folder, processes)


def made_rows(split: Split, cache: CacheDir, folder: Path, processes: int) -> TokenRows:
    """The caller holds the folder's lock."""
    remote = cache.remote(folder)
    if folder.is_dir():  # killed, or another process's, after the folder was complete
        remove_parts(folder)
    elif remote is None or not remote_cache.fetch(remote, folder):
        write(split, cache.folder, folder, processes)
    rows = TokenRows(folder)
    if remote is not None and not remote_cache.is_complete(remote):
        remote_cache.publish(folder, remote)
    return rows


def help_out(split: Split, downloads: Path, folder: Path, processes: int) -> None:
    """Tokenize parts while another process makes the rows. Of the processes that a launcher has
    started on a machine, the first one does; returns when there is nothing to do."""
    if any(int(os.environ.get(name) or 0) for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        return
    work = work_folder(folder)
    note = work / NOTE
    while not note.is_file():
        with suppress(Timeout), lock(folder, timeout=0):
            return  # nobody makes them
        time.sleep(SECONDS_BETWEEN_LOOKS)
    place, text = split.open(downloads)
    with suppress(FileNotFoundError):
        if note.read_text() == plan_of(place):
            log.info("another process prepares %s; helping it", folder)
            shards.help_with(
                text, writer(split), work, processes, is_over=lambda: not note.exists()
            )


def writer(split: Split) -> shards.Write:
    """What tokenizes a part of this split and writes its file."""
    return partial(shards.tokenize, encode=split.encode, vocab_size=split.tokenizer.vocab_size)


def kept_rows(split: Split, rows: Path) -> Path | None:
    """The folder made last of a text that is gone."""
    found = [path.parent for path in rows.glob(f"*-{split.split}-*/about.json")]
    found = [folder for folder in found if is_whole(folder) and split.is_of(about_of(folder))]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def about_of(folder: Path) -> dict:
    with suppress(ValueError, OSError):
        return read_json(folder / "about.json")
    return {}


def is_whole(folder: Path) -> bool:
    """Whether the folder is there, and no parts of its making beside it."""
    return folder.is_dir() and not work_folder(folder).exists()


def work_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tmp")


def write(split: Split, downloads: Path, folder: Path, processes: int) -> None:
    """Make the prepared folder. The caller holds its lock."""
    work = work_folder(folder)
    place, text = split.open(downloads)  # before anything is kept or thrown away
    start_or_go_on(work, place)
    try:
        with atomic_folder(folder, locked=True) as new:
            made = write_rows(split, text, new, work, processes)
            about = split.about | {"read_from": place} | made
            noted = json.dumps(about, indent=1, ensure_ascii=False)
            write_text(new / "about.json", noted + "\n")
    except ValueError:  # the text is bad: once corrected it gives other parts
        (work / NOTE).unlink(missing_ok=True)
        shards.await_others(work)
        remove_parts(folder)
        raise
    remove_parts(folder)
    log.info(
        "prepared %s: %s documents, %s tokens, %s rows of %d in %.0f s -> %s",
        split,
        f"{made['documents']:,}",
        f"{made['tokens']:,}",
        f"{made['rows']:,}",
        split.row_format.length,
        made["seconds"],
        folder,
    )


def write_rows(split: Split, text: Iterator[Piece], new: Path, work: Path, processes: int) -> dict:
    """Write the rows' files to `new`; what about.json says of them."""
    row_format = split.row_format
    dtype = token_rows.dtype_of(split.tokenizer.vocab_size)
    with Report(f"preparing {split}") as report:
        found = shards.tokenized(text, writer(split), work, processes, report)
        cut = CutDocuments(row_format)
        found = (cut.add(part.lengths, part.ends) or part for part in found)
        count, real = token_rows.save(new, packing.packed(found, row_format), dtype)
    if row_format.scored and cut.empty:
        log.warning(
            "%s: %d of %d conversations are left out, as they are longer than model.length=%d",
            split,
            cut.empty,
            report.documents,
            row_format.length,
        )
    if count == 0 or report.tokens == 0:  # rows of empty documents would hold EOS alone
        raise ValueError(
            f"{split} has {report.tokens} tokens in {report.documents} documents: not one row"
            f" of model.length={row_format.length}; use"
            f" {'a larger' if row_format.scored and cut.empty else 'a smaller'} model.length or"
            " more text"
        )
    return {
        "rows": count,
        "dtype": np.dtype(dtype).name,
        "tokens": report.tokens,
        "documents": report.documents,
        "cut_documents": cut.count,
        **({"left_out": cut.empty} if row_format.scored else {}),
        "padding": round(1 - real / (count * row_format.length), 6),  # share of the rows
        "seconds": round(time.monotonic() - report.began, 1),
    }


def start_or_go_on(work: Path, place: str) -> None:
    """The folder of the parts, kept where the same text was cut as it would be now."""
    plan, note = plan_of(place), work / NOTE
    if work.exists() and not (note.is_file() and note.read_text() == plan):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    if found := sum(1 for _ in work.glob("*.npz")):
        log.info("going on with %d finished parts in %s", found, work)
    write_text(note, plan)


def plan_of(place: str) -> str:
    """How the text at this place is cut."""
    sizes = {"characters": shards.SHARD_CHARACTERS, "texts": shards.SHARD_TEXTS}
    return json.dumps(sizes | {"read_from": place})


def remove_parts(folder: Path) -> None:
    """The note first, by which processes that help know that it is over; one of them may still put
    its lock there."""
    (work_folder(folder) / NOTE).unlink(missing_ok=True)
    while (work := work_folder(folder)).exists():
        try:
            shutil.rmtree(work)
        except FileNotFoundError:
            continue  # another process removes it too
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):  # else somebody has a file open
                raise
            time.sleep(SECONDS_BETWEEN_LOOKS)


@dataclass
class CutDocuments:
    """Counts documents that do not lie in one row, from their lengths alone: those that go on in
    the next row, and where rows are unwrapped those that lose their end."""

    row_format: RowFormat
    count: int = 0
    empty: int = 0  # documents without a token
    begin: int = 0  # where the next document begins, in its row
    open: int = 0  # tokens of the document that has not ended

    def add(self, lengths: np.ndarray, ends: np.ndarray) -> None:
        """The next pieces: as in packing.Tokens."""
        row_format, room = self.row_format, self.row_format.room
        stops = (self.open + lengths.cumsum())[ends]
        tokens = np.diff(stops, prepend=0)  # of each document
        self.open += int(lengths.sum() - tokens.sum())
        self.empty += int((tokens == 0).sum())
        if row_format.align is not None:
            tokens = tokens[tokens > 0]
            tokens += row_format.insert_special
            tokens += row_format.insert_eos or row_format.insert_special
        elif row_format.wrap:
            tokens += row_format.insert_eos
        if row_format.whole or not row_format.wrap:
            self.count += int((tokens > room).sum())
            return
        steps = tokens + -tokens % (row_format.align or 1)
        ends_at = self.begin + steps.cumsum()
        last = np.maximum(tokens, 1) - 1
        begins = ends_at - steps
        self.count += int((begins // room < (begins + last) // room).sum())
        self.begin = int(ends_at[-1] % room) if len(ends_at) else self.begin


class Report:
    """Shows the progress: a bar on a terminal, else a log line every few seconds."""

    def __init__(self, title: str, unit: str = "tokens"):
        """unit: what is counted as `tokens`."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.title, self.unit = title, unit
        self.tokens = self.documents = 0
        self.fresh = 0  # tokens that no earlier attempt had made
        self.began = self.said = time.monotonic()
        self.reused = 0.0  # share of the text that an earlier attempt had tokenized
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
        rate = f"{self.fresh / elapsed / 1e3:,.0f} k {self.unit}/s"
        self.progress.update(self.bar, completed=done, description=f"{self.title}, {rate}")
        if not self.progress.console.is_terminal and now - self.said > SECONDS_BETWEEN_REPORTS:
            self.said = now
            here = done - self.reused
            left = f"{elapsed * (1 - done) / here:,.0f} s left" if here > 0 else "going on"
            log.info("%s: %.0f %%, %s, %s", self.title, 100 * done, rate, left)
