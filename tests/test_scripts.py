"""The shell scripts of the published runs: what they start (spec §9), and how job.sh starts it.

Slurm is simulated by real bash: a copy of the script outside the repository, as slurmd makes it,
with SLURM variables set and small programs named srun, sbatch and scontrol on the PATH.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALGORITHMS = ("ar", "sedd", "mdlm", "bamdlm")
SINGLE = [
    *(f"train/train_{data}_{algo}.sh" for data in ("owt", "lm1b") for algo in ALGORITHMS),
    *(f"ppl/eval_{data}_{algo}.sh" for data in ("owt", "lm1b") for algo in ALGORITHMS),
    *(f"zs_ppl/zs_ppl_{algo}.sh" for algo in ALGORITHMS),
    *(f"gen_ppl/gen_ppl_{algo}.sh" for algo in ALGORITHMS),
    *(f"var_len/var_len_{algo}.sh" for algo in ("ar", "bamdlm", "sedd")),
]
BATCH = [
    "ppl/batch_ppl.sh",
    "zs_ppl/batch_zs_ppl.sh",
    "gen_ppl/batch_gen_ppl.sh",
    "var_len/batch_var_len.sh",
]
HEADER = "#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120"


def clean_environment(**extra):
    dropped = ("SLURM", "BAMDLM", "CHECKPOINT", "BLOCK_SIZE", "ALGOS", "PRETRAIN")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {k: str(v) for k, v in extra.items()}


def dry_run(script, *arguments, **environment):
    """The words of the command a script would run."""
    done = subprocess.run(
        ["bash", ROOT / "scripts" / script, "--dry-run", *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(**environment),
        check=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def overrides(script, *arguments, **environment):
    (words,) = dry_run(script, *arguments, **environment)
    assert words[1:3] == ["-u", "main.py"]
    return words[3:]


def test_the_folders_hold_these_scripts_and_no_others():
    found = {str(p.relative_to(ROOT / "scripts")) for p in ROOT.glob("scripts/*/*.sh")}
    assert found == {*SINGLE, *BATCH}


@pytest.mark.parametrize("script", [*SINGLE, *BATCH])
def test_a_script_is_short_has_the_one_header_and_names_no_site(script):
    path = ROOT / "scripts" / script
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert len(lines) <= 11
    assert lines[1] == HEADER
    site = r"partition|account|constraint|gres|mail|conda|module load|/home|/share|--time"
    assert not re.search(site, path.read_text())


@pytest.fixture(scope="module")
def configs():
    """{script: its Config}, all composed and checked as they stand."""
    from config import check, load

    made = {}
    for script in SINGLE:
        config = load(overrides(script))
        problems, _ = check(config)
        assert [p for p in problems if "eval.checkpoint_path is not set" not in p] == [], script
        made[script] = config
    return made


def test_every_script_trains_evaluates_or_samples_its_algorithm(configs):
    modes = {"train": "train", "ppl": "ppl_eval", "zs_ppl": "ppl_eval"}
    for script, config in configs.items():
        folder, name = script.removesuffix(".sh").split("/")
        assert config.algo.name == name.rsplit("_", 1)[1]
        assert config.mode == modes.get(folder, "sample_eval")


def test_training_is_as_published(configs):
    for script in SINGLE[:8]:
        config = configs[script]
        owt, bamdlm = "owt" in script, config.algo.name == "bamdlm"
        assert config.loader.global_batch_size == 512
        assert (config.optim.lr, config.training.ema, config.model.dropout) == (3e-4, 0.9999, 0.1)
        assert config.model.length == (1024 if owt else 128)
        assert config.loader.batch_size == (16 if owt else 64 if bamdlm else 128)
        assert config.trainer.max_steps == (150_000 if bamdlm else 1_000_000)
        assert config.data.train == ("openwebtext-train" if owt else "lm1b")
        if owt:
            data = config.data
            assert not data.insert_train_special
            assert not data.insert_valid_special
            assert not data.insert_valid_eos
        if bamdlm:
            assert config.algo.clip_search_widths == [0.5, 0.6, 0.7, 0.8, 0.9]
            assert config.training.resample


def test_bamdlm_trains_every_block_size_from_the_mdlm_run():
    from config import load

    for size in (4, 8, 16):
        config = load(overrides("train/train_owt_bamdlm.sh", BLOCK_SIZE=size))
        assert config.block_size == size
        assert config.wandb.name == f"bamdlm-owt-block_size{size}"
    given = "training.from_pretrained=mdlm.ckpt"
    config = load(overrides("train/train_lm1b_bamdlm.sh", given))
    assert config.training.from_pretrained == "mdlm.ckpt"


def test_perplexities_are_as_published(configs):
    for script in SINGLE[8:20]:
        config = configs[script]
        assert config.model.length == (128 if "eval_lm1b" in script else 1024)
    assert not configs["ppl/eval_owt_bamdlm.sh"].data.insert_valid_special
    for algo in ("mdlm", "sedd"):
        assert not configs[f"ppl/eval_owt_{algo}.sh"].algo.ignore_bos
    for algo in ALGORITHMS:
        assert not configs[f"zs_ppl/zs_ppl_{algo}.sh"].data.insert_valid_eos


def test_samples_are_drawn_as_published(configs):
    for script in SINGLE[20:]:
        config = configs[script]
        algo, variable = config.algo.name, script.startswith("var_len")
        assert config.sampling.nucleus_p == (0.99 if algo == "sedd" else 0.9)
        assert config.sampling.kv_cache == (algo in ("ar", "bamdlm"))
        assert config.sampling.num_sample_batches == (1 if variable else 25)
        assert config.sampling.var_length == variable
        if algo != "ar":
            assert (1000 if algo == "sedd" else 5000) == config.algo.T
        long = variable and algo != "sedd"
        assert config.model.length == (131_008 if long else 1024)
    assert configs["gen_ppl/gen_ppl_mdlm.sh"].block_size == 1024
    assert configs["var_len/var_len_bamdlm.sh"].block_size == 16


def test_each_seed_and_length_has_a_folder_of_its_own():
    from config import load

    chosen = ("seed=7", "model.length=2048")
    config = load(overrides("gen_ppl/gen_ppl_bamdlm.sh", *chosen, BLOCK_SIZE=8))
    assert config.sampling.logdir == "sample_logs/gen_ppl_bamdlm_len2048_bs8_seed7"


@pytest.mark.parametrize("data", ["ptb", "lm1b-gpt2", "scientific_papers_arxiv"])
def test_zero_shot_data_is_chosen_on_the_command_line(data):
    from config import check, load

    config = load(overrides("zs_ppl/zs_ppl_bamdlm.sh", f"data={data}"))
    assert check(config)[0] == []
    assert config.data.valid == load([f"data={data}"]).data.valid


@pytest.mark.parametrize(
    ("given", "backbone"),
    [(None, "hf_dit"), ("a b/last.ckpt", "dit"), ("export", "hf_dit"), ("name/id", "hf_dit")],
)
def test_a_checkpoint_says_how_it_is_loaded(given, backbone):
    environment = {} if given is None else {"CHECKPOINT": given}
    words = overrides("ppl/eval_owt_bamdlm.sh", BLOCK_SIZE=8, **environment)
    published = "kuleshov-group/bamdlm-owt-block_size8"
    assert f"eval.checkpoint_path={given or published}" in words
    assert f"algo.backbone={backbone}" in words


def test_batches_cover_the_published_runs():
    lines = dry_run("gen_ppl/batch_gen_ppl.sh")
    assert len(lines) == 12 * (2 + 1 + 2 + 2 * 3)
    assert len({tuple(line) for line in lines}) == len(lines)
    zero_shot = dry_run("zs_ppl/batch_zs_ppl.sh")
    named = {word for line in zero_shot for word in line if word.startswith("data=")}
    assert len(named) == 8
    assert len(zero_shot) == 8 * (3 + 3)
    assert len(dry_run("var_len/batch_var_len.sh")) == 20 * 3
    assert len(dry_run("ppl/batch_ppl.sh", ALGOS="ar bamdlm", BLOCK_SIZE=4)) == 2 * 2


# How job.sh starts a run


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
    assert "-m torch.distributed.run --nproc-per-node=2 main.py experiment=train_owt_ar" in output


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
    finished(
        started(cluster, "train/train_owt_ar.sh", **nodes, SLURM_NTASKS=8, SLURM_NTASKS_PER_NODE=4)
    )
    completed, as_asked = logged(cluster).splitlines()
    assert "--ntasks=8 --ntasks-per-node=4 --overcommit" in completed
    assert "--ntasks" not in as_asked
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
