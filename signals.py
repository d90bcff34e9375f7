"""Being told to stop: SIGTERM and SIGUSR1 are noted, and training reads the note between steps.

Nothing is done inside a handler, so a second signal changes nothing. Until `listen` the signals
keep their usual effect (the process ends): before training there is nothing to save.
"""

import signal
import types

GO_ON = 75  # exit code (EX_TEMPFAIL): saved, the same command goes on; scripts/job.sh requeues
TOLD_BY = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """Training was told to stop and has saved."""


class Signals:
    def __init__(self):
        self.received: signal.Signals | None = None  # the first one

    def listen(self) -> None:
        for number in TOLD_BY:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)


def ignore() -> None:
    """For data workers: they end with the process they work for, which still needs them."""
    for number in TOLD_BY:
        signal.signal(number, signal.SIG_IGN)
