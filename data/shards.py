"""Shards, the parts of a text, and the processes that tokenize them, each into its own file."""

import itertools
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import token_rows
from data.readers import Piece
from utils import atomic_file

SHARD_CHARACTERS = 1 << 21  # about half a million tokens
SHARD_TEXTS = 100_000
TEXTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 1 << 20

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


def cut(pieces: Iterable[Piece]) -> Iterator[Shard]:
    """The text in parts. Where they end depends on the text alone."""
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
    report: Callable,
) -> Iterator[Tokens]:
    """The parts' ids in the order of the text; a few parts are under way at any time.

    work: the folder of their files; those of an earlier attempt are taken. report(tokens,
    documents, done, fresh=) is called with each part.
    """
    parts = cut(pieces)
    first = list(itertools.islice(parts, 2))
    if len(first) < 2:  # a small text is not worth a process
        processes = 1
    with Workers(processes, encode, vocab_size) as workers:
        under_way: deque[tuple[Shard, Path, Future | None]] = deque()
        for part in itertools.chain(first, parts):
            path = work / f"{part.number:06}.npz"
            future = None if is_finished(path, part) else workers.submit(path, part)
            # its text is not needed any more
            under_way.append((part._replace(texts=[]), path, future))
            if len(under_way) > workers.ahead:
                yield taken(*under_way.popleft(), report)
        while under_way:
            yield taken(*under_way.popleft(), report)


def is_finished(path: Path, part: Shard) -> bool:
    """Whether the file holds this part."""
    if not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file}  # compares check sums
    except (zipfile.BadZipFile, ValueError, EOFError):
        return False
    return (len(found["ends"]), int(found["characters"])) == (len(part.ends), part.characters)


def taken(part: Shard, path: Path, future: Future | None, report: Callable) -> Tokens:
    if future is not None:
        future.result()
    with np.load(path, allow_pickle=False) as file:
        tokens = Tokens(file["ids"], file["lengths"], file["ends"])
    report(len(tokens.ids), sum(part.ends), part.done, fresh=future is not None)
    return tokens


def tokenize(path: Path, part: Shard, encode: Encode, vocab_size: int) -> None:
    """Write the ids of a part under its name, complete or not at all."""
    arrays, lengths = [np.empty(0, np.uint32)], []
    for batch in by_size(part.texts):
        for ids in encode(batch):
            arrays.append(np.array(ids, np.uint32))
            lengths.append(len(ids))
    flat = np.concatenate(arrays)
    token_rows.check_ids(flat, vocab_size)
    with atomic_file(path, "wb") as file:
        np.savez(
            file,
            ids=flat.astype(token_rows.dtype_of(vocab_size)),
            lengths=np.array(lengths, np.int64),
            ends=np.array(part.ends, bool),
            characters=part.characters,
        )


def by_size(texts: list[str]) -> Iterator[list[str]]:
    """The texts in batches for the tokenizer, small enough for the memory that its result takes."""
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
    lock. They are forked, so that they have the tokenizer. They end when this process ends, also
    when it is killed.
    """

    def __init__(self, count: int, encode: Encode, vocab_size: int):
        self.encode, self.vocab_size = encode, vocab_size
        self.ahead = 2 * count if count > 1 else 0  # parts under way
        self.count = count
        self.stack = ExitStack()
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.stack.close()
        if isinstance(error, BrokenProcessPool):  # of a part awaited, or of one handed over
            raise OSError(
                "a process that tokenizes was ended from outside, perhaps for want of memory; the"
                " same command goes on, with a smaller loader.num_workers if it happens again"
            ) from error

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
    """What a worker process got when it was forked."""

    encode: Encode


def _begin(encode: Encode, reading: int, writing: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the main process ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    os.close(writing)
    threading.Thread(target=_end_with_parent, args=(reading,), daemon=True).start()
    _Worker.encode = staticmethod(encode)


def _end_with_parent(reading: int) -> None:
    """Wait until the main process has ended: then this pipe ends, to which nobody writes."""
    os.read(reading, 1)
    os._exit(1)


def _tokenize(path: Path, part: Shard, vocab_size: int) -> None:
    tokenize(path, part, _Worker.encode, vocab_size)
