"""checkpointing.format=sharded: the same run, in folders to which every rank writes its part while
training goes on."""

import errno
import os
import random
import resource
import shutil
import signal
import threading
import time

import pytest
from hub_folders import with_tokenizer
from runs import (
    ALGORITHMS,
    COUNTS,
    LAST,
    at_call,
    differences,
    ends_with_2,
    equal_states,
    finish,
    ranks,
    read,
    run,
    tell,
    tiny,
)
from torch.distributed import checkpoint as dcp

from checkpointing import sharded
from diffusion import Diffusion
from scripts import consolidate
from training import health
from training.log_reading import read_log
from training.signals import GO_ON

FORMAT = "/hyper_parameters/config/checkpointing/format"  # differs between the two


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Overrides of a run in parts, for any number of ranks."""
    return [
        *tiny(tmp_path_factory.mktemp("data")),
        *ALGORITHMS["bamdlm"],
        "model.dropout=0",
        "loader.eval_global_batch_size=8",
        "trainer.val_check_interval=4",
        "checkpointing.format=sharded",
    ]


def of(count, base, folder, *more, before=None):
    """Exit codes of a run by so many ranks, and what it printed."""
    size = 8 // count
    words = [*base, f"trainer.devices={count}", f"loader.batch_size={size}"]
    words += [f"loader.eval_batch_size={size}", f"checkpointing.save_dir={folder / 'run'}"]
    started = ranks(count, [*words, *more], folder / "log.txt", before=before)
    return finish(started), "".join(each.text() for each in started)


def trained(count, base, folder, *more, before=None):
    codes, text = of(count, base, folder, *more, before=before)
    assert codes == [0] * count, text
    return text


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The folder of a run of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    trained(2, base, folder, "strategy=fsdp")
    return folder


@pytest.fixture(scope="module")
def begun(base, tmp_path_factory):
    """The same, stopped by a signal to one of them after 6 of its 10 steps."""
    folder = tmp_path_factory.mktemp("begun")

    def told(rank):
        if rank == 1:
            at_call(Diffusion, "training_step", 6, tell(signal.SIGUSR1))()

    codes, text = of(2, base, folder, "strategy=fsdp", before=told)
    assert codes == [GO_ON, GO_ON], text
    return folder


GOING_ON = [(2, "fsdp", "sharded"), (1, "ddp", "sharded"), (4, "fsdp", "sharded")]
GOING_ON += [(2, "ddp", "sharded"), (2, "fsdp", "file"), (4, "ddp", "file")]


@pytest.mark.parametrize(("count", "strategy", "form"), GOING_ON)
def test_a_run_goes_on_with_other_ranks_strategies_and_formats(
    count, strategy, form, base, whole, begun, tmp_path
):
    """With as many ranks and the same strategy, to the same bits."""
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    more = [f"strategy={strategy}", f"checkpointing.format={form}"]
    text = trained(count, base, tmp_path, *more)
    assert "going on from step 6 of" in text
    ours, theirs = (read_log(f / "run/metrics.csv") for f in (tmp_path, whole))
    for name in ("trainer/loss", "val/nll"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    a = read(tmp_path / LAST) if form == "file" else sharded.read(tmp_path / LAST)
    b = sharded.read(whole / LAST)
    if (count, strategy) == (2, "fsdp"):
        paths = [line.partition(":")[0] for line in differences(a, b)]
        assert [p for p in paths if not p.startswith(("/hyper", "/callbacks"))] == []
    else:
        equal_states(a, b)
    names = {"best.ckpt", "last.ckpt", "step=8.ckpt", "step=10.ckpt"}
    names |= {"best-step=8.ckpt"} if form == "sharded" else set()
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == names


def test_the_consolidated_file_is_that_of_the_other_format(base, whole, tmp_path, capsys):
    place = whole.with_name("other")
    place.mkdir()
    (whole / "run").rename(whole / "kept")  # both name the folder they are in
    try:
        trained(2, base, whole, "strategy=fsdp", "checkpointing.format=file")
        (whole / "run").rename(place / "run")
    finally:
        shutil.rmtree(whole / "run", ignore_errors=True)  # of a run that failed
        (whole / "kept").rename(whole / "run")
    for name in ("last.ckpt", "best.ckpt"):
        folder, file = whole / "run/checkpoints" / name, tmp_path / name
        assert consolidate.main([str(folder), str(file)]) == 0
        found = differences(read(file), read(place / "run/checkpoints" / name))
        assert found == [f"{FORMAT}: sharded, file"]
        assert consolidate.main([str(folder), str(file)]) == 2
        assert "exists" in capsys.readouterr().err
    for source, said in ((str(file), "is no checkpoint in parts"), ("s3://a/b", "is no path")):
        assert consolidate.main([source, str(tmp_path / "x.ckpt")]) == 2
        assert said in capsys.readouterr().err


def test_it_is_evaluated_as_it_is(base, whole, tmp_path):
    words = [*base, "mode=ppl_eval", f"checkpointing.save_dir={tmp_path}"]
    words += [f"eval.checkpoint_path={whole / LAST}", "loader.eval_batch_size=8"]
    code, text = run(words, tmp_path / "log")
    assert code == 0, text
    assert "perplexity" in text


KINDS = {
    "a law of counts, muon": [*COUNTS, "algo.clip_search_widths=[]", "optim=muon"],
    "adapters": ["algo.backbone=llama", "lora.rank=2", "block_size=4"],
    "ar without average": ["algo=ar", "training.ema=0", "algo.clip_search_widths=[]"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_stops_and_goes_on_to_the_same_bits(kind, base, tmp_path):
    """With all that a run may keep; the checkpoints of a file and in parts are the same."""
    words = [*base, *KINDS[kind], "model.dropout=0.2"]
    if kind == "adapters":
        model = with_tokenizer(tmp_path / "model")
        words = [word for word in words if "tokenizer" not in word and "dropout" not in word]
        words += [f"training.from_pretrained={model}", f"data.tokenizer_name_or_path={model}"]

    def of_one(*more, code=0, **how):
        place = f"checkpointing.save_dir={tmp_path / 'run'}"
        ended, text = run([*words, place, *more], tmp_path / "log", **how)
        assert ended == code, text

    of_one("checkpointing.format=file")
    (tmp_path / "run").rename(tmp_path / "file")
    stop = at_call(Diffusion, "training_step", 12, tell(signal.SIGTERM))
    of_one(code=GO_ON, before=stop)
    assert sharded.read(tmp_path / LAST)["global_step"] == 6
    of_one()
    found = differences(
        sharded.read(tmp_path / LAST), read(tmp_path / "file/checkpoints/last.ckpt")
    )
    assert found == [f"{FORMAT}: sharded, file"]


def test_training_goes_on_while_it_is_written(base, tmp_path):
    """Rank 1 writes its part of step 5 when step 9 has begun, and the next save waits for it."""

    def slow(rank):
        real, begun = dcp.FileSystemWriter.write_data, threading.Event()

        def write_data(self, plan, planner):
            assert begun.wait(60)
            return real(self, plan, planner)

        if rank == 1:
            dcp.FileSystemWriter.write_data = write_data
            at_call(Diffusion, "training_step", 9, begun.set)()

    more = ["strategy=fsdp", "callbacks.checkpoint_every_n_steps.every_n_train_steps=5"]
    more += ["callbacks.checkpoint_monitor=null", "trainer.limit_val_batches=0"]
    trained(2, base, tmp_path, *more, before=slow)
    assert sharded.read(tmp_path / LAST)["global_step"] == 10


def test_a_save_is_finished_where_bad_steps_end_the_run(base, tmp_path):
    """Also where that takes longer than processes of a failed run have."""

    def before(rank):
        health.TIDY_SECONDS = 0.5
        real, training_step = dcp.FileSystemWriter.write_data, Diffusion.training_step

        def write_data(self, plan, planner):
            if rank == 1:
                time.sleep(2)
            return real(self, plan, planner)

        def step(self, batch, batch_idx):
            loss = training_step(self, batch, batch_idx)
            return loss * float("nan") if batch_idx == 4 else loss

        dcp.FileSystemWriter.write_data, Diffusion.training_step = write_data, step

    more = ["strategy=fsdp", "training.max_bad_steps=0", "trainer.limit_val_batches=0"]
    codes, text = of(2, base, tmp_path, *more, before=before)
    assert codes == [1, 1], text
    assert "more than training.max_bad_steps=0" in text
    assert sharded.read(tmp_path / LAST)["global_step"] == 4


@pytest.mark.parametrize("policy", ["continue", "stop", "at the end"])
def test_a_rank_that_cannot_write(policy, base, whole, tmp_path):
    """The disk of rank 1 is full at one step. All ranks learn of it; what is there stays, and the
    next attempt counts, at the end too."""
    at = 10 if policy == "at the end" else 4

    def full(rank):
        real, calls = dcp.FileSystemWriter.write_data, [0]

        def write_data(self, plan, planner):
            calls[0] += f"step={at}.ckpt" in str(self.path)
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            if rank == 1 and f"step={at}.ckpt" in str(self.path) and calls[0] == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
            try:
                return real(self, plan, planner)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)

        dcp.FileSystemWriter.write_data = write_data

    every = 5 if policy == "at the end" else 2
    more = ["strategy=fsdp", f"callbacks.checkpoint_every_n_steps.every_n_train_steps={every}"]
    more += ["callbacks.checkpoint_monitor=null"]
    more += [f"checkpointing.on_save_error={'stop' if policy == 'stop' else 'continue'}"]
    codes, text = of(2, base, tmp_path, *more, before=full)
    place = tmp_path / "run/checkpoints"
    assert text.count(f"step={at}.ckpt could not be written (File too large)") >= 1, text
    assert not list(place.glob(".*"))
    if policy == "stop":
        assert codes == [1, 1], text
        assert sharded.read(tmp_path / LAST)["global_step"] in (2, 6)  # 6 was begun before
    else:
        assert codes == [0, 0], text
        equal_states(sharded.read(tmp_path / LAST), sharded.read(whole / LAST))


def test_a_last_save_that_fails_is_made_again_whatever_is_written_after_it(base, tmp_path):
    """Here best.ckpt, which the validation after the last step chooses."""
    real, calls = dcp.FileSystemWriter.write_data, []

    def write_data(self, plan, planner):
        last = "step=10.ckpt" in str(self.path)
        calls.extend([self.path] * last)
        if last and len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, plan, planner)

    def full():
        dcp.FileSystemWriter.write_data = write_data

    words = [*base, "trainer.val_check_interval=5", f"checkpointing.save_dir={tmp_path / 'run'}"]
    words += ["checkpointing.on_save_error=continue", "loader.batch_size=8"]
    words += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=5"]
    code, text = run(words, tmp_path / "log", before=full)
    assert code == 0, text
    assert text.count("step=10.ckpt could not be written (No space left on device)") == 1
    assert text.count("validation perplexity") == 2
    assert sharded.read(tmp_path / LAST)["global_step"] == 10


def test_damaged_numbers_of_one_rank_end_all_before_a_step(base, begun, tmp_path):
    """Each says in a line what to do; without the folder the run goes on from the one before."""
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    place = tmp_path / "run/checkpoints"
    part = place / "step=6.ckpt/__1_0.distcp"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 255
    part.write_bytes(data)
    codes, text = of(2, base, tmp_path, "strategy=fsdp")
    assert codes == [2, 2], text
    assert "__1_0.distcp is damaged" in text
    assert text.count(f"or delete {place / 'step=6.ckpt'}, and the run goes on from the") == 2
    assert "Traceback" not in text
    shutil.rmtree(place / "step=6.ckpt")
    assert "going on from step 4 of" in trained(2, base, tmp_path, "strategy=fsdp")


def test_what_is_not_whole_is_not_taken(base, begun, tmp_path, capfd):
    """The run goes on from the newest that is whole; where none is, or where one is asked for, it
    ends with 2 before it begins."""
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    place = tmp_path / "run/checkpoints"
    shard = place / "step=6.ckpt/__1_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    more = ["strategy=fsdp", "trainer.max_steps=6"]
    code, text = run([*base, f"checkpointing.save_dir={tmp_path / 'run'}"], tmp_path / "log1")
    assert code == 0, text
    sizes = f"({len(data) - 1:,} of {len(data):,} bytes)"
    assert f"step=6.ckpt is not whole: __1_0.distcp was cut short {sizes}" in text
    assert "going on from step 4 of" in text
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    for path in place.glob("*/__0_0.distcp"):
        path.unlink()
    codes, text = of(2, base, tmp_path, *more)
    assert codes == [2, 2], text
    assert "__0_0.distcp is missing" in text
    asked = [*more, f"checkpointing.resume_ckpt_path={place / 'step=6.ckpt'}"]
    codes, text = of(2, base, tmp_path, *asked)
    assert codes == [2, 2], text
    assert "__0_0.distcp is missing" in text
    assert "Traceback" not in text


def test_it_needs_a_disk(base, capfd):
    words = [*base, "checkpointing.save_dir=memory://bucket/run"]
    said = ends_with_2(words, capfd)
    assert "checkpointing.format=sharded writes to a disk alone" in said


@pytest.mark.slow
def test_killed_in_saves_it_ends_the_same(base, tmp_path):
    """Ten times, one of two ranks at a random moment, mostly while a part is being written. A whole
    checkpoint is left each time."""
    draw = random.Random(0)
    more = ["strategy=fsdp", "model.dropout=0.2", "trainer.max_steps=60"]
    more += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]
    trained(2, base, tmp_path, *more)
    expected = sharded.read(tmp_path / LAST)
    shutil.rmtree(tmp_path / "run")
    place, within = tmp_path / "run/checkpoints", 0
    for kill in range(10):
        victim, wait = draw.randrange(2), draw.uniform(0, 0.02)
        after = draw.randrange(1, 5)

        def before(rank, victim=victim, wait=wait, after=after):
            real, calls = dcp.FileSystemWriter.write_data, [0]

            def die():
                time.sleep(wait)
                os.kill(os.getpid(), signal.SIGKILL)

            def write_data(self, plan, planner):
                calls[0] += 1
                if rank == victim and calls[0] == after:
                    threading.Thread(target=die).start()
                return real(self, plan, planner)

            dcp.FileSystemWriter.write_data = write_data

        codes, text = of(2, base, tmp_path, *more, before=before)
        assert codes[victim] == -signal.SIGKILL, text
        assert codes[1 - victim] == 1, text
        within += any(place.glob(".*.partial"))
        found = [*place.glob("step=*.ckpt")]
        assert found or (not kill and after == 1), text
        for path in found:  # all that have a name are whole
            sharded.read(path)
    print(within, "of 10 kills came before the save was done")
    assert within >= 3
    trained(2, base, tmp_path, *more)
    assert differences(sharded.read(tmp_path / LAST), expected) == []
