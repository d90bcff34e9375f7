"""Runs of main.py as processes of their own: forked, so that nothing has to be imported again."""

import faulthandler
import fcntl
import functools
import importlib
import os
import pty
import runpy
import shutil
import signal
import socket
import sys
import termios
import time
import traceback
from pathlib import Path

import torch

import main
import settings
from checkpointing import torch_file
from settings.overrides import parse
from training.signals import HEARD

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("one", "two", "three", "four", "night", "day", "king", "queen", "love", "war", "time")
TIMEOUT = 120.0
IMPORTED = ["modes.cli", "modes.train", "modes.ppl_eval", "modes.sample_eval"]
IMPORTED += ["objectives.autoregressive", "objectives.sedd", "torch._dynamo", "s3fs"]
IMPORTED += ["torch.distributed.algorithms.ddp_comm_hooks"]


def ends_with_2(words, capsys) -> str:
    """What a command that must be refused says, run in this process."""
    capsys.readouterr()
    try:
        code = main.main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    return capsys.readouterr().err


def write_text(path, count, seed):
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, len(WORDS), (count,), generator=generator).tolist()
    path.write_text(" ".join(WORDS[i] for i in picked))
    return path


def tiny(folder: Path) -> list[str]:
    """Overrides of a run that takes seconds: 10 steps of two micro-batches, dropout at work."""
    return [
        "data=files",
        f"data.train={write_text(folder / 'train.txt', 2000, 1)}",
        f"data.valid={write_text(folder / 'valid.txt', 32, 2)}",
        "data.tokenizer_name_or_path=text8",
        f"data.cache_dir={folder / 'cache'}",
        "model=tiny",
        "model.length=16",
        "model.hidden_size=16",
        "model.cond_dim=8",
        "model.n_blocks=2",
        "model.n_heads=2",
        "model.dropout=0.2",
        "loader.global_batch_size=8",
        "loader.batch_size=4",
        "loader.eval_batch_size=4",
        "loader.num_workers=0",
        "optim.lr=1e-2",
        "lr_scheduler.num_warmup_steps=2",
        "trainer.max_steps=10",
        "trainer.val_check_interval=8",
        "trainer.num_sanity_val_steps=0",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "trainer.enable_model_summary=false",
        "callbacks.checkpoint_every_n_steps.every_n_train_steps=4",
        "wandb=null",
    ]


def tiny_of_checkpoint(folder: Path) -> list[str]:
    """The same, but for the tokenizer and the dropout, which go with a checkpoint."""
    return [word for word in tiny(folder) if "tokenizer" not in word and "dropout" not in word]


LAST = "run/checkpoints/last.ckpt"
ALGORITHMS = {
    "ar": ["algo=ar"],
    "bamdlm": ["algo=bamdlm", "block_size=4", "algo.clip_search_widths=[0.5]"],
    "mdlm": ["algo=mdlm"],
    "sedd": ["algo=sedd"],
}
COUNTS = ["block_size=4", "training.noise=counts", "training.count_law=learnt"]


def prepare_forks(words: list[str]) -> None:
    """Do once, here, what every run would do anew: import, read these words, and compose the groups
    of settings among them."""
    _import_and_compose(tuple(word for word in words if "." not in word.partition("=")[0]))
    parse(words)


@functools.cache
def _import_and_compose(groups: tuple[str, ...]) -> None:
    for name in IMPORTED:
        try:  # Lightning imports s3fs where it is installed
            importlib.import_module(name)
        except ImportError:
            assert name == "s3fs"
    settings.examine(list(groups))


def take_terminal(screen: int) -> None:
    """In a new process: `screen` becomes its terminal, whose keys send it signals."""
    os.setsid()
    fcntl.ioctl(screen, termios.TIOCSCTTY, 0)


class Run:
    """One process. `before` is called in it ahead of `program`; `environment` is added to its own.

    Without a log it runs in a terminal, of which `screen` is the other side.
    """

    def __init__(
        self,
        arguments,
        log: Path | None,
        *,
        program=main.main,
        before=None,
        environment=None,
    ):
        self.log, self.program = log, program
        prepare_forks(list(map(str, arguments)))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid, self.screen = pty.fork() if log is None else (os.fork(), None)
        if self.pid == 0:
            self._child(arguments, before, environment or {})

    def _child(self, arguments, before, environment):
        status = 70
        try:
            if self.log is not None:
                output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            faulthandler.enable(sys.stderr)  # of the parent it would write elsewhere
            for number in HEARD:
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(environment)
            torch.set_num_threads(1)
            if before is not None:
                before()
            status = self.program(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def send(self, number):
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, timeout=TIMEOUT) -> int:
        """The exit code, negative for a signal."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if (code := self.poll()) is not None:
                return code
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"no end after {timeout} s:\n{self.text()}")

    def wait_for(self, path, timeout=TIMEOUT):
        end = time.monotonic() + timeout
        while not Path(path).exists():
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)

    def text(self) -> str:
        return self.log.read_text() if self.log is not None else "in a terminal"


def run(arguments, log: Path, timeout=TIMEOUT, **kwargs) -> tuple[int, str]:
    """A run from start to end: its exit code, and what it printed."""
    begin = log.stat().st_size if log.exists() else 0
    process = Run(arguments, log, **kwargs)
    return process.wait(timeout), log.read_bytes()[begin:].decode()


def in_a_copy(folder: Path, script: str, arguments=()) -> tuple[int, str]:
    """A script of a copy of the project: its exit code, and what it printed. The process is forked
    and forgets this project's modules, so that no library has to be imported again."""
    place = folder.with_name("in_the_copy.py")
    place.write_text(script)

    def program(arguments):
        os.chdir(folder)
        sys.path[:] = [str(folder), str(folder / "tests"), *(p for p in sys.path if not ours(p))]
        for name, module in list(sys.modules.items()):
            if ours(getattr(module, "__file__", None) or sys.prefix):
                del sys.modules[name]
        sys.argv = [str(place), *arguments]
        runpy.run_path(str(place), run_name="__main__")
        return 0

    return run(list(arguments), folder.with_name("log.txt"), program=program)


def ours(path: str) -> bool:
    """A file or folder of this project, and not of its environment."""
    place = Path(path).absolute()
    return place.is_relative_to(ROOT) and ".venv" not in place.relative_to(ROOT).parts


def ranks(count: int, arguments, log: Path, *, before=None) -> list[Run]:
    """A run of `count` processes, as torchrun would start them. `before` is told the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(count):
        environment = {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        step = None if before is None else lambda rank=rank: before(rank)
        place = log.with_name(f"{log.stem}-{rank}{log.suffix}")
        runs.append(Run(arguments, place, before=step, environment=environment))
    return runs


def finish(runs: list[Run], timeout=TIMEOUT) -> list[int]:
    return [each.wait(timeout) for each in runs]


class Wholes:
    """Runs that nothing disturbed, each made once: what runs that were stopped are compared with.

    The run folder is gone again when a test gets one, so that others train in the same place.
    """

    def __init__(self, folder: Path):
        self.folder, self.base, self.made = folder, tiny(folder), {}

    def __call__(self, algo: str) -> tuple[list[str], Path, dict]:
        """(overrides, folder of run/ and log, the last checkpoint)."""
        folder = self.folder / algo
        overrides = [
            *self.base,
            *(ALGORITHMS | {"counts": COUNTS})[algo],
            f"checkpointing.save_dir={folder / 'run'}",
        ]
        if algo not in self.made:
            folder.mkdir()
            code, text = run(overrides, folder / "log")
            assert code == 0, text
            self.made[algo] = read(folder / LAST)
        shutil.rmtree(folder / "run", ignore_errors=True)
        return overrides, folder, self.made[algo]


def read(path: Path) -> dict:
    """A checkpoint as plain containers."""
    with path.open("rb") as file:
        return torch_file.load(file, str(path))


def differences(ours, theirs, path: str = "") -> list[str]:
    """Where two checkpoints, as plain containers, are not the same bit for bit."""
    if type(ours) is not type(theirs):
        return [f"{path}: {type(ours).__name__}, {type(theirs).__name__}"]
    if isinstance(ours, dict):
        if list(ours) != list(theirs):
            return [f"{path}: keys {list(ours)}, {list(theirs)}"]
        pairs = [(key, ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return [f"{path}: {len(ours)} entries, {len(theirs)}"]
        pairs = [(i, ours[i], theirs[i]) for i in range(len(ours))]
    elif isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if same and ours.numel():
            bits = (x.contiguous().flatten().view(torch.uint8) for x in (ours, theirs))
            same = torch.equal(*bits)
        return [] if same else [f"{path}: tensors"]
    else:
        return [] if ours == theirs else [f"{path}: {ours}, {theirs}"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{path}/{key}")]


def equal_states(a, b):
    """Weights, averages, moments: equal but for the order of sums."""
    assert a.keys() == b.keys()
    assert a["loops"]["fit_loop"].keys() == b["loops"]["fit_loop"].keys()
    assert list(a["state_dict"]) == list(b["state_dict"])
    for name, value in b["state_dict"].items():
        close(a["state_dict"][name], value, name)
    for x, y in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True):
        close(x, y, "ema")
    assert a["ema"]["num_updates"] == b["ema"]["num_updates"]
    mine, other = (state["optimizer_states"][0] for state in (a, b))
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for key, moments in other["state"].items():
        for name, value in moments.items():
            close(mine["state"][key][name], value, name)
    assert differences(a["sampler"], b["sampler"]) == []
    assert differences(a["lr_schedulers"], b["lr_schedulers"]) == []


def close(x, y, name):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


def goes_on_to_the_same_end(overrides: list[str], folder: Path, expected: dict) -> str:
    """Asserts it of a run that was stopped; what the rest of it printed."""
    code, text = run(overrides, folder / "log")
    assert code == 0, text
    assert differences(read(folder / LAST), expected) == []
    return text


def at_call(owner, name: str, number: int, act):
    """Patch for a new process: `act` happens as call `number` of owner.name begins."""
    real, calls = getattr(owner, name), [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            act()
        return real(*args, **kwargs)

    return lambda: setattr(owner, name, counting)


def tell(number: int, times: int = 1):
    """The process sends itself a signal."""

    def act():
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act
