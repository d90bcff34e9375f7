"""How scripts/job.sh starts a run.

Slurm is simulated by real bash: a copy of the script outside the repository, as slurmd makes it,
with SLURM variables set and small programs named srun, sbatch and scontrol on the PATH.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def clean_environment(**extra):
    dropped = ("SLURM", "BAMDLM", "CHECKPOINT", "BLOCK_SIZE", "ALGOS", "PRETRAIN")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {k: str(v) for k, v in extra.items()}


@pytest.fixture
def cluster(tmp_path):
    """A copy of the scripts with an empty main.py, and stand-ins that say what they did."""
    root = tmp_path / "repo with space"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "main.py").touch()
    spool, tools = tmp_path / "spool", tmp_path / "tools"
    spool.mkdir()
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "pwd", "sleep"):  # and no Slurm of this machine
        (tools / name).symlink_to(shutil.which(name))
    program(tools / "srun", 'echo "srun $*" >>"$LOG"; exec "${@: -1}"')
    program(tools / "scontrol", 'echo "scontrol $*" >>"$LOG"')
    return tmp_path


def program(path, body):
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


def started(cluster, script, *arguments, in_job=True, **environment):
    """The script as slurmd runs it (or as a person does), not waited for."""
    root = cluster / "repo with space"
    path = root / "scripts" / script
    if in_job:
        path = Path(shutil.copy(path, cluster / "spool" / "slurm_script"))
        environment = {"SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": root, "SLURM_NTASKS": 1} | environment
    environment = {
        "LOG": cluster / "log",
        "PATH": cluster / "tools",
        "BAMDLM_PYTHON": "echo",
    } | environment
    return subprocess.Popen(
        [shutil.which("bash"), path, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cluster,
        env=clean_environment() | {k: str(v) for k, v in environment.items()},
    )


def finished(process):
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


def logged(cluster):
    log = cluster / "log"
    return log.read_text() if log.exists() else ""


def worker(cluster, body):
    """What srun is to start, whatever it is asked for."""
    program(cluster / "worker", body)
    program(cluster / "tools" / "srun", f'echo "srun $*" >>"$LOG"; exec "{cluster}/worker"')


def test_without_slurm_it_is_plain_python(cluster):
    process = started(
        cluster, "ppl/eval_owt_ar.sh", "seed=3", "wandb.notes=two words", in_job=False
    )
    status, output = finished(process)
    assert status == 0
    assert (
        output.splitlines()[-1] == "-u main.py experiment=eval_owt_ar seed=3 wandb.notes=two words"
    )
    assert logged(cluster) == ""


def test_inside_salloc_it_is_plain_python_too(cluster):
    process = started(cluster, "ppl/eval_owt_ar.sh", in_job=False, SLURM_JOB_ID=7)
    assert finished(process)[0] == 0
    assert logged(cluster) == ""


def test_a_failure_is_passed_on(cluster):
    process = started(cluster, "ppl/eval_owt_ar.sh", in_job=False, BAMDLM_PYTHON="false")
    assert finished(process)[0] == 1
    assert (
        finished(started(cluster, "ppl/eval_owt_ar.sh", "--dry-run", BAMDLM_PYTHON="false"))[0] == 0
    )


def test_torchrun_starts_several_processes(cluster):
    process = started(cluster, "train/train_owt_ar.sh", in_job=False, BAMDLM_TORCHRUN=2)
    output = finished(process)[1]
    start = "-m torch.distributed.run --standalone --nproc-per-node=2"
    assert f"{start} main.py experiment=train_owt_ar" in output


def test_a_job_runs_under_srun_in_the_submit_folder(cluster):
    worker(cluster, 'pwd >>"$LOG"')
    status, output = finished(started(cluster, "train/train_owt_bamdlm.sh", "seed=3"))
    assert status == 0
    first, folder = logged(cluster).splitlines()
    assert first == (
        "srun --kill-on-bad-exit=1 echo -u main.py experiment=train_owt_bamdlm"
        " block_size=4 wandb.name=bamdlm-owt-block_size4 seed=3"
    )
    assert folder.endswith("repo with space")
    assert "scontrol" not in output


def test_several_nodes_and_gpus_get_a_process_each(cluster):
    worker(cluster, "true")
    nodes = {"SLURM_NNODES": 2, "SLURM_GPUS_ON_NODE": 4}
    finished(started(cluster, "train/train_owt_ar.sh", **nodes, SLURM_NTASKS=2))
    asked = {"SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4, "SLURM_CPUS_PER_TASK": 6}
    finished(started(cluster, "train/train_owt_ar.sh", **nodes, **asked))
    completed, as_asked = logged(cluster).splitlines()
    assert "--ntasks=8 --ntasks-per-node=4 --overcommit" in completed
    assert "--ntasks" not in as_asked
    assert "--cpus-per-task=6 " in as_asked
    assert "main.py trainer.num_nodes=2 experiment=train_owt_ar" in as_asked


def test_a_task_of_an_array_takes_its_number_as_seed(cluster):
    worker(cluster, "true")
    finished(started(cluster, "gen_ppl/gen_ppl_ar.sh", SLURM_ARRAY_TASK_ID=5))
    assert "main.py seed=5 experiment=gen_ppl_ar" in logged(cluster)


def running_until_signalled(cluster, trapped, script="train/train_owt_ar.sh"):
    """A job whose worker waits for a signal; returned once the worker has begun."""
    body = f"""trap 'echo got {trapped} >>"$LOG"; exit 0' {trapped}
    echo began >>"$LOG"; while true; do sleep 0.02; done"""
    worker(cluster, body)
    process = started(cluster, script)
    deadline = time.monotonic() + 10
    while "began" not in logged(cluster) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_ahead_of_the_time_limit_the_run_stops_and_the_job_is_requeued(cluster):
    process = running_until_signalled(cluster, "USR1")
    process.send_signal(signal.SIGUSR1)
    finished(process)
    assert logged(cluster).splitlines()[-2:] == ["got USR1", "scontrol requeue 7"]


def test_a_cancelled_job_stops_and_is_not_requeued(cluster):
    process = running_until_signalled(cluster, "TERM")
    process.send_signal(signal.SIGTERM)
    finished(process)
    assert "got TERM" in logged(cluster)
    assert "requeue" not in logged(cluster)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (138, True), (75, True)])
def test_how_a_run_ends_decides_whether_it_goes_on(cluster, status, requeued):
    worker(cluster, f"exit {status}")
    assert finished(started(cluster, "train/train_owt_ar.sh"))[0] == status
    assert ("scontrol requeue 7" in logged(cluster)) == requeued


def test_a_batch_submits_with_its_logs_in_watch_folder(cluster):
    program(cluster / "tools" / "sbatch", 'echo "$BLOCK_SIZE sbatch $*" >>"$LOG"')
    process = started(cluster, "ppl/batch_ppl.sh", "seed=2", in_job=False, ALGOS="bamdlm")
    assert finished(process)[0] == 0
    lines = logged(cluster).splitlines()
    assert lines[1] == "8 sbatch -o watch_folder/%x_%j.log scripts/ppl/eval_owt_bamdlm.sh seed=2"
    assert len(lines) == 6
    assert (cluster / "repo with space" / "watch_folder").is_dir()


def test_a_batch_without_slurm_runs_one_after_the_other(cluster):
    process = started(cluster, "ppl/batch_ppl.sh", in_job=False, ALGOS="ar")
    status, output = finished(process)
    assert status == 0
    assert "-u main.py experiment=eval_owt_ar" in output
    assert "-u main.py experiment=eval_lm1b_ar" in output
