"""What every refusal of tests/attack has to be, whatever was attacked.

message = refused(["mode=train", "seed=x"], "seed=x must be a whole number")
message = refused(lambda: read_checkpoint(path), "a.ckpt", "no checkpoint")
message = refused_process(["mode=train", "seed=x"], "seed=x", HOME=None)
"""

import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest

import main
from settings import ConfigError

ROOT = Path(__file__).parents[2]
SECONDS, MEMORY = 60, 2 << 30
LONGEST_LINE = 2000  # characters
HEAD = "this run cannot start:"
# Unicode categories that change what a terminal shows: control, bidirectional marks and other
# formats, halves of a pair, separators of lines and paragraphs
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def cases(table: dict[str, tuple], slow: Iterable[str] = ()) -> list:
    """Of parametrize: each under its name, those named `slow` with scripts/test.sh --slow only."""
    assert table.keys() >= set(slow)
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in table}
    return [pytest.param(*value, id=name, marks=marks[name]) for name, value in table.items()]


class Endless(BaseException):
    """No answer after SECONDS."""


@contextmanager
def bounded(seconds: int = SECONDS, memory: int = MEMORY):
    """At most so many seconds, and so many bytes of address space beside what is there already."""

    def late(number, frame):
        raise Endless(f"no answer after {seconds} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again where it is caught
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def answer(attempt: list[str] | Callable[[], object], memory: int = MEMORY) -> tuple[int, str]:
    """(exit code, what went to stderr) of a command line or a call, here in this process.

    A call may raise what main.py turns into one line; anything else goes on as the bug it is.
    """
    errors = io.StringIO()
    with bounded(memory=memory), redirect_stderr(errors), redirect_stdout(io.StringIO()):
        if not callable(attempt):
            try:
                return main.main(list(attempt)), errors.getvalue()
            except SystemExit as stopped:
                return stopped.code, errors.getvalue()
        try:
            attempt()
        except (ValueError, OSError) as error:
            problem = error if isinstance(error, ConfigError) else ConfigError([str(error)])
            return 2, f"{errors.getvalue()}{problem}\n"
    return 0, errors.getvalue()


def refused(
    attempt: list[str] | Callable[[], object],
    *pieces: str,
    code: int = 2,
    problems: int | None = 1,
    writes: Iterable[str] = (),
    memory: int = MEMORY,
) -> str:
    """The message with which a command line or a call is refused.

    pieces: each must stand in it. problems: how many lines of problems; None: one or more.
    writes: patterns of files that the attempt may leave in the working folder. memory: as in
    bounded().
    """
    before = files(writes)
    got, message = answer(attempt, memory)
    assert got == code, f"exit code {got}: {message[-3000:]}"
    clear(message, problems)
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in {message!r}"
    assert files(writes) == before, "the attempt left files"
    return message


def clear(message: str, problems: int | None = 1) -> None:
    """Whether it is a head and one readable line per problem; notes may stand before them."""
    lines = [line for line in message.splitlines() if not line.startswith("note: ")]
    assert lines[:1] == [HEAD], message[-3000:]
    found = lines[1:]
    assert found, "no problem is named"
    assert problems in (None, len(found)), message[-3000:]
    for line in found:
        assert line.startswith("  - "), f"a problem of several lines: {message[-3000:]}"
        assert len(line.strip(" -")) > 10, f"says nothing: {line!r}"
    for line in message.splitlines():
        assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line[:200]}"
        assert not {unicodedata.category(each) for each in line} & HIDDEN, f"hidden: {line!r}"
    for word in ("Traceback", "[Errno", "Error:", "<class", " object at 0x"):
        assert word not in message, f"{word} is not for users: {message!r}"


def files(besides: Iterable[str] = ()) -> set[Path]:
    """Of the working folder, without those of the patterns `besides`."""
    here = Path.cwd()
    found = {path.relative_to(here) for path in here.rglob("*")}
    return {path for path in found if not any(path.match(pattern) for pattern in besides)}


# A process counts as held what the one that started it held, and a worker of pytest may hold
# gigabytes: so a small one starts it, and says what it was.
STARTER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as held:
    held.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def refused_process(
    words: list[str], *pieces: str, code: int = 2, problems: int | None = 1, **environment
) -> str:
    """As refused(), of main.py in a process of its own, with other environment variables (None:
    not set). It is measured by the memory that it held."""
    kept = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    kept = {name: value for name, value in kept.items() if value is not None}
    with tempfile.TemporaryFile() as out, tempfile.NamedTemporaryFile("r") as held:
        program = [sys.executable, str(ROOT / "main.py"), *words]
        started = subprocess.Popen(
            [sys.executable, "-SEc", STARTER, held.name, *program],
            env=kept,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            started.wait(SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        out.seek(0)
        message = out.read().decode("utf-8", "backslashreplace")
        kilobytes = int(held.read())
    assert started.returncode == code, f"exit code {started.returncode}: {message[-3000:]}"
    assert kilobytes * 1024 < MEMORY, f"{kilobytes / 1e6:.1f} GB"
    clear(message, problems)
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in {message!r}"
    return message
