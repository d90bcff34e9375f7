"""Small things with several callers: files written whole, locks, JSON, messages of one process."""

import errno
import glob
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

log = logging.getLogger("bamdlm")

ALPHABET = "characters:"  # begins the name of a tokenizer that lists its characters
LONGEST_WORD, LONGEST_SENTENCE = 300, 1500  # characters of foreign text that are shown
# What a disk, little memory or strange input makes Python raise. A ValueError beside them says what
# is wrong with an input; any other error is a bug of this project.
CIRCUMSTANCES = (OSError, UnicodeError, OverflowError, RecursionError, MemoryError)


@contextmanager
def plain_errors(place: str) -> Iterator[None]:
    """Behind a URL every file system has errors of its own: here they are OSErrors."""
    try:
        yield
    except (OSError, ValueError, RuntimeError):
        raise
    except Exception as error:
        if "://" not in place:
            raise
        raise OSError(f"{place}: {type(error).__name__}: {error}") from error


def end_children() -> None:
    """For the end of a process: Python would wait for data workers, which ignore the signals that
    tell them to end."""
    for child in multiprocessing.active_children():
        child.kill()


def rank() -> int:
    """Which process of a job this is, before or after it is initialised; 0 where there is one."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if (number := whole_number(os.environ.get(name))) is not None:
            return number
    return 0


def whole_number(text: str | None) -> int | None:
    """Of a variable that a launcher sets; None: it is no such number."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text) else None


def say(text: str) -> None:
    """Lines for the user, once per job; what they quote does nothing to the terminal."""
    if rank() == 0:
        try:
            print(harmless(text), flush=True)
        except BrokenPipeError:
            unread(1)


class HarmlessFormatter(logging.Formatter):
    """Of a log whose lines quote foreign text."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def listed(things: Iterable) -> str:
    """1, 4 and 16"""
    *others, last = map(str, things)
    return f"{', '.join(others)} and {last}" if others else last


def unread(descriptor: int) -> None:
    """What is written there goes nowhere from now on: its reader is gone. A Ctrl-C that tells the
    run to save also ends the tee behind it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def digest(text: str, digits: int) -> str:
    """The first hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def escaped(text: str) -> str:
    """Text on one line that does nothing to a terminal or a log: control characters, marks of
    direction, line breaks and halves of a pair are written as in Python, such as `\\x1b`."""
    return "".join(
        each if each.isprintable() or unicodedata.category(each) == "Zs" else ascii(each)[1:-1]
        for each in text
    )


def harmless(text: str) -> str:
    """Several lines, each escaped()."""
    return "\n".join(map(escaped, text.split("\n")))


def shown(text: object) -> str:
    """Foreign text in a message: escaped(), and a long word or a long text without its middle."""
    line = escaped(_without_middle(str(text), LONGEST_SENTENCE))
    line = re.sub(
        rf"\S{{{LONGEST_WORD},}}", lambda word: _without_middle(word[0], LONGEST_WORD), line
    )
    return _without_middle(line, LONGEST_SENTENCE)


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-most // 4 :]}"


# What libraries put into their messages: the number of an error, its type, and types of values.
FOR_PROGRAMS = re.compile(r"\[Errno -?\d+\] |\b\w+Error: |<class '([\w.]+)'>")


def reason(error: BaseException) -> str:
    """An error as one line for a user: what is wrong and, with an error of the disk, where."""
    if isinstance(error, MemoryError):
        return "this does not fit into the memory of this machine"
    if isinstance(error, RecursionError):
        return "this is nested too deeply"
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}"
    text = " ".join(str(error).split())
    return FOR_PROGRAMS.sub(lambda found: found[1] or "", text) or type(error).__name__


MOST_DESCRIPTION = 1 << 28  # bytes of a file that is read whole, such as a model's JSON: some MB
MOST_LINE = 1 << 26  # of a file that is read line by line, whatever its size


def check_file(path: Path, most: float = MOST_DESCRIPTION) -> None:
    """ValueError where it is no regular file (a device, a FIFO, a link to nowhere) or has more than
    `most` bytes: reading it might never end."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    if path.stat().st_size > most:
        raise ValueError(f"{path} has more than {most:,} bytes")


def check_place(path: Path) -> None:
    """ValueError where neither a regular file of this project stands nor nothing: what is kept on
    with may have any size, and is read bit by bit."""
    if os.path.lexists(path):
        check_file(path, math.inf)


def check_files(folder: Path) -> None:
    """check_file() of all in a foreign folder; only descriptions have a bound."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            check_file(path, MOST_DESCRIPTION if path.suffix in (".json", ".txt") else math.inf)


def read_json(path: str | Path):
    """What a JSON file holds, UTF-8.

    ValueError: check_file() refuses it, it is no JSON, or nested too deeply. OSError: it is not
    there or cannot be read.
    """
    path = Path(path)
    if path.exists():  # reading names what is not there
        check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def lines_of(path: Path) -> Iterator[str]:
    """Of a text that may be damaged: what is no UTF-8 is replaced, and a line of more than
    MOST_LINE characters comes in pieces."""
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        yield from iter(partial(file.readline, MOST_LINE), "")


def visible_files(folder: Path, hidden: str = ".") -> list[Path]:
    """What is no folder below `folder`, without what tools keep: names, and those of folders, that
    begin with one of the characters `hidden`."""
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return [p for p in found if not any(x[0] in hidden for x in p.relative_to(folder).parts)]


def matching_files(pattern: str) -> list[Path]:
    """Of a glob pattern, or the file that has exactly this name. `**` enters no link: one that
    leads back has no end."""
    path = Path(os.path.expanduser(pattern))
    if path.is_file():
        return [path]
    if "**" not in path.parts:
        return [Path(name) for name in glob.glob(str(path)) if os.path.isfile(name)]
    first = next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
    base = Path(*path.parts[:first])
    found = base.glob(str(Path(*path.parts[first:])))
    seen = {p for p in found if not any(x[0] == "." for x in p.relative_to(base).parts)}
    return [each for each in seen if each.is_file()]


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a write may fail with


def write_whole(file: IO, data: bytes) -> None:
    """The file ends with all of `data` from here on, or with nothing of it. It has no buffer, whose
    rest would be written later."""
    begin = file.tell()
    try:
        write_all(file.write, data)
    finally:
        end = file.tell()
        file.truncate(end if end == begin + len(data) else begin)


def write_all(write: Callable[[memoryview], int], data: bytes) -> None:
    """A disk that is almost full takes a part of it, and no more."""
    left = memoryview(data)
    while left:
        left = left[write(left) :]


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of the disk name the file: those of a write do not say which it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK:
            error.filename = str(path)
        raise


class Failure(RuntimeError):
    """What ended work that had begun, in one line: exit code 1."""


class DataFailure(Failure):
    """Data do not come any more."""


@contextmanager
def atomic_file(path: str | Path, mode: str = "w", *, alone: bool = False) -> Iterator[IO]:
    """A file that appears under its name complete or not at all, whenever the process dies.

    It is written beside `path`, brought to the disk and renamed; the folder is made if need be.
    mode: "w" (text, UTF-8) or "wb". alone: no other process writes to `path`, so that what killed
    writers have left is removed first.
    """
    path = Path(path)
    if alone:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            left.unlink(missing_ok=True)
    with _replacing(path) as new, new.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def atomic_link(path: str | Path, source: str | Path) -> None:
    """`path` becomes another name of the file `source`; a copy of it where links do not work. To a
    folder, which lies beside it, it becomes a symbolic link."""
    with _replacing(Path(path)) as new:
        if os.path.isdir(source):
            os.symlink(os.path.basename(source), new)
            return
        try:
            os.link(source, new)
        except OSError:
            shutil.copyfile(source, new)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`. What the block makes of it takes the place of `path` in the end, or is
    removed where the block fails."""
    new = _beside(path, ".partial")
    try:
        with naming(path):
            yield new
            os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _beside(path: Path, suffix: str = "") -> Path:
    """A name that nothing has, in the folder of `path`, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")


@contextmanager
def atomic_folder(
    path: str | Path, *, overwrite: bool = False, locked: bool = False
) -> Iterator[Path]:
    """A folder that appears under its name complete or not at all.

    overwrite: a folder that exists is replaced at the end, and stays if that fails. Without it an
    empty folder is replaced too; OSError: something else is there. locked: the caller holds
    lock(path), so that what is left of killed processes is removed first.
    """
    path = Path(path)
    prefix = f".{path.name}."
    if locked:
        for left in path.parent.glob(f"{glob.escape(prefix)}*"):
            if "." not in left.name.removeprefix(prefix):  # else it belongs to another path
                shutil.rmtree(left)
    new, old = _beside(path), _beside(path)
    new.mkdir()
    try:
        with naming(path):
            yield new
            _open_to_readers(new)
        try:
            if overwrite and path.exists():
                os.rename(path, old)
            os.rename(new, path)
        except BaseException:
            if old.exists() and not path.exists():  # before `new` goes, which may take a while
                os.rename(old, path)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():  # else the old folder could not be put back, and there is no other
            shutil.rmtree(old, ignore_errors=True)
    _sync_folder(path.parent)


def _open_to_readers(folder: Path) -> None:
    """The files as readable as the folder: safetensors leaves its own to their owner alone."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(readable | path.stat().st_mode & 0o111)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock(
    path: str | Path, timeout: float = -1, *, waiting: str | None = None, wait: float = 0.05
) -> Iterator[None]:
    """Held by one process at a time, as the file PATH.lock; freed when the process ends.

    timeout: seconds to wait; -1 for ever. filelock.Timeout where it passes. waiting: what the log
    says where another process holds it. wait: seconds until it is tried again. The file is removed
    where nothing exists at `path` in the end; a process that waits then makes the file again.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        held.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            log.info(waiting)
        held.acquire(timeout=timeout, poll_interval=wait)
    try:
        yield
    finally:
        if not path.exists():
            Path(held.lock_file).unlink(missing_ok=True)
        held.release()


def write_text(path: str | Path, text: str) -> None:
    """All or nothing, in a folder that is made if need be."""
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: str | Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
