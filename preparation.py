"""Preparing a split: processes tokenize parts of the text, this one reads and packs.

    read -> parts of SHARD_CHARACTERS -> workers tokenize, one file a part -> packed in order

The parts lie in FOLDER.tmp until the rows are whole. A part's file appears under its name when it
is complete, so a killed preparation goes on with those that are there: it reads the text again,
which is quick, and tokenizes what is missing. The rows do not depend on the number of processes or
on interruptions: parts are cut by the text alone and packed in its order.
"""

import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

import mirror
import packing
import rows
from packing import Shape
from readers import Piece
from rows import Rows

log = logging.getLogger("bamdlm")

SHARD_CHARACTERS = 1 << 21  # about half a million tokens
SHARD_TEXTS = 100_000
TEXTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 1 << 20
SECONDS_BETWEEN_REPORTS = 10

Encode = Callable[[list[str]], list[list[int]]]


class Shard(NamedTuple):
    """A part of the text."""

    number: int
    texts: list[str]
    ends: list[bool]
    done: float  # share of the text read at its end

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


class Tokens(NamedTuple):
    """The ids of a part: all in one array, and where its pieces end."""

    ids: np.ndarray  # [tokens], uint16 or uint32
    lengths: np.ndarray  # [pieces], tokens of each
    ends: np.ndarray  # [pieces], bool: the document ends with the piece


def prepare(
    folder: Path,
    pieces: Callable[[], Iterable[Piece]],
    encode: Encode,
    shape: Shape,
    vocab_size: int,
    about: dict,
    *,
    processes: int = 1,
    remote: str | None = None,
    notes: dict | None = None,
) -> Rows:
    """The rows in folder, made where they are missing: by one process, while others wait.

    pieces: called where rows must be made. encode: texts -> their ids. processes: that tokenize;
    with 0 or 1 it is this one. remote: URL of a copy of the folder, which is fetched instead where
    it is complete, and is made where it is not. notes: what calling `pieces` puts in there is kept
    with `about`, and parts made under other notes are not used.
    """
    if not folder.is_dir() or work_folder(folder).exists():
        with lock(folder):
            if folder.is_dir():  # killed, or another process's, after the folder was complete
                shutil.rmtree(work_folder(folder), ignore_errors=True)
            elif remote is None or not mirror.fetch(remote, folder):
                write(
                    folder,
                    pieces,
                    encode,
                    shape,
                    vocab_size,
                    about,
                    processes,
                    {} if notes is None else notes,
                )
    made = Rows(folder)
    if remote is not None and not mirror.is_complete(remote):
        mirror.publish(folder, remote)
    return made


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
    shape: Shape,
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
            parts = tokenized(text, encode, vocab_size, work, processes, report)
            count = rows.save(new, packed(parts, shape), dtype_of(vocab_size), vocab_size)
        if count == 0:
            raise ValueError(
                f"{title} has {report.tokens} tokens in {report.documents} documents: not one row"
                f" of model.length={shape.length}; use a smaller model.length or more text"
            )
        made = {
            "rows": count,
            "dtype": np.dtype(dtype_of(vocab_size)).name,
            "tokens": report.tokens,
            "documents": report.documents,
            "seconds": round(time.monotonic() - report.began, 1),
        }
        whole = json.dumps(about | notes | made, indent=1, ensure_ascii=False)
        (new / "about.json").write_text(whole + "\n", encoding="utf-8")
        os.rename(new, folder)
    except ValueError:  # of the data: mended, they are other data, and these parts of no use
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    log.info(
        "prepared %s: %s documents, %s tokens, %s rows of %d in %.0f s -> %s",
        title,
        *(f"{made[key]:,}" for key in ("documents", "tokens", "rows")),
        *(shape.length, made["seconds"], folder),
    )


def start_or_go_on(work: Path, new: Path, notes: dict) -> None:
    """The folder of the parts, kept where it was cut as it would be now; rows are packed anew."""
    plan = json.dumps({"characters": SHARD_CHARACTERS, "texts": SHARD_TEXTS} | notes)
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


def dtype_of(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


# ---- parts ------------------------------------------------------------------------------------


def cut(pieces: Iterable[Piece]) -> Iterator[Shard]:
    """The text in parts, which depend on nothing but the text."""
    number, batch, characters = 0, [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= SHARD_CHARACTERS or len(batch) == SHARD_TEXTS:
            yield shard(number, batch)
            number, batch, characters = number + 1, [], 0
    if batch:
        yield shard(number, batch)


def shard(number: int, batch: list[Piece]) -> Shard:
    texts, ends = [piece.text for piece in batch], [piece.ends for piece in batch]
    return Shard(number, texts, ends, batch[-1].done)


def tokenized(
    pieces: Iterable[Piece],
    encode: Encode,
    vocab_size: int,
    work: Path,
    processes: int,
    report: "Report",
) -> Iterator[Tokens]:
    """The parts' ids in the order of the text; a few parts are under way at any time."""
    parts = cut(pieces)
    first = list(itertools.islice(parts, 2))
    if len(first) < 2:  # a small text is not worth a process
        processes = 1
    with Workers(processes, encode, vocab_size) as workers:
        under_way: deque[tuple[Shard, Path, Future | None]] = deque()
        for part in itertools.chain(first, parts):
            path = work / f"{part.number:06}.npz"
            future = None if is_finished(path, part) else workers.submit(path, part)
            # the text itself is not needed any more
            under_way.append((part._replace(texts=[]), path, future))
            if len(under_way) > workers.ahead:
                yield taken(*under_way.popleft(), report)
        while under_way:
            yield taken(*under_way.popleft(), report)


def is_finished(path: Path, part: Shard) -> bool:
    """Whether the file holds this part."""
    if not path.is_file():
        return False
    with np.load(path, allow_pickle=False) as file:
        found = len(file["ends"]), int(file["characters"])
    return found == (len(part.ends), part.characters)


def taken(part: Shard, path: Path, future: Future | None, report: "Report") -> Tokens:
    if future is not None:
        future.result()
    with np.load(path, allow_pickle=False) as file:
        tokens = Tokens(file["ids"], file["lengths"], file["ends"])
    report(len(tokens.ids), sum(part.ends), part.done, fresh=future is not None)
    return tokens


def packed(parts: Iterable[Tokens], shape: Shape) -> Iterator[packing.Chunk]:
    if shape.wrap and shape.align is None:
        return packing.in_rows((stream(part, shape) for part in parts), shape)
    return packing.packed((document for part in parts for document in documents(part)), shape)


def stream(part: Tokens, shape: Shape) -> np.ndarray:
    """The ids with EOS after each document."""
    if not shape.insert_eos:
        return part.ids
    return np.insert(part.ids, part.lengths.cumsum()[part.ends], shape.eos)


def documents(part: Tokens) -> Iterator[tuple[list[int], bool]]:
    """(ids, ends) of each piece."""
    stops = part.lengths.cumsum()
    for begin, stop, ends in zip(stops - part.lengths, stops, part.ends.tolist(), strict=True):
        yield part.ids[begin:stop].tolist(), ends


def tokenize(path: Path, part: Shard, encode: Encode, vocab_size: int) -> None:
    """Write the ids of a part under its name, complete or not at all."""
    arrays, lengths = [np.empty(0, np.uint32)], []
    for batch in by_size(part.texts):
        for ids in encode(batch):
            arrays.append(np.array(ids, np.uint32))
            lengths.append(len(ids))
    flat = np.concatenate(arrays)
    if len(flat) and flat.max() >= vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {flat.max()}, but its vocabulary has {vocab_size} ids,"
            " the mask included; check data.tokenizer_name_or_path"
        )
    torn = path.with_suffix(".part")
    with torn.open("wb") as file:
        np.savez(
            file,
            ids=flat.astype(dtype_of(vocab_size)),
            lengths=np.array(lengths, np.int64),
            ends=np.array(part.ends, bool),
            characters=part.characters,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(torn, path)


def by_size(texts: list[str]) -> Iterator[list[str]]:
    """In batches that the tokenizer takes at once: what it returns is large."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---- processes --------------------------------------------------------------------------------


class Workers:
    """Processes that tokenize parts; with 0 or 1, this one does it when asked.

    Processes, not threads: reading ids out of the tokenizer and detokenizing hold the interpreter's
    lock. They are forked, so that they have the tokenizer, and they end with this process, however
    it ends.
    """

    def __init__(self, count: int, encode: Encode, vocab_size: int):
        self.encode, self.vocab_size = encode, vocab_size
        self.ahead = 2 * count if count > 1 else 0  # parts under way
        self.count = count
        self.stack = ExitStack()
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.stack.close()

    def submit(self, path: Path, part: Shard) -> Future:
        if self.count > 1:
            return self.start().submit(_tokenize, path, part, self.vocab_size)
        done = Future()
        tokenize(path, part, self.encode, self.vocab_size)
        done.set_result(None)
        return done

    def start(self) -> ProcessPoolExecutor:
        if self.pool is None:
            reading, writing = os.pipe()
            self.stack.callback(os.close, reading)
            self.stack.callback(os.close, writing)
            self.pool = ProcessPoolExecutor(
                self.count,
                multiprocessing.get_context("fork"),
                initializer=_begin,
                initargs=(self.encode, reading, writing),
            )
        return self.pool


class _Worker:
    """What a worker process was given when it was forked."""

    encode: Encode


def _begin(encode: Encode, reading: int, writing: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    os.close(writing)
    threading.Thread(target=_end_with_parent, args=(reading,), daemon=True).start()
    _Worker.encode = staticmethod(encode)


def _end_with_parent(reading: int) -> None:
    """Nobody writes to this pipe: it ends when the process that holds its other end does."""
    os.read(reading, 1)
    os._exit(1)


def _tokenize(path: Path, part: Shard, vocab_size: int) -> None:
    tokenize(path, part, _Worker.encode, vocab_size)


# ---- progress ---------------------------------------------------------------------------------


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
