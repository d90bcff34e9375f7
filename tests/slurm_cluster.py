"""A Slurm of two nodes on this machine, started as root in about a second and stopped again.

Debian's packages slurmctld, slurmd, slurm-client and munge are installed where they are missing.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
READY_SECONDS = 30.0

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
GRES = "Name=gpu File=/dev/tty[1-2]\n"


def install() -> str | None:
    """Why there is no Slurm here, or None where its programs are (now) installed."""
    if os.geteuid() != 0:
        return "needs root, to start slurmctld and slurmd"
    if all(shutil.which(program) for program in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return f"{', '.join(PACKAGES)} are not installed, and there is no apt-get to do it"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-qq", *command], capture_output=True, text=True, env=environment
        )
    if done.returncode:
        return f"apt-get install {' '.join(PACKAGES)} failed: {done.stderr.strip()[-200:]}"
    return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        port, first, second = _free_ports(3)
        text = CONF.format(host=host, folder=folder, port=port, first=first, second=second)
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(GRES)
        (folder / "state").mkdir()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self.processes = []

    def start(self) -> None:
        folder = self.folder
        os.chmod(folder, 0o755)
        own = folder / "munge"
        own.mkdir()
        (own / "key").write_bytes(os.urandom(1024))
        shutil.chown(own, "munge", "munge")
        shutil.chown(own / "key", "munge", "munge")
        os.chmod(own / "key", 0o600)
        munged = (
            f"/usr/sbin/munged --foreground --force --key-file={own}/key --num-threads=2"
            f" --socket={folder}/munge.socket --pid-file={own}/pid --log-file={own}/log"
            f" --seed-file={own}/seed"
        )
        os.chmod(folder, 0o777)
        self._launch(["su", "-s", "/bin/sh", "munge", "-c", f"exec {munged}"])
        self._until(lambda: (folder / "munge.socket").exists(), "munged")
        self._launch(["slurmctld", "-D", "-c"])
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            self._launch(["slurmd", "-D", "-N", node])
        idle = "n1 idle\nn2 idle"
        self._until(lambda: self.command("sinfo -h -N -o '%N %T'").strip() == idle, "the nodes")

    def _launch(self, command: list[str]) -> None:
        with (self.folder / f"{command[0]}.out").open("a") as log:
            self.processes.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.environment, cwd=self.folder
                )
            )

    def _until(self, ready, what: str) -> None:
        end = time.monotonic() + READY_SECONDS
        while not ready():
            if time.monotonic() > end:
                logs = [path.read_text()[-500:] for path in self.folder.glob("*.log")]
                raise RuntimeError(f"{what} did not start:\n" + "\n".join(logs))
            time.sleep(0.1)

    def command(self, line: str, cwd: Path | None = None, **environment) -> str:
        """What a command of Slurm prints; it runs in the cluster's folder unless told."""
        done = subprocess.run(
            line,
            shell=True,
            capture_output=True,
            text=True,
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
        )
        return done.stdout + done.stderr

    def submit(self, line: str, cwd: Path | None = None, **environment) -> str:
        """The number of the job."""
        said = self.command(f"sbatch --parsable {line}", cwd, **environment).strip()
        if not said.isdigit():
            raise RuntimeError(f"sbatch {line}: {said}")
        return said

    def state(self, job: str) -> str:
        return self.command(f"squeue -h -a -t all -j {job} -o %T").strip()

    def log(self, job: str) -> str:
        paths = sorted(self.folder.glob(f"*_{job}*.log"))
        return "\n".join(path.read_text() for path in paths)

    def wait(self, job: str, timeout: float = 120.0) -> str:
        """The state in which it ended."""
        end = time.monotonic() + timeout
        running = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED")
        while any(state in running for state in self.state(job).split()):
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is {self.state(job)}:\n{self.log(job)}")
            time.sleep(0.2)
        return self.state(job)

    def stop(self) -> None:
        self.command("scancel --user=root")
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
