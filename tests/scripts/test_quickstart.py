"""scripts/quickstart.sh in miniature: the whole way, again, and after being killed."""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import Run, write_text

import main

ROOT = Path(__file__).parents[2]
STEPS, LENGTH = 12, 16
HEADINGS = ["== train", "== evaluate", "== write texts", "== report"]
# In place of Python: hands its words to the test, and ends as the test says
STAND_IN = """#!/bin/bash
[[ $1 == -c ]] && exit
printf '%s\\n' "${*@Q}" >asked
read -r status <answer
exit "$status"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the two shell scripts, as they work beside themselves, and a stand-in Python:
    what it is to run is forked from this process, which has imported all of it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("quickstart.sh", "setup.sh"):
        (folder / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    for name in ("asked", "answer"):
        os.mkfifo(folder / name)
    write_text(folder / "train.txt", 2000, 1)
    write_text(folder / "valid.txt", 60, 2)
    return folder


def tiny(folder) -> list[str]:
    return [
        *("data=files", f"data.train={folder / 'train.txt'}", f"data.valid={folder / 'valid.txt'}"),
        "data.tokenizer_name_or_path=text8",
        f"data.cache_dir={folder / 'cache'}",
        *("model.length=16", "model.hidden_size=16", "model.cond_dim=8"),
        *("model.n_blocks=1", "model.n_heads=2"),
        *(f"trainer.max_steps={STEPS}", "trainer.val_check_interval=6"),
        *("trainer.log_every_n_steps=2", "lr_scheduler.num_warmup_steps=2"),
        "trainer.accelerator=cpu",
        "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
    ]


def report(arguments) -> int:
    from scripts.support import quickstart_report

    return quickstart_report.main(arguments)


PROGRAMS = {"main.py": main.main, "scripts/support/quickstart_report.py": report}


class Quickstart:
    """The script as a process, in a group of its own so that it can be killed as a whole."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        self.log.write_text("")
        with self.log.open("a") as log:
            self.script = subprocess.Popen(
                ["bash", folder / "scripts/quickstart.sh", *tiny(folder)],
                env=os.environ | {"BAMDLM_PYTHON": str(folder / "python")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def next_program(self) -> Run:
        program, *arguments = shlex.split((self.folder / "asked").read_text())
        return Run(
            arguments,
            self.log,
            program=PROGRAMS[program],
            before=lambda: os.chdir(self.folder),
            environment={"CUDA_VISIBLE_DEVICES": ""},
        )

    def kill(self) -> None:
        if self.script.poll() is None:
            os.killpg(self.script.pid, signal.SIGKILL)
        self.script.wait()


def finished(folder) -> str:
    """The output. 12 steps do not beat the unigram model, and the script says so: exit code 1."""
    quickstart = Quickstart(folder)
    try:
        for _ in HEADINGS:
            status = quickstart.next_program().wait()
            (folder / "answer").write_text(f"{status}\n")
            if status:
                break
        code = quickstart.script.wait(60)
    finally:
        quickstart.kill()
    out = quickstart.log.read_text()
    assert "Traceback" not in out
    assert code == 1, out
    assert "NOT below half of it" in out
    assert [line for line in out.splitlines() if line.startswith("==")] == [
        next(line for line in out.splitlines() if line.startswith(h)) for h in HEADINGS
    ]
    return out


def killed_in_training(folder) -> None:
    quickstart = Quickstart(folder)
    try:
        training = quickstart.next_program()
        first = folder / "outputs/quickstart/checkpoints/step=2.ckpt"
        end = time.monotonic() + 300
        while not first.exists():
            assert training.poll() is None, training.text()
            assert time.monotonic() < end
            time.sleep(0.002)
        training.send(signal.SIGKILL)
        training.wait()
    finally:
        quickstart.kill()
    assert "== evaluate" not in quickstart.log.read_text()


def test_killed_gone_on_with_and_run_again(place):
    killed_in_training(place)
    out = finished(place)
    reached = int(re.search(r"going on from step (\d+)", out)[1])
    assert 2 <= reached <= STEPS
    assert not list(place.glob("outputs/**/*.tmp*"))
    report = out.partition("== report")[2]
    assert "BAM-DLM, block size 4: 12 steps of 8 x 16 tokens" in report
    for name in (
        r"validation perplexity +[\d.]+ ± [\d.]+, upper bound",
        r"unigram model +[\d.]+;",
        r"bits per character +[\d.]+",
        r"training +[\d,]+ tokens/s",
        r"sampling +\d+ network evaluations \(NFE\) per text, +[\d,]+ tokens/s",
        rf"text length +512 tokens, {512 // LENGTH} x the training context",
    ):
        assert re.search(name, report), name
    picture = place / re.search(r"curves +(\S+)", report)[1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    texts = place / re.search(r"texts +(\S+)", report)[1]
    with texts.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert "\n  | " in report

    made = {p: p.stat().st_mtime_ns for p in (*place.glob("outputs/**/*.ckpt"), texts)}
    again = finished(place)
    assert f"going on from step {STEPS}" in again
    assert "nothing to do" in again
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert figures(again) == figures(out)


def figures(out) -> list[str]:
    """The lines of the report that do not depend on the clock."""
    names = ("validation", "unigram", "bits", "text length")
    return [line for line in out.splitlines() if line.strip().startswith(names)]
