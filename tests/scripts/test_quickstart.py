"""scripts/quickstart.sh in miniature: the whole way, again, and after being killed."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import write_text

ROOT = Path(__file__).parents[2]
STEPS, LENGTH = 12, 16
HEADINGS = ["== train", "== evaluate", "== write texts", "== report"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the project's files, as the script writes to outputs/ beside itself."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("config", "configs", "models", "objectives", "samplers", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
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


def start(folder) -> subprocess.Popen:
    """A process group of its own, so that it can be killed as a whole."""
    return subprocess.Popen(
        ["bash", folder / "scripts/quickstart.sh", *tiny(folder)],
        env={
            **os.environ,
            "BAMDLM_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(folder) -> str:
    """The output. 12 steps do not beat the unigram model, and the script says so: exit code 1."""
    process = start(folder)
    try:
        out, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in out
    assert process.returncode == 1, out
    assert "NOT below half of it" in out
    assert [line for line in out.splitlines() if line.startswith("==")] == [
        next(line for line in out.splitlines() if line.startswith(h)) for h in HEADINGS
    ]
    return out


def killed_in_training(folder) -> None:
    process = start(folder)
    try:
        first = folder / "outputs/quickstart/checkpoints/step=2.ckpt"
        end = time.monotonic() + 300
        while not first.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    out, _ = process.communicate()
    assert "== evaluate" not in out


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
