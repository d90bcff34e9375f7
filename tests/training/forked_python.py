"""A `python` for jobs that need no interpreter of their own: forks of a process that has imported
everything. An interpreter takes seconds to import it, and jobs of Slurm start one per task.

The program that stands for python sends its words, folder, environment and open files through a
socket, and ends as the fork that gets them ends.
"""

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from runs import prepare_forks

from training.signals import HEARD

CLIENT = """\
#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
server.sendall(asked)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(process, number))
code = int(answers.readline() or 70)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def forked_python(groups: tuple[str, ...] = ()):
    """The path of that program, which serves until the end of the block. groups: of settings, which
    are composed once for all."""
    prepare_forks(list(groups))
    # a folder of its own: the name of a socket has at most 107 bytes
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address, program = Path(folder, "socket"), Path(folder, "python")
        program.write_text(CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        listener.bind(str(address))
        listener.listen(64)
        server = os.fork()
        if server == 0:
            _serve(listener)
        try:
            yield program
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)


def _serve(listener: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while True:
        asker, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _answer(asker)
            finally:
                os._exit(0)
        asker.close()


def _answer(asker: socket.socket) -> None:
    head, files, _, _ = socket.recv_fds(asker, 4, 3)
    asked = json.loads(asker.makefile("rb").read(int.from_bytes(head, "big")))
    process = os.fork()
    if process == 0:
        asker.close()
        _become(files, *asked)
    asker.sendall(f"{process}\n".encode())
    _, status = os.waitpid(process, 0)
    asker.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(files: list[int], words: list[str], place: str, environment: dict[str, str]) -> None:
    """What python -u SCRIPT WORDS does, in this process; it does not return."""
    status = 70
    try:
        for descriptor, file in enumerate(files):
            os.dup2(file, descriptor)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        for number in HEARD:
            signal.signal(number, signal.SIG_DFL)
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(1)
        option, script, *rest = words
        assert option == "-u", words
        sys.argv = [script, *rest]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
