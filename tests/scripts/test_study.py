"""The study: every run once, differences between equal seeds, and what failed is named."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import settings
from scripts.support import study

RATE = {"full": 2000.0, "clipped": 1000.0}  # tokens per second
NLL = {("full", 1): 4.5, ("full", 2): 4.2, ("clipped", 1): 4.0, ("clipped", 2): 4.1}
FOR_THE_TABLE = {"loader.global_batch_size": 10, "model.length": 100}


@pytest.fixture
def asked(monkeypatch):
    """The words of every main.py, which is not run: a training leaves its log, an evaluation its
    result. Seed 3 fails."""
    seen = []

    def run(command, **streams):
        words = dict(word.split("=", 1) for word in command[2:])
        seen.append(words)
        folder, seed = Path(words["checkpointing.save_dir"]), int(words["seed"])
        if seed == 3:
            return SimpleNamespace(returncode=1)
        variant = "clipped" if "training.resample" in words else "full"
        if words.get("mode") == "ppl_eval":
            (folder / "ppl_x.json").write_text(json.dumps({"nll": NLL[variant, seed]}))
            return SimpleNamespace(returncode=0)
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(FOR_THE_TABLE))
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "unix_time", "throughput/tokens_per_second", "val/nll"])
            for step in (10, 20):  # 1 000 tokens a step
                writer.writerow([step, 1.0, RATE[variant], NLL[variant, seed] + 2 / step])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run)
    return seen


def rows(out):
    with (out / "study.csv").open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_differences_are_between_equal_seeds_and_equal_times(asked, tmp_path, capsys):
    command = ["--corpora", "shakespeare", "--sizes", "4", "--variants", "full,clipped"]
    command += ["--seeds", "1,2", "--out", str(tmp_path), "--", "optim.lr=5e-4"]
    assert study.main(command) == 0
    assert len(asked) == 2 * 2 * 2
    assert all(words["optim.lr"] == "5e-4" for words in asked)
    found = rows(tmp_path)
    full = {name: float(found["full"][name] or "nan") for name in study.COLUMNS[3:]}
    assert full["nats"] == pytest.approx(4.35)
    assert full["error"] == pytest.approx(0.15)
    assert full["perplexity"] == pytest.approx(math.exp(4.35))
    assert full["difference"] == pytest.approx(0.3)  # of .5 and .1
    assert full["its error"] == pytest.approx(0.2)
    # in 10 s `full` made 20 steps, `clipped` 10
    assert full["equal time"] == pytest.approx(4.35 + 0.1)
    assert full["its difference"] == pytest.approx(0.3 - 0.1)
    assert full["tokens/s"] == 2000
    assert found["clipped"]["difference"] == ""
    assert "4.3500" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert study.main(command) == 0  # nothing is run again
    assert len(asked) == 8


def test_a_run_that_failed_is_named_and_the_others_go_on(asked, tmp_path, capsys):
    command = ["--corpora", "shakespeare", "--sizes", "16", "--variants", "full"]
    assert study.main([*command, "--seeds", "3,1", "--out", str(tmp_path)]) == 1
    assert "shakespeare-S16-full-seed3.log" in capsys.readouterr().err
    assert rows(tmp_path)["full"]["seeds"] == "1"
    assert study.main([*command, "--seeds", "3", "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none" / "study.csv").exists()


RUNS = [study.Run("shakespeare", size, name, 1) for size in ("4", "L") for name in study.VARIANTS]
RUNS += [study.Run("shakespeare", "", name, 1) for name in study.BESIDE]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_is_a_command_that_can_start_and_whose_settings_have_an_effect(run):
    assert settings.examine(run.words([]))[1:] == ([], [])
    evaluated = ["mode=ppl_eval", f"eval.checkpoint_path={__file__}", *run.likelihood()]
    assert settings.examine(run.words(evaluated))[1] == []


@pytest.mark.parametrize(
    "wrong", [["--sizes", "0"], ["--sizes", "S"], ["--variants", "best"], ["--jobs", "0"]]
)
def test_what_is_wrong_is_said_before_any_run(wrong, asked, capsys):
    with pytest.raises(SystemExit) as caught:
        study.main(wrong)
    assert caught.value.code == 2
    assert wrong[1] in capsys.readouterr().err
    assert asked == []
