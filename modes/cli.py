"""The front of main.py: reads the command line, answers --help, starts nothing that cannot work."""

import io
import itertools
import os
import sys
from typing import IO

import settings
from settings.help import full_help
from utils import CIRCUMSTANCES, rank, reason, say, shown, unread, write_all

TROUBLE = 2  # exit code of a command line that cannot be run


def configure(argv: list[str]) -> settings.Config:
    """The checked settings of a command line.

    Exits with 0 after --help and `--cfg job`, and with 2 after listing everything that is wrong.
    Warnings are one line each; both go to stderr.
    """
    if any(word in ("-h", "--help") for word in argv):
        say(full_help())
        sys.exit(0)
    overrides, show = split_cfg(argv)
    config, problems, warnings = examined(overrides)
    messages = [f"note: {shown(warning)}" for warning in warnings]
    if problems:
        messages.append(str(settings.ConfigError(problems)))
    if messages and rank() == 0:
        print(*messages, sep="\n", file=sys.stderr)
    if problems:
        sys.exit(TROUBLE)
    if show:
        say(settings.composed_yaml(overrides).rstrip())
        sys.exit(0)
    return config


def examined(overrides: list[str]) -> tuple[settings.Config | None, list[str], list[str]]:
    """settings.examine() with the rules of all modes; what it cannot look at is a problem."""
    from modes.sampling_params import sampling_problems  # not for --help

    try:
        return settings.examine(overrides, rules=[sampling_problems])
    except CIRCUMSTANCES as error:
        return None, [reason(error)], []


def asks_for_several(argv: list[str]) -> bool:
    """Whether -m stands in the command line; --help answers first."""
    return bool({"-m", "--multirun"} & set(argv)) and not {"-h", "--help"} & set(argv)


def split_cfg(argv: list[str]) -> tuple[list[str], bool]:
    """The overrides, and whether `--cfg job` (-c job) stood among them."""
    for i, pair in enumerate(itertools.pairwise(argv)):
        if pair in (("--cfg", "job"), ("-c", "job")):
            return argv[:i] + argv[i + 2 :], True
    return argv, False


class Output(io.FileIO):
    """Standard output or standard error. Where they cannot be written the work goes on without
    them, and `failure` says why (None: nothing was lost, or nobody reads it any more)."""

    failure: str | None = None

    def write(self, data) -> int:
        """All of it."""
        try:
            write_all(super().write, data)
        except OSError as error:
            unread(self.fileno())
            if not isinstance(error, BrokenPipeError):
                name = {1: "standard output", 2: "standard error"}[self.fileno()]
                self.failure = f"{name} could not be written: {error.strerror}"
                if self.fileno() == 1:
                    print(self.failure, file=sys.stderr, flush=True)
        return len(data)


def take_output(descriptor: int) -> tuple[Output, IO[str]]:
    """Descriptor 1 or 2 and a stream of lines onto it. One that is closed becomes one that nobody
    reads, or the next file that is opened would get its number, and what is printed."""
    try:
        os.fstat(descriptor)
    except OSError:
        unread(descriptor)
    raw = Output(descriptor, "w", closefd=False)
    buffer = io.BufferedWriter(raw)
    return raw, io.TextIOWrapper(buffer, errors="backslashreplace", line_buffering=True)
