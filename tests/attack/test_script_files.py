"""Files that scripts are given: whatever stands there, one line and exit code 2, nothing made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import ROOT, bounded

from scripts import (
    consolidate,
    draw_denoising,
    export_hf,
    inspect_checkpoint,
    plot_run,
    show_batch,
    train_tokenizer,
)
from scripts.support import plot_results

SCRIPTS = {
    "consolidate": (consolidate.main, ["x", "out.ckpt"]),
    "draw_denoising": (draw_denoising.main, ["x", "out.png", "--block-size", "4"]),
    "export_hf": (export_hf.main, ["x", "out"]),
    "inspect_checkpoint": (inspect_checkpoint.main, ["x"]),
    "plot_results": (plot_results.main, ["x", "out.png"]),
    "plot_run": (plot_run.main, ["x", "out.png"]),
    "a log": (plot_run.main, ["run", "out.png"]),
    "show_batch": (show_batch.main, ["data=files", "data.train=x", "data.valid=a.txt"]),
    "train_tokenizer": (
        train_tokenizer.main,
        ["data=files", "data.train=x", "--vocab_size", "300", "--out", "out"],
    ),
}
THINGS = {
    "a FIFO": os.mkfifo,
    "zeros": lambda path: os.symlink("/dev/zero", path),
    "a folder": os.mkdir,
    "a link to itself": lambda path: os.symlink(Path(path).name, path),
    "any bytes": lambda path: Path(path).write_bytes(bytes(range(256)) * 20),
    "zeros of 8 GB": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 8 << 30),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.usefixtures("_launch_folder")
def test_a_script_says_what_is_wrong(script, thing, monkeypatch, capsys):
    main, words = SCRIPTS[script]
    path = "x"
    Path("a.txt").write_text("A text.\n")
    if script == "a log":
        os.mkdir("run")
        path = "run/metrics.csv"
    THINGS[thing](path)
    before = {*Path().rglob("*")}
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with bounded(20):
        try:
            code = main()
        except SystemExit as stopped:
            code = stopped.code
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    lines = [each for each in said if not each.startswith(("note: ", "this run cannot"))]
    assert code == 2, said
    assert len(lines) == 1, said
    assert path.partition("/")[0] in lines[0]
    assert "[Errno" not in lines[0]
    assert {*Path().rglob("*")} == before


def test_lm_eval_without_its_package_is_one_line():
    import importlib.util

    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts/lm_eval.py")], capture_output=True, text=True
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "pip install -r" in line


def test_pictures_without_matplotlib_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = tmp_path / "metrics.csv"
    log.write_text("step,unix_time,trainer/loss\n1,1.0,3.0\n2,2.0,2.0\n")
    monkeypatch.setattr(sys, "argv", ["plot_run", str(tmp_path)])
    assert plot_run.main() == 2
    said = "the package matplotlib is not installed: pip install matplotlib\n"
    assert capsys.readouterr().err == said
