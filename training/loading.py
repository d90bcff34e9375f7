"""torch's DataLoader, where workers may die: the run is told in one line, and never waits for what
cannot come."""

import multiprocessing.queues
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from training.signals import ignore_signals
from utils import DataFailure, reason


class _Workers(_MultiProcessingDataLoaderIter):
    """torch's, which can also be ended where only some of its workers could be started."""

    def __init__(self, loader: DataLoader):
        self._workers_status = [True] * loader.num_workers
        super().__init__(loader)


class Loader(DataLoader):
    """DataFailure where batches do not come: workers that cannot be started or have died, files
    that are gone. It is raised between two steps, so that the run can be saved.

    A worker that is killed leaves no half of a message, for which this process would wait without
    end: tensors go through shared memory, so a message is shorter than PIPE_BUF (4 096 bytes), and
    the kernel writes it whole or not at all.
    """

    def __iter__(self) -> Iterator[dict]:
        end = object()
        with self.failures():  # at the first batch: Lightning cannot end what did not begin
            batches = super().__iter__()
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever training is when a worker dies
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            with self.failures():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch

    def _get_iterator(self) -> Iterator[dict]:
        return _Workers(self) if self.num_workers else super()._get_iterator()

    @contextmanager
    def failures(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            runtime = isinstance(error, RuntimeError)
            if runtime and (not self.num_workers or str(error).startswith("Caught")):
                raise  # a bug, in this process or in a worker
            raise DataFailure(f"no batch came: {self.why(error)}") from error

    def why(self, error: Exception) -> str:
        line = None
        for worker in getattr(self._iterator, "_workers", ()):
            worker.join(0.5)  # the pipe of one that was killed may end before it
            if worker.exitcode and worker.exitcode > 1:  # see end_worker
                line = os.strerror(worker.exitcode)
            elif not worker.is_alive():
                return (
                    f"a data worker (process {worker.pid}) was ended from outside, perhaps for"
                    f" want of memory; try a smaller loader.num_workers={self.num_workers}"
                )
        if line is None and isinstance(error, OSError) and error.errno is not None:
            line = reason(error)
        if line is None:  # a worker's own error comes with its traceback
            line = (str(error).strip() or type(error).__name__).splitlines()[-1]
            line = line.partition(". Communication with")[0]  # torch's long advice
        return f"{line} (loader.num_workers={self.num_workers})"


def prepare_worker(worker: int) -> None:
    """Ignore signals: one that is sent to the whole job must not end the workers before the last
    steps are made. And use no threads in `tokenizers`: they do not survive a fork."""
    ignore_signals()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A batch goes through two threads of Python's multiprocessing. Where the worker has no file
    # descriptor left, each would print a traceback and drop it: the run would wait without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)
    sys.excepthook = lambda kind, error, trace: end_worker(error)


def end_worker(error: BaseException, message: object = None) -> NoReturn:
    """At once, for the run to notice. The exit code is the number of an error of the system, which
    torch writes at the end of a RuntimeError."""
    number = getattr(error, "errno", None) or re.search(r"\((\d{1,3})\)$", str(error))
    os._exit(int(number[1]) if isinstance(number, re.Match) else number or 1)
