"""Two GPUs and NCCL: equal to one, resumed to the bit, and no process waits for a dead one."""

import csv
import functools
import json
import shutil

import pytest
import torch
from filelock import FileLock
from runs import ALGORITHMS, differences, read, tiny
from test_launchers import dies, launched
from test_ranks import LAST, TOLERANCE, equal_runs, equal_states

from training.log_reading import read_log
from training.signals import GO_ON

pytestmark = pytest.mark.gpu
SECONDS = 150  # for a run that starts while others do
STOPPED = 4  # the step after the one in which a rank was told to stop: all know it then
STRATEGIES = ["ddp", "fsdp"]
# sums are the same but for their order; dropout's masks would depend on the number of processes
ONE = ["trainer.devices=1", "loader.batch_size=8", "loader.eval_batch_size=8"]
EQUAL = ["trainer.precision=32", "model.dropout=0", "loader.eval_global_batch_size=8"]
# AdamW would divide the rounding of gradients near zero by its eps
EQUAL += ["trainer.val_check_interval=4", "optim.eps=1e-4"]
# FlexAttention needs wider heads than those of `tiny`; a validation would have it compile more
BITS = ["trainer.precision=bf16", "trainer.deterministic=true", "model.hidden_size=64"]
BITS += ["trainer.val_check_interval=100"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Overrides of a run on two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    gpus = ["trainer.accelerator=gpu", "trainer.devices=2"]
    return [*tiny(tmp_path_factory.mktemp("data")), *ALGORITHMS["bamdlm"], *gpus]


def finished(words, folder, *, launcher=None, code=0, told="", **fault):
    """The folder of the run, which ended with `code` and whose processes each said `told`."""
    # torchrun starts both at once, but always both, and has an exit code of its own
    by_lightning = code or "trainer.devices=1" in words
    launcher = launcher or ("lightning" if by_lightning else "torchrun")
    words = [*words, f"checkpointing.save_dir={folder / 'run'}"]
    ended, text = launched(launcher, words, folder, timeout=SECONDS, **fault)
    assert ended == code, text
    assert not told or text.count(told) == 2, text
    return folder


@pytest.fixture(scope="session")
def alone(base, tmp_path_factory, worker_id):
    """The folder of a run on one GPU, made by one of pytest's workers for all."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    made, unfinished = folder / "alone", folder / "unfinished"
    with FileLock(folder / "alone.lock"):
        if not made.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            finished([*base, *EQUAL, *ONE], unfinished).rename(made)
    return made


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_gpus_train_as_one(strategy, base, alone, tmp_path):
    words = [*base, *EQUAL, f"strategy={strategy}"]
    equal_runs(finished(words, tmp_path, launcher="lightning"), alone)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_of_two_gpus_wait_for_no_device_and_train_as_one(strategy, base, alone, tmp_path):
    """Only what reads the loss to show it, and a checkpoint, may wait. ddp records them."""
    quiet = ["trainer.log_every_n_steps=100", "trainer.enable_progress_bar=false"]
    quiet += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=100"]
    told = f"its steps were recorded: {strategy == 'ddp'}"
    words = [*base, *EQUAL, *quiet, f"strategy={strategy}"]
    finished(words, tmp_path, told=told, fault="waits")
    equal_states(read(tmp_path / LAST), read(alone / LAST))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_moves_between_two_gpus_and_one(strategy, base, alone, tmp_path):
    words = [*base, *EQUAL, f"strategy={strategy}"]
    finished(words, tmp_path, code=GO_ON, rank="1", fault="SIGUSR1")
    assert read(tmp_path / LAST)["global_step"] == STOPPED
    finished([*base, *EQUAL, *ONE, "trainer.max_steps=6"], tmp_path)
    finished(words, tmp_path)
    equal_states(read(tmp_path / LAST), read(alone / LAST))


@pytest.mark.parametrize(
    "setting",
    [
        "strategy=ddp",
        "strategy=ddp model.compile=true",
        "strategy=ddp model.param_dtype=bfloat16",
        "strategy=fsdp",
        "strategy=fsdp model.compile=true",
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(setting, base, tmp_path):
    """With FlexAttention, in bf16, with dropout, under trainer.deterministic."""
    words = [*base, *BITS, *setting.split()]
    whole = read(finished(words, tmp_path) / LAST)
    (tmp_path / "run").rename(tmp_path / "whole")
    finished(words, tmp_path, code=GO_ON, rank="1", fault="SIGUSR1")
    assert read(tmp_path / LAST)["global_step"] == STOPPED
    finished(words, tmp_path)
    assert differences(read(tmp_path / LAST), whole) == []


def test_two_gpus_train_compiled_blocks_in_bf16_as_ddp_does(base, tmp_path):
    """fsdp sends the weights that autocast would round."""
    words = [*base, *BITS, "model.dropout=0", "model.compile=true", "optim.eps=1e-4"]
    found = []
    for strategy in STRATEGIES:
        folder = tmp_path / strategy
        folder.mkdir()
        finished([*words, f"strategy={strategy}"], folder)
        found.append(read_log(folder / "run/metrics.csv")["trainer/loss"])
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_two_gpus_evaluate_every_row_once(base, alone, tmp_path):
    words = [*base, *EQUAL, "mode=ppl_eval", f"eval.checkpoint_path={alone / LAST}"]
    found = []
    for name, more in (("one", ONE), ("two", [])):
        folder = tmp_path / name
        folder.mkdir()
        finished([*words, *more], folder)
        (path,) = (folder / "run").glob("ppl_*.json")
        found.append(json.loads(path.read_text()))
    one, two = found
    assert one["rows"] == two["rows"] == 11
    assert two["ppl"] == pytest.approx(one["ppl"], rel=TOLERANCE)
    assert two["ppl_error"] == pytest.approx(one["ppl_error"], rel=TOLERANCE)


def test_two_gpus_write_the_texts_of_one(base, alone, tmp_path):
    """Batches of one size, whatever the number of devices: products of another may round apart."""
    words = [*base, *EQUAL, "mode=sample_eval", f"eval.checkpoint_path={alone / LAST}"]
    words += ["eval.gen_ppl_eval_model_name_or_path=null", "sampling.batch_size=4"]
    words += ["sampling.num_sample_batches=2", "model.length=32"]
    found = []
    for name, devices in (("one", 1), ("two", 2)):
        path = tmp_path / name / "texts.csv"
        path.parent.mkdir()
        more = [f"trainer.devices={devices}", f"sampling.logdir={path}"]
        finished([*words, *more], path.parent)
        with path.open(newline="") as file:
            found.append(sorted((int(row["row"]), row["samples"]) for row in csv.DictReader(file)))
    one, two = found
    assert len(one) == 8
    assert two == one


DEATHS = [("torchrun", "1", fault) for fault in ("SIGKILL", "raises")]
DEATHS += [
    ("lightning", "1", "SIGKILL"),
    ("lightning", "1", "raises"),
    ("lightning", "0", "SIGKILL"),
]


@pytest.mark.parametrize(("launcher", "rank", "fault"), DEATHS)
def test_a_rank_that_dies_brings_the_job_down(launcher, rank, fault, base, tmp_path):
    words = [*base, f"checkpointing.save_dir={tmp_path / 'run'}"]
    start = functools.partial(launched, launcher)
    dies(start, words, tmp_path, rank=rank, fault=fault, timeout=SECONDS)
