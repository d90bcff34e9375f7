"""Jobs in a real Slurm of two nodes (tests/slurm_cluster.py): preempted, requeued, finished."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import slurm_cluster
from forked_python import forked_python
from runs import ALGORITHMS, differences, read, run, tiny, write_text
from test_ranks import BY_ONE, equal_states

from training.log_reading import read_log as read_metrics

pytestmark = pytest.mark.slurm

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAST = "run/checkpoints/last.ckpt"
SCRIPT = ["experiment=train_owt_bamdlm", "block_size=4"]  # what train_owt_bamdlm.sh says


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = slurm_cluster.install()
    if missing:
        pytest.skip(f"no Slurm: {missing}")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in folder.parents:  # munged runs as a user of its own
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    made = slurm_cluster.Cluster(folder)
    made.environment |= {
        "BAMDLM_PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.1",  # of both nodes
        "OMP_NUM_THREADS": "1",
    }
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def forks():
    """The environment of jobs that need no interpreters of their own. A start that is told to stop
    while it imports has one, and so have those with --slow."""
    with forked_python(tuple(SCRIPT)) as python:
        yield {"BAMDLM_PYTHON": str(python)}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    # the last batch reaches both processes, so that both see the same batches, whose variances the
    # clip search averages
    valid = f"data.valid={write_text(folder / 'eleven_rows.txt', 75, 2)}"
    return [*tiny(folder), *ALGORITHMS["bamdlm"], "model.dropout=0", valid]


def until(ready, cluster, job):
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end, cluster.log(job)
        time.sleep(0.1)


def until_saved(cluster, job, step, folder, run="run"):
    until((folder / run / f"checkpoints/step={step}.ckpt").exists, cluster, job)


def imports_once(forks, folder):
    """The environment of a job whose first start has an interpreter, and those after it forks."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nmkdir {folder}/started 2> /dev/null && exec {sys.executable} "$@"\n'
        f'exec {forks["BAMDLM_PYTHON"]} "$@"\n'
    )
    python.chmod(0o755)
    return {"BAMDLM_PYTHON": str(python)}


def test_a_job_preempted_twice_is_requeued_and_ends_as_if_it_was_not(
    cluster, forks, overrides, tmp_path
):
    """Once by USR1 (as ahead of the time limit), once by Slurm's own requeue (as in preemption);
    and before that by USR1 while it is importing, when nobody handles it yet."""
    save = f"checkpointing.save_dir={tmp_path / 'run'}"
    long = ["trainer.max_steps=100000", "callbacks.checkpoint_every_n_steps.every_n_train_steps=10"]
    script = SCRIPTS / "train/train_owt_bamdlm.sh"
    arguments = [*overrides, "trainer.val_check_interval=100000", save, *long[1:]]
    stop = tmp_path / "steps"  # the last start is told where the end is
    stop.write_text("100000")
    wrapper = cluster.folder / "train.sh"
    words = " ".join(f"'{word}'" for word in arguments)
    text = script.read_text().replace('"$@"', f"{words} trainer.max_steps=$(cat {stop})")
    wrapper.write_text(text.replace("$SLURM_SUBMIT_DIR", str(SCRIPTS.parent)))
    python = imports_once(forks, tmp_path)
    job = cluster.submit(f"--gres=gpu:1 {wrapper}", BLOCK_SIZE="4", **python)
    until(lambda: f"{job}.0" in cluster.command(f"squeue -h -s -j {job}"), cluster, job)
    told = []

    def goes_back():
        """Told until it is heard: a signal ahead of the process itself is lost."""
        if "goes back into the queue" in cluster.log(job):
            return True
        if not told or time.monotonic() > told[-1] + 2:
            told.append(time.monotonic())
            cluster.command(f"scancel --signal=USR1 {job}")
        return False

    until(goes_back, cluster, job)
    assert "run folder" not in cluster.log(job)
    until_saved(cluster, job, 10, tmp_path)
    cluster.command(f"scancel --signal=USR1 {job}")
    until(lambda: "going on from step" in cluster.log(job), cluster, job)
    reached = read(tmp_path / LAST)["global_step"]
    until_saved(cluster, job, reached - reached % 10 + 10, tmp_path)
    cluster.command(f"scontrol requeuehold {job}")  # held, while the end is written
    until(lambda: cluster.state(job) == "PENDING", cluster, job)
    steps = read(tmp_path / LAST)["global_step"] + 20
    stop.write_text(str(steps))
    cluster.command(f"scontrol release {job}")
    assert "COMPLETED" in cluster.wait(job), cluster.log(job)
    log = cluster.log(job)
    assert log.count("going on from step") == 2, log
    assert "stopping at step" in log
    assert log.count(f"job {job} goes back into the queue") >= 2
    last = read(tmp_path / LAST)
    assert last["global_step"] == steps
    shutil.rmtree(tmp_path / "run")
    code, text = run([*SCRIPT, *arguments, f"trainer.max_steps={steps}"], tmp_path / "log")
    assert code == 0, text
    whole = read(tmp_path / LAST)
    for part in ("hyper_parameters", "callbacks"):  # the job has other words for the same
        last.pop(part)
        whole.pop(part)
    assert differences(last, whole) == []


def test_two_tasks_on_one_node_or_two_train_as_one_process(cluster, forks, overrides, tmp_path):
    script = SCRIPTS / "train/train_owt_bamdlm.sh"
    jobs = {}
    for name, asked in (
        ("node", "-N1 --ntasks-per-node=2 --gres=gpu:2 -x n2"),
        ("nodes", "-N2 --ntasks-per-node=1 --gres=gpu:1"),
    ):
        devices = 2 if name == "node" else 1
        save = f"trainer.devices={devices} checkpointing.save_dir={tmp_path / name / 'run'}"
        words = " ".join([*overrides, "trainer.val_check_interval=4"])
        line = f"{asked} -o '{cluster.folder}/%x_%j.log' {script} {words} {save}"
        jobs[name] = cluster.submit(line, SCRIPTS.parent, BLOCK_SIZE="4", **forks)
        if name == "node":  # the nodes are free again, and so is the port
            assert "COMPLETED" in cluster.wait(jobs[name]), cluster.log(jobs[name])
    code, text = run(
        [*SCRIPT, *overrides, *BY_ONE, f"checkpointing.save_dir={tmp_path / 'one/run'}"],
        tmp_path / "log",
    )
    assert code == 0, text
    assert "COMPLETED" in cluster.wait(jobs["nodes"]), cluster.log(jobs["nodes"])
    for name in jobs:
        equal_states(read(tmp_path / name / LAST), read(tmp_path / "one" / LAST))


def multi_node(cluster, words, asked, **environment):
    line = f"{asked} -o '{cluster.folder}/%x_%j.log' scripts/slurm/multi_node.sbatch"
    return cluster.submit(f"{line} {' '.join(words)}", SCRIPTS.parent, **environment)


SMALL = "-N2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1"


def test_two_nodes_of_two_processes_train_as_one(cluster, forks, overrides, tmp_path):
    """multi_node.sbatch with smaller sizes."""
    words = [*overrides, "loader.batch_size=2", "trainer.val_check_interval=4", "trainer.devices=2"]
    words.append(f"checkpointing.save_dir={tmp_path / 'two/run'}")
    job = multi_node(cluster, words, SMALL, **forks)
    one = [*overrides, *BY_ONE, f"checkpointing.save_dir={tmp_path / 'one/run'}"]
    assert "COMPLETED" in cluster.wait(job), cluster.log(job)
    code, text = run(one, tmp_path / "log")
    assert code == 0, text
    equal_states(read(tmp_path / "two" / LAST), read(tmp_path / "one" / LAST))


@pytest.mark.slow
def test_torchrun_starts_all_again_where_one_is_killed_and_the_job_is_requeued(
    cluster, overrides, tmp_path
):
    """Four processes on two nodes: one gets SIGKILL, and later the job is told to stop."""
    words = [*overrides, "loader.batch_size=2", "callbacks.checkpoint_monitor=null"]
    words += ["trainer.limit_val_batches=0", "algo.clip_search_widths=[]", "trainer.max_steps=150"]
    words += [f"checkpointing.save_dir={tmp_path / 'run'}"]
    job = multi_node(cluster, words, SMALL, BAMDLM_RESTARTS="1")
    went_on = lambda: cluster.log(job).count("going on from step")  # noqa: E731
    until_saved(cluster, job, 8, tmp_path)
    holder = json.loads((tmp_path / "run/running.json").read_text())
    assert holder["torchrun"] == holder["job"] == job
    os.kill(holder["pid"], signal.SIGKILL)  # the first one
    until(lambda: went_on() == 1, cluster, job)
    reached = read(tmp_path / LAST)["global_step"]
    until_saved(cluster, job, reached + 8, tmp_path)
    cluster.command(f"scancel --batch --signal=USR1 {job}")  # as ahead of the time limit
    until(lambda: f"job {job} goes back into the queue" in cluster.log(job), cluster, job)
    assert read(tmp_path / LAST)["global_step"] < 150
    assert "COMPLETED" in cluster.wait(job), cluster.log(job)
    assert went_on() == 2, cluster.log(job)
    assert read(tmp_path / LAST)["global_step"] == 150


def test_an_array_of_evaluations_ends_in_one_table(cluster, forks, overrides, tmp_path):
    """Submitted from a folder of its own, so that outputs/ is its own as well."""
    run_folder = tmp_path / "run"
    code, text = run([*overrides, f"checkpointing.save_dir={run_folder}"], tmp_path / "log")
    assert code == 0, text
    for name in ("scripts", "main.py"):
        (tmp_path / name).symlink_to(SCRIPTS.parent / name)
    words = " ".join(overrides)
    line = f"--array=1-2 -o '{cluster.folder}/%x_%A_%a.log' scripts/ppl/eval_owt_bamdlm.sh {words}"
    given = {"BLOCK_SIZE": "4", "CHECKPOINT": str(tmp_path / LAST), **forks}
    job = cluster.submit(line, tmp_path, **given)
    assert set(cluster.wait(job).split()) == {"COMPLETED"}, cluster.log(job)
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/*/ppl_*.json")]
    found = {each["seed"]: each for each in summaries}
    assert sorted(found) == [1, 2], cluster.log(job)
    assert found[1]["ppl"] != found[2]["ppl"]  # the noise of another seed
    done = subprocess.run(
        [sys.executable, "scripts/summarize.py", "--csv", "table.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    with (tmp_path / "table.csv").open(newline="") as file:
        table = {int(row["seed"]): row for row in csv.DictReader(file)}
    for seed, summary in found.items():
        assert table[seed]["PPL"] == f"{summary['ppl']:.2f}"
        assert table[seed]["block size"] == "4"
        assert f"| {summary['ppl']:.2f}" in done.stdout
    assert len(done.stdout.splitlines()) == 2 + 2


def multirun(cluster, folder, words):
    """-m with two seeds, started in the folder; what it prints goes to log there."""
    launcher = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10"]
    save = f"checkpointing.save_dir={folder}/run-${{seed}}"
    command = [sys.executable, SCRIPTS.parent / "main.py", *launcher, *words, save, "seed=1,2"]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=cluster.environment
        )


def test_a_command_with_m_waits_for_its_jobs_names_what_failed_and_goes_on(
    cluster, overrides, tmp_path
):
    """Job 1 is sent back into the queue and then cancelled; job 2 finds a broken checkpoint."""
    if find_spec("submitit") is None:
        pytest.skip("submitit is not installed: pip install -r requirements-submitit.txt")
    broken, log = tmp_path / "run-2/checkpoints/last.ckpt", tmp_path / "log"
    broken.parent.mkdir(parents=True)
    broken.write_text("x")
    process = multirun(cluster, tmp_path, [*overrides, "trainer.max_steps=100000"])
    try:
        until(lambda: "job 2 of 2 is job" in log.read_text(), cluster, "0")
        first, second = re.findall(r"job \d of 2 is job (\d+) of Slurm: seed=", log.read_text())
        until_saved(cluster, first, 4, tmp_path, "run-1")
        cluster.command(f"scancel --signal=USR1 {first}")
        read_log = lambda: next(tmp_path.glob(f"watch_folder/*/{first}_*.out")).read_text()  # noqa: E731
        until(lambda: "going on from step" in read_log(), cluster, first)
        cluster.command(f"scancel {first}")
        assert process.wait(120) == 1
    finally:
        process.kill()
    said = log.read_text()
    assert "2 of 2 jobs are not done: 1, 2" in said
    place = re.search(
        rf"job 2 \({second} of Slurm\) has ended with exit code 2; its log: (.*)", said
    )
    assert str(broken) in Path(place[1]).read_text()
    assert cluster.state(second) == "FAILED"
    shutil.rmtree(tmp_path / "run-2")
    end = 5 + max(int(p.stem[5:]) for p in tmp_path.glob("run-1/checkpoints/step=*.ckpt"))
    code = multirun(cluster, tmp_path, [*overrides, f"trainer.max_steps={end}"]).wait(300)
    assert code == 0, log.read_text()
    head, *jobs = [line.split() for line in log.read_text().splitlines()[-3:]]
    assert head[2:5] == ["Slurm", "exit", "code"]
    assert [job[:2] + job[3:4] for job in jobs] == [["1", "seed=1", "0"], ["2", "seed=2", "0"]]
    for seed, job in enumerate(jobs, 1):
        last = read_metrics(tmp_path / f"run-{seed}/metrics.csv")["val/ppl"]
        assert job[-1] == f"{last[max(last)]:,.2f}"
        assert read(tmp_path / f"run-{seed}/checkpoints/last.ckpt")["global_step"] == end
