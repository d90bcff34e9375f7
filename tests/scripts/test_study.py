"""The study: every run once, differences between equal seeds and in equal time, and what failed is
named."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import settings
from scripts.support import jobs, study, study_report

RATE = {"muon": 2000.0, "clipped": 1000.0, "counts": 1010.0}  # tokens per second
NLL = {("muon", 1): 4.5, ("muon", 2): 4.2, ("clipped", 1): 4.0, ("clipped", 2): 4.1}
NLL |= {("counts", 1): 3.75, ("counts", 2): 3.95}


@pytest.fixture
def asked(monkeypatch):
    """The words of every main.py, which is not run: a training leaves its log, an evaluation its
    result. Seed 3 fails. Twice the steps gain 0.1 nats."""
    seen = []

    def run(command, env, **streams):
        words = dict(word.split("=", 1) for word in command[2:])
        seen.append(words | {"gpu": env.get("CUDA_VISIBLE_DEVICES")})
        folder, seed = Path(words["checkpointing.save_dir"]), int(words["seed"])
        if seed == 3 and "speed" not in folder.parts:
            return SimpleNamespace(returncode=1)
        variant = "clipped" if "training.resample" in words else words["training.noise"]
        folder.mkdir(parents=True)
        if words.get("mode") == "ppl_eval":
            gained = 0.1 * math.log2(int(words["trainer.max_steps"]) / 100)
            (folder / "ppl_x.json").write_text(json.dumps({"nll": NLL[variant, seed] - gained}))
            return SimpleNamespace(returncode=0)
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "unix_time", "throughput/tokens_per_second"])
            for step in range(20, 140, 20):  # the first steps compile
                writer.writerow([step, 1.0, RATE[variant] if step > 20 else 1.0])
        return SimpleNamespace(returncode=0)

    monkeypatch.setitem(study.VARIANTS, "muon", ("training.noise=muon",))
    monkeypatch.setattr(jobs.subprocess, "run", run)
    monkeypatch.setattr(study, "problems", lambda runs, more: [])  # this muon is none
    return seen


def rows(out):
    with (out / "study.csv").open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_differences_are_between_equal_seeds_and_in_equal_time(asked, tmp_path, capsys):
    command = ["--corpora", "shakespeare", "--sizes", "4", "--variants", "muon,clipped,counts"]
    command += ["--seeds", "1,2", "--steps", "100", "--out", str(tmp_path)]
    command += ["--", "optim.lr=5e-4"]
    assert study.main(command) == 0
    # 2 speeds; of `muon`, which is twice as fast, each seed once more; a training, an evaluation
    assert len(asked) == 2 + (3 + 1) * 2 * 2
    assert all(words["optim.lr"] == "5e-4" for words in asked)
    found = rows(tmp_path)
    muon = {name: float(found["muon"][name] or "nan") for name in study_report.COLUMNS[3:]}
    assert muon["nats"] == pytest.approx(4.35)
    assert muon["error"] == pytest.approx(0.15)
    assert muon["perplexity"] == pytest.approx(math.exp(4.35))
    assert muon["difference"] == pytest.approx(0.3)  # of .5 and .1
    assert muon["its error"] == pytest.approx(0.2)
    assert muon["steps in equal time"] == 200
    assert muon["nats then"] == pytest.approx(4.25)
    assert muon["difference then"] == pytest.approx(0.2)
    assert muon["error then"] == pytest.approx(0.2)
    assert muon["tokens/s"] == 2000
    assert found["clipped"]["difference"] == ""
    assert float(found["counts"]["difference then"]) == pytest.approx(-0.2)  # as fast: no other run
    assert "4.3500" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert study.main(command) == 0  # nothing is run again
    assert len(asked) == 18


def test_the_tables_can_be_made_from_the_list_of_runs(asked, tmp_path, monkeypatch):
    command = ["--corpora", "shakespeare", "--sizes", "4", "--variants", "muon,clipped"]
    assert study.main([*command, "--seeds", "1,2", "--out", str(tmp_path / "ran")]) == 0
    (tmp_path / "runs.csv").write_bytes((tmp_path / "ran" / "runs.csv").read_bytes())
    monkeypatch.setattr(study_report.sys, "argv", ["study_report.py", str(tmp_path)])
    assert study_report.main() == 0
    for name in ("runs.csv", "study.csv", "study.md"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "ran" / name).read_bytes()


def test_a_run_that_failed_is_named_and_the_others_go_on(asked, tmp_path, capsys):
    command = ["--corpora", "shakespeare", "--sizes", "16", "--variants", "muon"]
    assert study.main([*command, "--seeds", "3,1", "--out", str(tmp_path)]) == 1
    assert "shakespeare-S16-muon-seed3.log" in capsys.readouterr().err
    assert rows(tmp_path)["muon"]["seeds"] == "1"
    assert study.main([*command, "--seeds", "3", "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none" / "study.csv").exists()


def test_jobs_are_spread_over_the_gpus_and_speeds_are_measured_alone(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "devices", lambda: ["0", "1"])
    seen = []
    monkeypatch.setattr(study, "side_by_side", lambda todo, places, *_: seen.append(places) or [])
    monkeypatch.setattr(study, "timed_runs", lambda *_: [])
    args = ["--jobs", "5", "--out", str(tmp_path), "--variants", "muon", "--sizes", "4"]
    study.carry_out([], study.options().parse_args(args), [])
    assert seen == [["0", "1"], ["0", "1", "0", "1", "0"]]
    places = jobs.Path(tmp_path / "a")
    assert jobs.called(
        ["seed=1", "training.noise=muon", f"checkpointing.save_dir={places}"], places, "1"
    )
    assert asked[-1]["gpu"] == "1"


def test_one_network_for_all_sizes_is_trained_once_and_evaluated_at_each():
    (sizes,) = study.trainings("sizes", ["4", "16", "L"])
    run = study.Run("shakespeare", sizes, "sizes", 1, 50)
    assert run.name == "shakespeare-sizes-seed1"
    assert [*run.evaluations()] == ["4", "16", "L"]
    assert "block_size=128" in run.words((), "L")


RUNS = [
    study.Run("shakespeare", sizes, name, 1, 2500)
    for name in (*study.VARIANTS, *study.BESIDE)
    for sizes in study.trainings(name, ["4", "16", "L"])
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_is_a_command_that_can_start_and_whose_settings_have_an_effect(run):
    assert settings.examine(run.words())[1:] == ([], [])
    assert settings.examine(run.words(study.TRIAL))[1:] == ([], [])
    for size, asked in run.evaluations().items():
        evaluated = ["mode=ppl_eval", f"eval.checkpoint_path={__file__}", *asked]
        assert settings.examine(run.words(evaluated, size))[1] == []


@pytest.mark.parametrize(
    "wrong", [["--sizes", "0"], ["--sizes", "S"], ["--variants", "best"], ["--jobs", "0"]]
)
def test_what_is_wrong_is_said_before_any_run(wrong, asked, capsys):
    with pytest.raises(SystemExit) as caught:
        study.main(wrong)
    assert caught.value.code == 2
    assert wrong[1] in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "3"], "block_size=3 does not divide model.length=128"),
        (["--sizes", "4", "--", "model.hiden_size=32"], "model.hiden_size is not a setting"),
    ],
)
def test_settings_that_cannot_work_are_listed_before_any_run(
    words, said, tmp_path, monkeypatch, capsys
):
    ran = []
    monkeypatch.setattr(jobs.subprocess, "run", lambda *command, **more: ran.append(command))
    chosen = ["--variants", "clipped,counts", "--corpora", "shakespeare"]
    assert study.main(["--out", str(tmp_path), *chosen, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("this study cannot start:\n  - ")
    assert err.count(said) == 1
    assert ran == []


@pytest.mark.parametrize("steps", [1, 9, 20, 1999, 2500])
def test_the_warm_up_fits_into_a_run_of_any_length(steps):
    run = study.Run("shakespeare", ("4",), "counts", 1, steps)
    config, wrong, _ = settings.examine(run.words())
    assert wrong == []
    assert config.lr_scheduler.num_warmup_steps == min(200, steps // 10)


def test_what_is_wrong_is_shown_without_effect(asked, capsys):
    with pytest.raises(SystemExit):
        study.main(["--variants", "\x1b[31m"])
    assert "--variants: \\x1b[31m is none of" in capsys.readouterr().err


def test_a_place_that_is_no_folder_is_refused(asked, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert study.main(["--out", str(tmp_path / "file")]) == 2
    assert f"--out={tmp_path / 'file'}" in capsys.readouterr().err
    assert asked == []
