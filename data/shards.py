"""Shards, the parts of a text, and the processes that tokenize them, each into its own file.

Processes that were started by themselves, perhaps on several machines, share the parts of one text:
who makes a part holds the lock of its file, which the system frees when the process ends.
"""

import fcntl
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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import token_rows
from data.packing import Tokens
from data.readers import Piece
from utils import atomic_file

SHARD_CHARACTERS = 1 << 21  # about half a million tokens
SHARD_TEXTS = 100_000
TEXTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 1 << 20
MADE_BY_OTHERS = 4  # parts that a process without others of its own goes ahead of


class Shard(NamedTuple):
    """A part of the text."""

    number: int
    texts: list[str]
    ends: list[bool]
    done: float  # share of the text read at its end

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


Encode = Callable[[list[str]], list[list[int]]]
Write = Callable[[Path, Shard], None]  # writes the ids of a part to its file, as tokenize() does


def cut(pieces: Iterable[Piece]) -> Iterator[Shard]:
    """The text in parts. Where they end depends on the text alone."""
    groups = grouped(pieces, lambda piece: len(piece.text), SHARD_CHARACTERS, SHARD_TEXTS)
    for number, group in enumerate(groups):
        texts, ends = [piece.text for piece in group], [piece.ends for piece in group]
        yield Shard(number, texts, ends, group[-1].done)


def grouped(items: Iterable, size: Callable, most: int, count: int) -> Iterator[list]:
    """Lists that end once they have `count` items, or sizes of `most` together."""
    group, sizes = [], 0
    for item in items:
        group.append(item)
        sizes += size(item)
        if sizes >= most or len(group) == count:
            yield group
            group, sizes = [], 0
    if group:
        yield group


def tokenized(
    pieces: Iterable[Piece], write: Write, work: Path, processes: int, report: Callable
) -> Iterator[Tokens]:
    """The parts' ids in the order of the text; a few parts are under way at any time.

    work: the folder of their files; those of an earlier attempt are taken, and those that others
    make. report(tokens, documents, done, fresh=) is called with each part.
    """
    parts, earlier = cut(pieces), {path.name for path in work.glob("*.npz")}
    first = list(itertools.islice(parts, 2))
    if len(first) < 2:  # a small text is not worth a process
        processes = 1
    ahead = 2 * processes if processes > 1 else MADE_BY_OTHERS  # parts under way
    make = partial(make_part, write=write)
    with workers(processes, make) as submit:
        under_way: deque[tuple[Shard, Path, Future | None]] = deque()

        def taken() -> Tokens:
            part, path, future = under_way.popleft()
            tokens = awaited(part, path, future, make)
            fresh = future is not None or path.name not in earlier
            report(len(tokens.ids), sum(part.ends), part.done, fresh=fresh)
            return tokens

        def is_due() -> bool:
            """Without processes, the first part is there by now, unless another makes it."""
            return len(under_way) > ahead or (processes <= 1 and under_way[0][1].exists())

        for part in itertools.chain(first, parts):
            path = place_of(work, part)
            future = None if read_part(path, part) else submit(path, part)
            under_way.append((part, path, future))
            while under_way and is_due():
                yield taken()
        while under_way:
            yield taken()


def awaited(part: Shard, path: Path, future: Future | None, make: Callable) -> Tokens:
    """The ids of a part. future: of the one of our processes that was asked for it."""
    if future is not None:
        future.result()
    if (tokens := read_part(path, part)) is None:  # another made it then, and may have been killed
        make(path, part, wait=True)
        tokens = read_part(path, part)
    return tokens


def help_with(
    pieces: Iterable[Piece], write: Write, work: Path, processes: int, is_over: Callable[[], bool]
) -> None:
    """Make parts of the text that no other process makes, until none is left or it is over."""
    with workers(processes, partial(make_part, write=write, is_over=is_over)) as submit:
        under_way: deque[Future] = deque()
        for part in cut(pieces):
            if is_over():
                break
            if not (path := place_of(work, part)).exists():
                under_way.append(submit(path, part))
            if len(under_way) > max(processes, 1):
                under_way.popleft().result()
        for future in under_way:
            future.result()


def place_of(work: Path, part: Shard) -> Path:
    return work / f"{part.number:06}.npz"


def make_part(
    path: Path,
    part: Shard,
    *,
    write: Write,
    wait: bool = False,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """The file of a part where it is missing and nobody makes it, or with `wait` when nobody does
    any more. Nothing where it is over: then the files are being removed."""
    try:
        held = path.with_suffix(".lock").open("a")
    except FileNotFoundError:
        return
    with held:  # closing it frees the lock
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return
        if read_part(path, part) is None and not is_over():
            write(path, part)


def await_others(work: Path) -> None:
    """Until nobody makes a part any more."""
    for path in work.glob("*.lock"):
        with path.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)


def read_part(path: Path, part: Shard) -> Tokens | None:
    """None: the file does not hold this part."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file}  # compares check sums
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, EOFError):
        return None
    if (len(found["ends"]), int(found["characters"])) != (len(part.ends), part.characters):
        return None
    return Tokens(*(found[name] for name in Tokens._fields))


def tokenize(path: Path, part: Shard, *, encode: Encode, vocab_size: int) -> None:
    """Write the ids of a part under its name, complete or not at all."""
    batches = grouped(part.texts, len, CHARACTERS_AT_ONCE, TEXTS_AT_ONCE)
    found = [Tokens.of(encode(batch), []) for batch in batches]
    flat = np.concatenate([tokens.ids for tokens in found])
    token_rows.check_ids(flat, vocab_size)
    with atomic_file(path, "wb") as file:
        np.savez(
            file,
            ids=flat.astype(token_rows.dtype_of(max(vocab_size, flat.max(initial=0)))),
            lengths=np.concatenate([tokens.lengths for tokens in found]),
            ends=np.array(part.ends, bool),
            characters=part.characters,
        )


# ---- processes --------------------------------------------------------------------------------


@contextmanager
def workers(count: int, work: Write) -> Iterator[Callable[..., Future]]:
    """What hands a part to one of `count` processes, or with 0 or 1 does the work at once.

    Processes, not threads: reading ids out of the tokenizer and detokenizing hold the interpreter's
    lock. They are forked with the first part, so that they have the tokenizer. They end when this
    process ends, also when it is killed.
    """
    if count <= 1:
        yield partial(_done, work)
        return
    reading, writing = os.pipe()
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, fork, _begin, (work, reading, writing))
    try:
        yield partial(pool.submit, _work)
    except BrokenProcessPool as error:  # of a part awaited, or of one handed over
        raise OSError(
            "a process that tokenizes was ended from outside, perhaps for want of memory; the"
            " same command goes on, with a smaller loader.num_workers if it happens again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.close(reading)
        os.close(writing)


def _done(work: Write, path: Path, part: Shard) -> Future:
    done = Future()
    done.set_result(work(path, part))
    return done


class _Worker:
    """What a worker process got when it was forked."""

    work: Write


def _begin(work: Write, reading: int, writing: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the main process ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what the pool ends us with; not to be heard
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    os.close(writing)
    threading.Thread(target=_end_with_parent, args=(reading,), daemon=True).start()
    _Worker.work = staticmethod(work)


def _end_with_parent(reading: int) -> None:
    """Wait until the main process has ended: then this pipe ends, to which nobody writes."""
    os.read(reading, 1)
    os._exit(1)


def _work(path: Path, part: Shard) -> None:
    _Worker.work(path, part)
