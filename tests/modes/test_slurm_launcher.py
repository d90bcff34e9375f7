"""-m hydra/launcher=submitit_slurm with the real submitit (requirements-submitit.txt), and programs
of Slurm's names that run a job here at once."""

import os
import re
import signal
import stat
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import main
from modes import launching, slurm

# not imported here: the first import decides which signal it listens to
pytestmark = pytest.mark.skipif(not find_spec("submitit"), reason="submitit is not installed")

# A job is in the queue while $QUEUE/ID is there; scontrol requeue ID starts it once more.
PROGRAMS = {
    "sbatch": """\
[ -z "$REFUSE" ] || { echo "sbatch: error: invalid partition specified: x" >&2; exit 1; }
id=$(($(ls "$QUEUE/.." | grep -c '^script-') + 100))
script=$QUEUE/../script-$id
cp "${@: -1}" "$script"
touch "$QUEUE/$id"
export SLURM_JOB_ID=$id SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1
(
  bash "$script"
  while [ -e "$QUEUE/../again-$id" ]; do
    rm "$QUEUE/../again-$id"
    bash "$script"
  done
  rm "$QUEUE/$id"
) >"$QUEUE/../output-$id" 2>&1 </dev/null &
echo "Submitted batch job $id"
""",
    "srun": """\
while [[ $1 == --* ]]; do
  if [[ $1 == --output ]]; then out=${2//%j/$SLURM_JOB_ID}; shift; fi
  shift
done
exec "$@" >>"${out//%t/0}" 2>&1
""",
    "squeue": 'ls "$QUEUE"\n',
    "scontrol": 'touch "$QUEUE/../again-$2"\n',
}
# seed=2 fails; seed=3 is told to stop, and ends when it is started again
PROGRAM = """
import os, pathlib, signal, sys, time
seed = int(sys.argv[-1].partition("=")[2])
print("words:", *sys.argv[1:], flush=True)
told = pathlib.Path("told")
if seed == 3 and not told.exists():
    signal.signal(signal.SIGUSR1, lambda *_: (told.touch(), sys.exit(75)))
    pathlib.Path("ready").touch()
    time.sleep(30)
if seed == 4:
    os.kill(os.getppid(), signal.SIGKILL)
sys.exit(seed if seed == 2 else 0)
"""
SMALL = ["data=shakespeare", "wandb=null", "model=tiny", "algo=ar"]
SLURM = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=60"]


@pytest.fixture(autouse=True)
def queue(tmp_path, monkeypatch, _launch_folder):
    for name in [
        name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("settings.defaults.visible_gpus", lambda: 0)
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "slurm/queue").mkdir(parents=True)
    monkeypatch.setenv("QUEUE", str(tmp_path / "slurm/queue"))
    monkeypatch.setenv("REFUSE", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(launching, "MAIN", tmp_path / "program.py")
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(slurm, "LOST_SECONDS", 0.5)
    yield tmp_path / "slurm/queue"
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL", raising=False)


def test_each_job_is_one_of_slurm_and_the_table_has_their_ends(capfd, tmp_path):
    assert main.main([*SLURM, "hydra.launcher.mem_gb=1.5", *SMALL, "seed=1,2,4"]) == 1
    said = capfd.readouterr().out
    assert "job 3 of 3 is job 102 of Slurm: seed=4" in said
    assert "job 3 (102 of Slurm) has left the queue without an exit code" in said
    assert [line.split()[:4] for line in said.splitlines()[-3:]] == [
        ["1", "seed=1", "100", "0"],
        ["2", "seed=2", "101", "2"],
        ["3", "seed=4", "102", "-"],
    ]
    (folder,) = Path("watch_folder").iterdir()
    (log,) = folder.glob("100_*.out")
    assert f"words: {' '.join(SMALL)} seed=1" in log.read_text()
    script = (tmp_path / "slurm/script-100").read_text()
    for line in ("--job-name=bamdlm", "--time=60", "--mem=1536MB", "--signal=USR1@90"):
        assert f"#SBATCH {line}" in script


def test_at_the_time_limit_it_saves_and_goes_back_into_the_queue(capfd, queue, tmp_path):
    """As Slurm does it: USR1 to what runs in the job."""
    child = os.fork()
    if child == 0:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.05)
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes()
                of_job = b"SLURM_JOB_ID=" in (folder / "environ").read_bytes()
            except OSError:
                continue
            if b"submitit.core._submit" in words and of_job and str(tmp_path).encode() in words:
                os.kill(int(folder.name), signal.SIGUSR1)
        os._exit(0)
    assert main.main([*SLURM, *SMALL, "seed=3"]) == 0
    os.waitpid(child, 0)
    assert (tmp_path / "told").exists()
    assert capfd.readouterr().out.splitlines()[-1].split()[:4] == ["1", "-", "100", "0"]
    (log,) = Path("watch_folder").glob("*/100_*.out")
    assert log.read_text().count("words:") == 2
    assert "Requeued job 100" in log.read_text()
    assert list(queue.iterdir()) == []


def test_what_sbatch_refuses_is_told_in_one_line(monkeypatch, capfd):
    monkeypatch.setenv("REFUSE", "1")
    assert main.main([*SLURM, *SMALL, "seed=1,2", "hydra.launcher.partition=x"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == ("sbatch: invalid partition specified: x")


def test_a_signal_ends_the_waiting_and_leaves_the_jobs(capfd, queue, tmp_path):
    child = os.fork()
    if child == 0:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    assert main.main([*SLURM, *SMALL, "seed=3"]) == 75
    os.waitpid(child, 0)
    said = capfd.readouterr().out
    assert re.search(r"SIGTERM: the jobs stay in the queue; `scancel 100` ends them", said)
    assert [path.name for path in queue.iterdir()] == ["100"]
    (tmp_path / "told").touch()
    for folder in Path("/proc").glob("[0-9]*"):  # the test's own job
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if str(tmp_path / "program.py").encode() in words:
            os.kill(int(folder.name), signal.SIGKILL)
    end = time.monotonic() + 30
    while list(queue.iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
