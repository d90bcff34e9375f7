"""Being told to stop: SIGTERM, SIGUSR1, Ctrl-C (SIGINT), and a terminal that is closed (SIGHUP).

The handlers note the signal, and training reads the note between steps. A further signal changes
nothing, but a second Ctrl-C ends the process at once. Before `listen`, and in the other modes, each
signal ends the process. Every file on disk is complete then.
"""

import os
import signal
import types

from utils import rank, unread

GO_ON = 75  # exit code (EX_TEMPFAIL): saved, the same command goes on; scripts/job.sh requeues
LOST = 1  # exit code: told to stop, and what was to be saved could not be
BY_HAND = 130  # exit code after Ctrl-C, as shells have it; not requeued
TOLD_BY = (signal.SIGTERM, signal.SIGUSR1)
HEARD = (*TOLD_BY, signal.SIGHUP, signal.SIGINT)  # all that `listen` takes
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides


class Stopped(SystemExit):
    """Training was told to stop and has saved."""


class Signals:
    def __init__(self):
        self.received: signal.Signals | None = None  # the first one
        self._process = os.getpid()
        self._pressed = False
        self._screens: list[int] = []

    def listen(self) -> None:
        for number in TOLD_BY:
            signal.signal(number, self._note)
        signal.signal(signal.SIGINT, self._interrupt)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            self._screens = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            signal.signal(signal.SIGHUP, self._hang_up)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)

    def _hang_up(self, number: int, frame: types.FrameType | None) -> None:
        for descriptor in self._screens:
            unread(descriptor)
        self._note(number, frame)

    def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker that is just starting
        if self._pressed:
            end("stopped at once; the same command goes on from the last checkpoint, if any")
        self._pressed = True
        tell("Ctrl-C: saving between two steps, then stopping; press again to stop at once")
        self._note(number, frame)


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process with one line. A library that is being imported may swallow
    Python's KeyboardInterrupt, and the run would go on."""
    process = os.getpid()  # the processes that it starts print nothing
    signal.signal(signal.SIGINT, lambda *_: end("stopped" if os.getpid() == process else ""))


def end_on_warning() -> None:
    """Let SIGUSR1 end the process as it does by itself, but by a handler that keep_signal
    (models/compiling.py) can set again."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda number, _: end_by(number))


def end(line: str) -> None:
    """End the process by SIGINT, so that a script that started it stops as well. Print `line`
    first unless it is empty."""
    if line:
        tell(line)
    if os.isatty(1):
        os.write(1, SHOW_CURSOR)
    end_by(signal.SIGINT)


def end_by(number: int) -> None:
    """End the process by this signal, whatever handler it has."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def tell(line: str) -> None:
    """Print a line, in the first process only. Python's buffers are not used: the handler may have
    interrupted a write to them."""
    if rank() == 0:
        try:
            os.write(2, f"\n{line}\n\n".encode())
        except OSError:
            unread(2)


def ignore_signals() -> None:
    """For data workers. Training needs them until it has stopped; they end with its process."""
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)
