"""-m: several command lines in one. What is started here is mostly a small program that does what
its seed says; the slow test trains."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ALGORITHMS, Run, ends_with_2, run, tiny

import main
from modes import launching, multirun, slurm
from scripts import compare
from training.log_reading import read_log

# seed=N exits with N; seed=9 is killed; seed=100 waits for two signals and exits with 75 or 130
PROGRAM = """
import os, pathlib, signal, sys, time
seed = int(sys.argv[-1].partition("=")[2])
print("words:", *sys.argv[1:], flush=True)
if seed == 9:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 100:
    heard = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
    pathlib.Path("ready").touch()
    end = time.monotonic() + 20
    while len(heard) < int(os.environ["SIGNALS"]) and time.monotonic() < end:
        time.sleep(0.01)
    print("heard:", *heard, flush=True)
    sys.exit(75)
sys.exit(seed)
"""
LONG = 600.0  # seconds, of a machine that has much else to do
SMALL = ["data=shakespeare", "wandb=null", "model=tiny", "algo=ar"]


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch, _launch_folder):
    monkeypatch.setattr("settings.defaults.visible_gpus", lambda: 0)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(launching, "MAIN", path)


def test_every_job_runs_in_a_process_of_its_own_and_the_table_says_how_it_ended(capfd):
    assert main.main(["-m", *SMALL, "seed=0,3,9,0", "trainer.max_steps=5,6", "seed=0,3,9"]) == 2
    capfd.readouterr()
    assert main.main([*SMALL, "-m", "seed=0,3,9,4"]) == 1
    said, wrong = (each.splitlines() for each in capfd.readouterr())
    assert wrong == ["3 of 4 jobs are not done: 2, 3, 4"]
    words = " ".join(SMALL)
    assert said[:8:2] == [f"job {n} of 4: seed={s}" for n, s in ((1, 0), (2, 3), (3, 9), (4, 4))]
    assert said[1:8:2] == [f"words: {words} seed={s}" for s in (0, 3, 9, 4)]
    assert [line.split()[:3] for line in said[8:]] == [
        ["job", "overrides", "exit"],
        ["1", "seed=0", "0"],
        ["2", "seed=3", "3"],
        ["3", "seed=9", "SIGKILL"],
        ["4", "seed=4", "4"],
    ]
    assert main.main([*SMALL, "seed=0", "-m"]) == 0


@pytest.mark.parametrize(
    ("sent", "heard", "code"),
    [
        ([signal.SIGTERM], "SIGTERM", 75),
        ([signal.SIGUSR1], "SIGTERM", 75),
        ([signal.SIGINT], "SIGTERM", 130),
        ([signal.SIGINT, signal.SIGINT], "SIGTERM SIGINT", 130),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGINT", "SIGINT twice"],
)
def test_a_signal_ends_the_job_that_runs_and_starts_no_other(tmp_path, sent, heard, code):
    log = tmp_path / "log"
    several = {"SIGNALS": str(len(sent))}
    process = Run(["-m", *SMALL, "seed=0,100,1"], log, environment=several)
    process.wait_for(tmp_path / "ready")
    for number in sent:
        process.send(number)
        time.sleep(0.1)
    assert process.wait() == code
    said = log.read_text()
    assert f"heard: {heard}\n" in said
    assert f"{sent[0].name}: stopped; the same command goes on" in said
    assert "job 3 of 3" not in said
    assert [line.split()[:3] for line in said.splitlines()[-3:]] == [
        ["1", "seed=0", "0"],
        ["2", "seed=100", "75"],
        ["3", "seed=1", "-"],
    ]


def test_where_it_is_killed_the_job_that_runs_is_told_to_stop(tmp_path):
    log = tmp_path / "log"
    process = Run(["-m", *SMALL, "seed=100,1"], log, environment={"SIGNALS": "1"})
    process.wait_for(tmp_path / "ready")
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    end = time.monotonic() + LONG
    while "heard: SIGTERM" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


# words: what the problems say
REFUSED = {
    "algo=bamdlm seed=1,x block_size=1,3": [
        "block_size=3 does not divide model.length=1024 (in seed=1 block_size=3; seed=x block_size",
        "seed=x must be a whole number (in seed=x block_size=1; seed=x block_size=3)",
    ],
    "seed=1,2 modle=3": ["modle is not a setting."],
    "seed=1,2 checkpointing.save_dir=x": [
        "checkpointing.save_dir=x is the same in seed=1; seed=2, and they would write over each"
        " other: put what differs into it, as in 'checkpointing.save_dir=x-${seed}'"
    ],
    "loader.num_workers=range(0,5)": ["num_workers=2; 2 more, and they would write over each"],
    "algo=ar,mdlm checkpointing.save_dir=x": ["as in 'checkpointing.save_dir=x-${algo.name}'"],
    "mode=ppl_eval eval.checkpoint_path=org/x eval.draws=1,2": ["checkpointing.save_dir=outputs/"],
    "mode=ppl_eval eval.checkpoint_path=org/x eval.likelihood=counts,exact": [
        "'; or leave -m out, and give eval.likelihood=[counts,exact]"
    ],
    "mode=sample_eval eval.checkpoint_path=org/x seed=1,2 sampling.trajectory=a.html": [
        "'sampling.trajectory=a.html-${seed}'"
    ],
    "hydra/launcher=submitit_slurm hydra.launcher.timeout_min=2 seed=1,2": [
        "submitit_slurm: submitit is not installed",
        "submitit_slurm: there is no Slurm here",
        "timeout_min=2 leaves no time for work: Slurm may tell a job 150 seconds before its limit",
    ],
    "seed=1,2 --cfg job": ["--cfg shows one run: leave -m out"],
    "mode=demo eval.checkpoint_path=org/x seed=1,2": [
        "gradio is not installed",
        "mode=demo serves a page until it is told to end: leave -m out",
    ],
    "seed=glob(*)": ["seed=glob(*): glob is for a group"],
    "hydra/launcher=submitit_slurm seed=1,2": [
        "submitit_slurm: submitit is not installed: pip install -r requirements-submitit.txt",
        "submitit_slurm: there is no Slurm here (sbatch, srun, squeue, scontrol not found)",
        "submitit_slurm needs hydra.launcher.timeout_min=MINUTES",
    ],
}


@pytest.mark.parametrize("words", REFUSED)
def test_everything_wrong_is_told_before_the_first_job_starts(words, capsys, monkeypatch):
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    head, *problems = ends_with_2(["-m", *SMALL, *words.split()], capsys).splitlines()
    assert head == "this run cannot start:"
    assert len(problems) == len(REFUSED[words])
    for problem, piece in zip(problems, REFUSED[words], strict=True):
        assert piece in problem
    assert sorted(Path().iterdir()) == [Path("program.py")]


@pytest.mark.parametrize("started", ["torchrun", "srun"])
def test_under_a_launcher_of_several_processes_it_is_refused(started, capsys, monkeypatch):
    there = {"torchrun": {"TORCHELASTIC_RUN_ID": "x"}}
    there["srun"] = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    for name, value in there[started].items():
        monkeypatch.setenv(name, value)
    assert f"-m under {started} would start" in ends_with_2(["-m", *SMALL, "seed=1,2"], capsys)


def test_texts_of_several_runs_may_share_a_file(monkeypatch, capfd):
    """Each job's figures are those of its own settings, whatever was reported last."""
    words = ["mode=sample_eval", "eval.checkpoint_path=org/x", "sampling.logdir=texts.csv"]
    figures = launching.last_figures
    runs = {
        str(n): {"checkpoint": "org/x", "seed": 0, "gen_nfes": 2.0, "gen_ppl": n, "temperature": t}
        for n, t in ((10.0, 0.5), (20.0, 1.0), (30.0, 0.75))
    }

    def write(run):
        report = {**runs["30.0"], "runs": runs}
        Path("texts.json").write_text(json.dumps(report))
        return figures(run)

    monkeypatch.setattr(launching, "last_figures", write)
    several = ["seed=0", "sampling.temperature=0.5,1"]
    assert main.main(["-m", *several[1:], *SMALL, *words, several[0]]) == 0
    table = [line.split() for line in capfd.readouterr().out.splitlines()[-2:]]
    assert [line[4:] for line in table] == [["10.00", "2.00"], ["20.00", "2.00"]]
    assert main.main(["-m", *SMALL, *words, "seed=1"]) == 1
    assert capfd.readouterr().out.split()[-4:-1] == ["1", "-", "1"]  # it failed: no figures


@pytest.mark.parametrize(
    ("told", "codes", "expected"),
    [
        (signal.SIGTERM, [0, 75, None], 75),
        (signal.SIGTERM, [2, 0, None], 75),  # it was done as the signal came
        (signal.SIGTERM, [2, -15], 143),  # nothing was saved
        (signal.SIGUSR1, [-15, None], 138),
        (signal.SIGTERM, [0, 1, None], 1),  # what was to be saved is lost
        (signal.SIGTERM, [0, 2, None], 1),
        (signal.SIGINT, [0, -2, None], 130),
    ],
)
def test_several_runs_that_are_told_to_stop_end_as_the_last_one(told, codes, expected):
    runs = [launching.Run(None, None, code) for code in codes]
    assert multirun.stopped(told, runs) == expected


@pytest.mark.slow
def test_a_sweep_is_trained_stopped_continued_evaluated_and_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "MAIN", Path(main.__file__))
    base = ["-m", *tiny(tmp_path), *ALGORITHMS["bamdlm"], "seed=1,2"]
    log = tmp_path / "log"
    process = Run([*base, "trainer.max_steps=100000"], log)
    end = time.monotonic() + LONG
    while not list(tmp_path.glob("outputs/train/*/checkpoints/step=*.ckpt")):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    process.send(signal.SIGTERM)
    assert process.wait(LONG) == 75
    assert "job 2 of 2" not in log.read_text()
    (first,) = tmp_path.glob("outputs/train/*")
    reached = max(int(p.stem[5:]) for p in first.glob("checkpoints/step=*.ckpt"))
    code, said = run([*base, f"trainer.max_steps={reached + 5}"], log, LONG)
    assert code == 0, said
    assert f"going on from step {reached:,}" in said
    folders = sorted(tmp_path.glob("outputs/train/*"))
    assert len(folders) == 2
    for folder in folders:
        valid = read_log(folder / "metrics.csv")["val/ppl"]
        assert f"{valid[max(valid)]:,.2f}" in said.rpartition("overrides")[2]
    code, said = run([*base, f"trainer.max_steps={reached + 5}"], log, LONG)
    assert said.count("nothing is left to train") == 2
    checkpoints = ",".join(f"{folder}/checkpoints/last.ckpt" for folder in folders)
    same = [*base[:-1], f"eval.checkpoint_path={checkpoints}"]
    code, said = run([*same, "mode=ppl_eval"], log, LONG)
    assert code == 0, said
    found = [json.loads(p.read_text())["ppl"] for p in tmp_path.glob("outputs/*/*/ppl_*.json")]
    assert len(found) == 2
    assert all(f"{ppl:,.2f} ± " in said.rpartition("overrides")[2] for ppl in found)
    quiet = ["eval.gen_ppl_eval_model_name_or_path=null", "sampling.logdir=texts.csv"]
    code, said = run([*same, "mode=sample_eval", *quiet], log, LONG)
    assert code == 0, said
    assert "entropy" in said.rpartition("overrides")[2]
    compared = subprocess.run(
        [sys.executable, compare.__file__, *folders, "--out", tmp_path / "compared"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert compared.stderr == ""
    assert all(f"{ppl:,.2f} ± " in compared.stdout for ppl in found)
    page = (tmp_path / "compared/compare.html").read_text()
    assert page.count("<pre>") >= 2
