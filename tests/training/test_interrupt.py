"""Ctrl-C in a real terminal: one line at once, a save between two steps, and the run goes on. And a
signal that a library has taken for itself."""

import ctypes
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from runs import LAST, TIMEOUT, Run, at_call, differences, read, run, tell

from checkpointing import torch_file
from diffusion import Diffusion
from modes.evaluator import Evaluator
from samplers.canvas import Canvas
from training import signals

ROOT = Path(__file__).parents[2]
WORKERS = "loader.num_workers=2"  # they get the signals as well; the last part runs without
CTRL_C = b"\x03"
HERE = "the moment has come"
FIRST = "Ctrl-C: saving between two steps, then stopping; press again to stop at once"
AGAIN = "stopped at once; the same command goes on from the last checkpoint, if any"


def until(screen: int, ready) -> str:
    """What appears on a terminal until ready(text), or until the last process has left it."""
    text, end = b"", time.monotonic() + TIMEOUT
    while not ready(text.decode(errors="replace")):
        assert time.monotonic() < end, text.decode(errors="replace")
        if not select.select([screen], [], [], 0.05)[0]:
            continue
        try:
            text += os.read(screen, 65536)
        except OSError:  # nobody is left
            break
    return text.decode(errors="replace")


def at_moment(arguments, folder, owner, name, call):
    """A run in a terminal that waits as call `call` of owner.name begins, and the file that lets it
    go on."""
    known = folder / "pressed"
    known.unlink(missing_ok=True)
    real, calls = getattr(owner, name), [0]

    def waiting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            print(HERE)
            while not known.exists():
                time.sleep(0.005)
        return real(*args, **kwargs)

    def before():
        setattr(owner, name, waiting)
        signals.end_on_interrupt()

    process = Run(arguments, None, before=before)
    until(process.screen, lambda text: HERE in text)
    return process, known


def pressed(arguments, folder, owner, name, call, times=1):
    """A run with Ctrl-C pressed, `times` times, as call `call` of owner.name begins: (exit code,
    the text from then on)."""
    process, known = at_moment(arguments, folder, owner, name, call)
    text = ""
    for _ in range(times - 1):
        os.write(process.screen, CTRL_C)
        text += until(process.screen, lambda text: FIRST in text)
    os.write(process.screen, CTRL_C)
    known.touch()
    text += until(process.screen, lambda text: False)
    os.close(process.screen)
    return process.wait(), text


def test_a_terminal_that_is_closed_stops_the_run_as_sigterm_does(wholes):
    overrides, folder, expected = wholes("bamdlm")
    process, known = at_moment([*overrides, WORKERS], folder, Diffusion, "training_step", 5)
    os.close(process.screen)
    known.touch()
    assert process.wait() == signals.GO_ON
    assert read(folder / LAST)["global_step"] == 3
    code, text = run(overrides, folder / "log")
    assert code == 0, text
    assert differences(read(folder / LAST), expected) == []


def test_ctrl_c_saves_stops_and_goes_on_to_the_same_end(wholes):
    """Each time the next run goes on."""
    overrides, folder, expected = wholes("bamdlm")
    with_workers = [*overrides, WORKERS]

    def step():
        return read(folder / LAST)["global_step"]

    sanity = [*with_workers, "trainer.num_sanity_val_steps=2"]
    code, text = pressed(sanity, folder, Diffusion, "validation_step", 1)
    assert code == signals.BY_HAND, text
    assert text.count(FIRST) == 1
    assert "stopping at step 0 on SIGINT: nothing to save yet" in text

    code, text = pressed(with_workers, folder, Diffusion, "training_step", 4)  # the second half
    assert (code, step()) == (signals.BY_HAND, 2), text
    assert text.count(FIRST) == 1
    assert "stopping at step 2 on SIGINT: saved" in text

    code, text = pressed(with_workers, folder, Diffusion, "training_step", 2, times=2)
    assert (code, step()) == (-signal.SIGINT, 2), text
    assert AGAIN in text

    code, text = pressed(with_workers, folder, torch_file.torch, "save", 1)  # of step 4
    assert (code, step()) == (signals.BY_HAND, 4), text
    assert text.count(FIRST) == 1

    code, text = pressed(with_workers, folder, Diffusion, "validation_step", 1)
    assert (code, step()) == (signals.BY_HAND, 4), text
    assert "Traceback" not in text

    code, text = run(overrides, folder / "log")
    assert code == 0, text
    assert differences(read(folder / LAST), expected) == []


def test_a_reader_that_ctrl_c_ends_as_well_does_not_keep_the_run_from_saving(wholes):
    """As in `python main.py … 2>&1 | tee log`."""
    overrides, folder, _ = wholes("bamdlm")
    save_dir = f"checkpointing.save_dir={folder / 'piped' / 'run'}"

    def press():
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(reader)
        os.kill(os.getpid(), signal.SIGINT)

    before = at_call(Diffusion, "training_step", 4, press)
    code, text = run([*overrides, WORKERS, save_dir], folder / "log", before=before)
    assert code == signals.BY_HAND, text
    assert read(folder / "piped" / LAST)["global_step"] == 2


def test_a_signal_that_a_library_takes_for_itself_stops_what_runs(wholes):
    """A compiler may take it in the first step, behind Python's back: Slurm's warning."""
    overrides, folder, _ = wholes("bamdlm")
    run_folder = folder / "taken" / "run"
    evaluate = [f"eval.checkpoint_path={folder / 'taken' / LAST}", "loader.eval_batch_size=1"]
    unjudged = ["eval.gen_ppl_eval_model_name_or_path=null", f"sampling.logdir={folder / 'texts'}"]
    libc, ignore = ctypes.CDLL(None), 1  # SIG_IGN of signal.h
    for owner, name, code, words in (
        (Diffusion, "training_step", signals.GO_ON, []),
        (Evaluator, "validation_step", -signal.SIGUSR1, ["mode=ppl_eval", *evaluate]),
        (Canvas, "evaluate", -signal.SIGUSR1, ["mode=sample_eval", *evaluate, *unjudged]),
    ):

        def before(owner=owner, name=name):
            at_call(owner, name, 2, lambda: libc.signal(signal.SIGUSR1, ignore))()
            at_call(owner, name, 5, tell(signal.SIGUSR1))()

        words = [*overrides, f"checkpointing.save_dir={run_folder}", *words]
        ended, text = run(words, folder / "log", before=before)
        assert ended == code, text


def test_ctrl_c_while_importing_ends_the_process_with_one_line(wholes):
    """An exception could be swallowed by what is being imported, and the run would go on."""
    overrides, folder, _ = wholes("bamdlm")
    mine, screen = pty.openpty()
    command = [
        sys.executable,
        "main.py",
        *overrides,
        WORKERS,
        f"checkpointing.save_dir={folder / 'other'}",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        preexec_fn=lambda: runs.take_terminal(screen),
    )
    os.close(screen)
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        process.kill()
        pytest.skip("no /proc to tell what is being imported")
    end = time.monotonic() + TIMEOUT
    while "libtorch_cpu" not in maps.read_text():
        assert time.monotonic() < end
        time.sleep(0.005)
    os.write(mine, CTRL_C)
    text = until(mine, lambda text: False)
    os.close(mine)
    assert process.wait() == -signal.SIGINT, text
    assert text.replace(signals.SHOW_CURSOR.decode(), "").split() == ["^C", "stopped"]
    assert not (folder / "other").exists()
