"""Rows of L ids on disk: made once, read through the page cache. A prepared folder holds

    ids.bin      [rows, L] uint16, or uint32 for vocabularies above 65 536
    counts.bin   [rows] uint32, real tokens of each row; what follows them is padding
    marks.bin    [rows, 2, ceil(L / 8)] uint8, of data.pack=documents alone: two bits for a token,
                 whether a segment begins there and whether it is real (not padding)
    about.json   what the rows were made from and how many there are

and is made under a temporary name, so that a folder that exists is complete.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

import packing
from packing import Shape
from readers import Piece

log = logging.getLogger("bamdlm")

FORMAT = 1  # raise it when the same settings would give other rows
TEXTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 1 << 20
SECONDS_BETWEEN_REPORTS = 10


def encoded(
    pieces: Iterable[Piece], tokenizer, detokenize: Callable[[str], str] | None, report: Callable
) -> Iterator[tuple[list[int], bool]]:
    """Pieces as (ids, ends), tokenized in batches."""
    for batch in by_size(pieces):
        texts = [piece.text for piece in batch]
        if detokenize is not None:
            texts = [detokenize(text) for text in texts]
        encodings = tokenizer.encode_batch(texts)
        for ids, piece in zip(encodings, batch, strict=True):
            yield ids, piece.ends
        report(sum(map(len, encodings)), sum(piece.ends for piece in batch), batch[-1].done)


def by_size(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if len(batch) == TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Report:
    """Says how preparation goes: a bar on a terminal, else a log line every few seconds."""

    def __init__(self, title: str):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.title = title
        self.tokens = self.documents = 0
        self.began = self.said = time.monotonic()
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

    def __call__(self, tokens: int, documents: int, done: float) -> None:
        self.tokens += tokens
        self.documents += documents
        now = time.monotonic()
        elapsed = max(now - self.began, 1e-9)
        rate = f"{self.tokens / elapsed / 1e3:,.0f} k tokens/s"
        self.progress.update(self.bar, completed=done, description=f"{self.title}, {rate}")
        if not self.progress.console.is_terminal and now - self.said > SECONDS_BETWEEN_REPORTS:
            self.said = now
            left = elapsed * (1 - done) / done if done else float("inf")
            log.info("%s: %.0f %%, %s, %.0f s left", self.title, 100 * done, rate, left)


def prepare(
    folder: Path,
    documents: Callable[[Report], Iterable],
    shape: Shape,
    vocab_size: int,
    about: dict,
) -> "Rows":
    """The rows in folder, made where they are missing: by one process, while others wait.

    documents: called where rows must be made; gives (ids, ends) pairs and reports what it has read.
    """
    if not folder.is_dir():
        with lock(folder):
            if not folder.is_dir():
                write(folder, documents, shape, vocab_size, about)
    return Rows(folder)


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
        lock.release()


def write(
    folder: Path,
    documents: Callable[[Report], Iterable],
    shape: Shape,
    vocab_size: int,
    about: dict,
) -> None:
    """Make the prepared folder. The caller holds its lock."""
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # left by a killed preparation
        shutil.rmtree(stale)
    new = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    new.mkdir(parents=True)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    try:
        with Report(f"preparing {about['corpus']} ({about['split']})") as report:
            rows = save(new, packing.packed(documents(report), shape), dtype, vocab_size)
        if rows == 0:
            raise ValueError(
                f"{about['corpus']} ({about['split']}) has {report.tokens} tokens in"
                f" {report.documents} documents: not one row of model.length={shape.length}; use a"
                " smaller model.length or more text"
            )
        made = {
            "rows": rows,
            "dtype": np.dtype(dtype).name,
            "tokens": report.tokens,
            "documents": report.documents,
            "seconds": round(time.monotonic() - report.began, 1),
        }
        text = json.dumps(about | made, indent=1, ensure_ascii=False)
        (new / "about.json").write_text(text + "\n", encoding="utf-8")
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    log.info(
        "prepared %s (%s): %s documents, %s tokens, %s rows of %d in %.0f s -> %s",
        *(about["corpus"], about["split"]),
        *(f"{made[key]:,}" for key in ("documents", "tokens", "rows")),
        *(shape.length, made["seconds"], folder),
    )


def save(folder: Path, chunks: Iterable, dtype: type, vocab_size: int) -> int:
    """The number of rows written."""
    rows, files = 0, {}
    with ExitStack() as stack:
        for ids, counts, marks in chunks:
            if ids.max() >= vocab_size:
                raise ValueError(
                    f"the tokenizer gave the id {ids.max()}, but its vocabulary has {vocab_size}"
                    " ids, the mask included; check data.tokenizer_name_or_path"
                )
            arrays = {"ids.bin": ids.astype(dtype), "counts.bin": counts.astype(np.uint32)}
            if marks is not None:
                arrays["marks.bin"] = marks
            for name, array in arrays.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / name).open("wb"))
                files[name].write(array.tobytes())
            rows += len(ids)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return rows


class Rows:
    """A prepared folder, read through the page cache: opening it costs nothing."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = json.loads((self.folder / "about.json").read_text())
        self.length = self.about["shape"]["length"]
        self.dtype = np.dtype(self.about["dtype"])
        self.open()

    def open(self) -> None:
        self.ids = self.array("ids.bin", self.dtype, (self.about["rows"], self.length))
        self.counts = self.array("counts.bin", np.dtype(np.uint32), (self.about["rows"],))
        if self.apart:
            shape = (self.about["rows"], 2, -(-self.length // 8))
            self.marks = self.array("marks.bin", np.dtype(np.uint8), shape)

    @property
    def apart(self) -> bool:
        """Whether documents are kept apart (data.pack=documents)."""
        return self.about["shape"].get("align") is not None

    def array(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        expected, found = np.prod(shape) * dtype.itemsize, (self.folder / name).stat().st_size
        if found != expected:
            raise ValueError(
                f"{self.folder / name} has {found} bytes, {expected} were written: the file was"
                " changed or damaged; delete the folder, and it will be made again"
            )
        return np.memmap(self.folder / name, dtype, "r", shape=shape)

    def __getstate__(self) -> dict:  # a memory map would be copied into a worker
        maps = ("ids", "counts", "marks")
        return {key: value for key, value in vars(self).items() if key not in maps}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.open()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, L], attention mask [B, L]), both int64."""
        ids = np.array(self.ids[rows], np.int64)
        if self.apart:
            return ids, (self.segments(rows) > 0).astype(np.int64)
        mask = np.arange(self.length) < self.counts[rows][:, None]
        return ids, mask.astype(np.int64)

    def segments(self, rows: list[int]) -> np.ndarray:
        """Where documents are apart: the number of each token's document in its row, int64 [B, L];
        0 is padding."""
        return packing.segments(self.marks[rows], self.length)
