"""Several processes (gloo, CPU) against one: the same losses, the same checkpoints."""

import errno
import functools
import json
import os
import shutil
import signal
import time

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from runs import (
    ALGORITHMS,
    COUNTS,
    differences,
    equal_states,
    finish,
    ranks,
    read,
    run,
    tiny,
)

import settings
from checkpointing import torch_file
from data import streaming
from diffusion import Diffusion
from training import saving
from training.distributed import Poll
from training.log_reading import read_log
from training.saving import Deadline
from training.signals import GO_ON

LAST = "run/checkpoints/last.ckpt"
BY_ONE = ["loader.batch_size=8", "loader.eval_batch_size=8", "trainer.val_check_interval=4"]
TWO = ["trainer.devices=2", "trainer.val_check_interval=4"]
# one save, at the end: under fsdp to put parts together for it takes longer than a step
ONE_SAVE = ["callbacks.checkpoint_monitor=null"]
ONE_SAVE += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=100"]
TOLERANCE = 1e-5
SIZES = ["training.block_sizes={1: 1, 4: 2, 16: 1}", "block_size=4", "training.noise=counts"]
ADAPTED = ["adapt.clean=causal", "adapt.label=next", "adapt.ar_loss=.5", "block_size=4"]
ADAPTED += ["training.block_schedule={0: 1, 4: 4}", "training.noise=counts"]
WAYS = ALGORITHMS | {"counts": COUNTS, "sizes": SIZES, "adapted": ADAPTED}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(overrides, folder of a run of one process): dropout 0, since its masks are per process."""
    folder = tmp_path_factory.mktemp("one")
    overrides = [
        *tiny(folder),
        *ALGORITHMS["bamdlm"],
        "model.dropout=0",
        "loader.eval_global_batch_size=8",
    ]
    save_dir = f"checkpointing.save_dir={folder / 'run'}"
    code, text = run([*overrides, *BY_ONE, save_dir], folder / "log")
    assert code == 0, text
    return overrides, folder


def of_two(overrides, folder, *more, before=None):
    arguments = [*overrides, *TWO, *more, f"checkpointing.save_dir={folder / 'run'}"]
    return ranks(2, arguments, folder / "log.txt", before=before)


def equal_runs(ours, theirs, names=("trainer/loss", "val/nll", "valid_var_0.0 - 0.5")):
    ours_log, theirs_log = (read_log(f / "run/metrics.csv") for f in (ours, theirs))
    assert set(ours_log) == set(theirs_log)
    for name in names:
        assert ours_log[name].keys() == theirs_log[name].keys()
        for step, value in theirs_log[name].items():
            assert ours_log[name][step] == pytest.approx(value, rel=TOLERANCE), (name, step)
    a, b = read(ours / LAST), read(theirs / LAST)
    equal_states(a, b)


@pytest.mark.parametrize(
    ("strategy", "again", "saves"),
    [("ddp", "full", []), ("fsdp", "none", []), ("fsdp", "full", ONE_SAVE)],
    ids=["ddp-full", "fsdp-none", "fsdp-full"],
)
def test_two_processes_train_as_one(strategy, again, saves, one, tmp_path):
    """Also where they make the activations of a layer a second time."""
    overrides, alone = one
    more = f"strategy={strategy}", f"model.activation_checkpointing={again}", *saves
    started = of_two(overrides, tmp_path, *more)
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    equal_runs(tmp_path, alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_that_are_exchanged_in_bf16_train_nearly_alike(strategy, one, tmp_path):
    """bfloat16 has 8 bits: each gradient is off by at most 2^-8 of itself, and by as much again
    where it is added. Losses of ten steps are within 1e-3, and not those of float32."""
    overrides, alone = one
    more = "strategy.gradients=bf16", f"strategy={strategy}", *ONE_SAVE
    started = of_two(overrides, tmp_path, *more)
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    ours, theirs = (read_log(f / "run/metrics.csv")["trainer/loss"] for f in (tmp_path, alone))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours != pytest.approx(theirs, rel=TOLERANCE)
    weights, other = (read(folder / LAST)["state_dict"] for folder in (tmp_path, alone))
    assert any(not torch.allclose(weights[k], other[k], rtol=1e-4, atol=1e-4) for k in other)
    assert all(v.dtype == other[k].dtype for k, v in weights.items())


def test_an_exchange_in_bf16_is_refused_or_noted_where_there_is_none():
    words = ["data=text8", "wandb=null", "strategy.gradients=bf16"]
    _, _, notes = settings.examine(words)
    assert "strategy.gradients=bf16 has no effect: one device exchanges nothing" in notes
    _, _, notes = settings.examine([*words, "mode=prepare"])
    assert any("bf16 has no effect: mode=prepare has no gradients" in note for note in notes)
    _, problems, _ = settings.examine([*words, "trainer.devices=2", "model.param_dtype=bfloat16"])
    assert any("does not go with strategy.gradients=bf16" in problem for problem in problems)


def test_two_processes_train_by_muon_as_one(one, tmp_path):
    """Their losses: what the order of sums does to gradients near 0, Muon magnifies in weights."""
    overrides = [*one[0], "optim=muon", "algo.clip_search_widths=[]"]
    overrides += ["trainer.limit_val_batches=0", *ONE_SAVE]
    save_dir = f"checkpointing.save_dir={tmp_path / 'alone/run'}"
    code, text = run([*overrides, *BY_ONE, save_dir], tmp_path / "alone.txt")
    assert code == 0, text
    started = of_two(overrides, tmp_path)
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    ours, theirs = (read_log(f / "run/metrics.csv") for f in (tmp_path, tmp_path / "alone"))
    assert ours["trainer/loss"] == pytest.approx(theirs["trainer/loss"], rel=1e-4)


def test_two_processes_learn_the_law_of_counts_that_one_learns(one, tmp_path):
    """From the blocks of both."""
    overrides = [*one[0], *COUNTS, "algo.clip_search_widths=[]", *ONE_SAVE]
    save_dir = f"checkpointing.save_dir={tmp_path / 'alone/run'}"
    code, text = run([*overrides, *BY_ONE, save_dir], tmp_path / "alone.txt")
    assert code == 0, text
    started = of_two(overrides, tmp_path)
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    equal_runs(tmp_path, tmp_path / "alone", ("trainer/loss", "val/nll", "count_law_1"))
    ours, theirs = (read(f / LAST)["count_law"] for f in (tmp_path, tmp_path / "alone"))
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert not torch.equal(theirs, torch.ones(4).double())


@pytest.mark.parametrize(
    ("strategy", "algo", "way"),
    [
        ("ddp", "bamdlm", ["data.pack=documents"]),
        ("fsdp", "bamdlm", ["data.wrap=false"]),
        ("ddp", "counts", ["data.pack=documents"]),
        ("ddp", "sizes", ["data.pack=documents"]),
        ("ddp", "adapted", ["data.pack=documents"]),
        ("ddp", "sedd", ["data.wrap=false", "block_size=16"]),
        ("fsdp", "ar", ["data.wrap=false"]),
        ("ddp", "bamdlm", ["data.pack=documents", "data.streaming=true"]),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(part),
)
def test_tokens_count_the_same_on_one_process_and_two(
    strategy, algo, way, one, tmp_path, monkeypatch
):
    """Where rows differ in how many tokens count, a step is divided by those of all processes."""
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 300)  # also of the processes
    lines = [json.dumps({"text": "abcdefgh ijklmno"[: 1 + 7 * i % 15]}) for i in range(600)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(lines))
    overrides = [*one[0], *WAYS[algo], *way, f"data.train={texts}", f"data.valid={texts}"]
    overrides += ["trainer.max_steps=4", "trainer.limit_val_batches=0", "optim.eps=1e-4"]
    overrides += ["algo.clip_search_widths=[]", *ONE_SAVE]
    # micro-batches of 8; of 2 by each of two processes
    save_dir = f"checkpointing.save_dir={tmp_path / 'alone/run'}"
    code, text = run([*overrides, "loader.batch_size=8", save_dir], tmp_path / "alone.txt")
    assert code == 0, text
    started = of_two(overrides, tmp_path, f"strategy={strategy}", "loader.batch_size=2")
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    ours, theirs = (read_log(f / "run/metrics.csv") for f in (tmp_path, tmp_path / "alone"))
    wanted = theirs["trainer/loss"]
    assert list(wanted) == list(range(1, 5))
    assert ours["trainer/loss"] == pytest.approx(wanted, rel=TOLERANCE)
    assert ("trainer/ar_loss" in theirs) == (algo == "adapted")
    if algo == "adapted":
        assert ours["trainer/ar_loss"] == pytest.approx(theirs["trainer/ar_loss"], rel=TOLERANCE)
    # the order of sums differs; AdamW magnifies what that does to gradients near 0
    a, b = (read(f / LAST)["state_dict"] for f in (tmp_path, tmp_path / "alone"))
    for name, value in b.items():
        assert float((a[name] - value).abs().max()) <= 1e-5, name


@pytest.mark.parametrize(
    "measured",
    [
        "eval.likelihood=[nelbo,counts,exact,first_hitting,iw:2,left_to_right,greedy,margin,"
        "threshold:0.5]",
        "eval.block_sizes={1: 1, 4: 2, 16: 1}",
    ],
    ids=["likelihoods", "sizes"],
)
def test_two_processes_evaluate_every_row_once(measured, one, tmp_path):
    """11 rows in batches of 8: the last batch of the two processes has 2 rows and 1."""
    overrides, alone = one
    words = [*overrides, "mode=ppl_eval", f"eval.checkpoint_path={alone / LAST}"]
    words += [measured, "eval.draws=2"]
    found = []
    for name, more in (("one", BY_ONE), ("two", TWO)):
        arguments = [*words, *more, f"checkpointing.save_dir={tmp_path / name}"]
        started = ranks(len(found) + 1, arguments, tmp_path / f"{name}.txt")
        assert finish(started) == [0] * len(started), started[0].text()
        (path,) = (tmp_path / name).glob("ppl_*.json")
        found.append(json.loads(path.read_text()))
    ours, theirs = found
    assert ours["rows"] == theirs["rows"] == 11
    assert ours["tokens"] == theirs["tokens"]
    assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=TOLERANCE)
    assert ours["ppl_error"] == pytest.approx(theirs["ppl_error"], rel=TOLERANCE)
    for one, two in zip(ours["likelihoods"], theirs["likelihoods"], strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=TOLERANCE)
        error = two["draw_error"]  # the mixture has none
        assert one["draw_error"] == (error and pytest.approx(error, rel=TOLERANCE))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_moves_between_one_process_and_two(strategy, one, tmp_path):
    """One step on two, stopped by a signal to one of them; one process goes on; then two again."""
    overrides, alone = [*one[0], *ONE_SAVE], one[1]

    def told(rank):
        if rank == 1:
            patched(2, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    started = of_two(overrides, tmp_path, f"strategy={strategy}", before=told)
    assert finish(started) == [GO_ON, GO_ON], started[0].text() + started[1].text()
    assert read(tmp_path / LAST)["global_step"] == 2
    more = [f"checkpointing.save_dir={tmp_path / 'run'}"]
    more += [*BY_ONE, "trainer.max_steps=6"]
    code, text = run([*overrides, *more], tmp_path / "log1")
    assert code == 0, text
    started = of_two(overrides, tmp_path, f"strategy={strategy}")
    assert finish(started) == [0, 0], started[0].text() + started[1].text()
    equal_states(read(tmp_path / LAST), read(alone / LAST))


@pytest.mark.parametrize(("strategy", "late"), [("ddp", True), ("fsdp", False)])
def test_a_stopped_run_goes_on_to_the_same_bits(strategy, late, one, tmp_path):
    """late: ranks answer each other as on GPUs, else as on a CPU. fsdp is stopped once, in a
    validation; that it stops at a signal, test_a_run_moves_between_one_process_and_two shows."""
    overrides = [*one[0], f"strategy={strategy}", "model.dropout=0.2"]
    overrides += ONE_SAVE * (strategy == "fsdp")

    def of_two_ends(code, *more, **before):
        started = of_two(overrides, tmp_path, *more, **before)
        assert finish(started) == [code, code], started[0].text() + started[1].text()
        return read(tmp_path / LAST)

    whole = of_two_ends(0)
    (tmp_path / "run").rename(tmp_path / "whole")

    def told(rank):
        answers(late)
        if rank == 1:
            patched(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    def over(rank):
        answers(late)
        if rank == 1:
            patched(3, lambda: setattr(Deadline, "over", lambda self: True))

    def over_in_validation(rank):
        answers(late)
        real = Diffusion.validation_step

        def step(self, batch, batch_idx):
            if rank == 1:
                Deadline.over = lambda self: True
            return real(self, batch, batch_idx)

        Diffusion.validation_step = step

    max_time = "trainer.max_time=00:01:00:00"
    if strategy == "ddp":
        assert of_two_ends(GO_ON, before=told)["global_step"] == 4
        assert of_two_ends(0, max_time, before=over)["global_step"] == 8
        used_up = of_two_ends(0, "trainer.max_time=00:00:00:00")
        assert used_up["global_step"] == 8
    validated = 8 if strategy == "ddp" else 4
    assert of_two_ends(0, max_time, before=over_in_validation)["global_step"] == validated
    assert differences(of_two_ends(0), whole) == []


def answers(late):
    """How ranks answer each other; and that none asks the first one ahead of every batch."""

    def asked(self):
        raise AssertionError("Lightning would have waited for the device")

    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    _TrainingEpochLoop._broadcast_sigterm_tensor = asked
    saving.Poll = functools.partial(Poll, late=late)


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_is_that_to_the_question_before(late, tmp_path):
    """Two questions; of two processes the second says yes to one at a time."""

    def asks(rank):
        torch.distributed.init_process_group("gloo")
        poll, cpu = Poll(late=late), torch.device("cpu")
        given = [poll(cpu, rank == 1 and i == 1, rank == 1 and i == 2) for i in range(4)]
        expected = [[False, False], [True, False], [False, True], [False, False]]
        assert given == (expected[:1] * late + expected)[:4], given
        torch.distributed.destroy_process_group()
        os._exit(7)

    assert finish(ranks(2, [], tmp_path / "log", before=asks)) == [7, 7]


def test_a_save_that_fails_on_the_first_rank_is_tried_again_by_both(one, tmp_path):
    """At the last step: the next attempt is that at the end. Nor does a line come twice."""
    overrides, alone = one

    def full(rank):
        real, calls = torch_file.save, [0]

        def save(checkpoint, path):
            calls[0] += path.endswith("step=10.ckpt")
            if rank == 0 and calls[0] == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(checkpoint, path)

        torch_file.save = save

    more = ["callbacks.checkpoint_every_n_steps.every_n_train_steps=10"]
    more += ["checkpointing.on_save_error=continue", "callbacks.checkpoint_monitor=null"]
    started = of_two(overrides, tmp_path, *more, before=full)
    text = "".join(each.text() for each in started if each.wait() == 0)
    assert text.count("step=10.ckpt could not be written") == 1, text
    assert text.count("step 8: validation perplexity") == 1
    equal_states(read(tmp_path / LAST), read(alone / LAST))


def test_a_save_that_failed_ends_the_run_with_its_reason_though_the_next_one_succeeds(
    one, tmp_path
):
    """The answers come late, as on GPUs."""

    def full(rank):
        answers(late=True)
        real = torch_file.save

        def save(checkpoint, path):
            if path.endswith("step=2.ckpt"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(checkpoint, path)

        torch_file.save = save

    more = ["callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]
    started = of_two(one[0], tmp_path, *more, "checkpointing.on_save_error=stop", before=full)
    assert finish(started) == [1, 1], started[0].text() + started[1].text()
    reason = started[0].text().rindex("rank 0 failed in step")
    assert "step=2.ckpt could not be written" in started[0].text()[reason:]
    assert read(tmp_path / LAST)["global_step"] == 3


def patched(call, act):
    real, calls = Diffusion.training_step, [0]

    def step(self, batch, batch_idx):
        calls[0] += 1
        if calls[0] == call:
            act()
        return real(self, batch, batch_idx)

    Diffusion.training_step = step


def fail():
    raise ZeroDivisionError("a fault of rank 1")


@pytest.mark.parametrize("way", ["killed", "raises"])
def test_a_rank_that_dies_brings_the_job_down(way, one, tmp_path):
    overrides, _ = one
    act = fail if way == "raises" else lambda: os.kill(os.getpid(), signal.SIGKILL)
    started = of_two(overrides, tmp_path, before=lambda rank: rank and patched(3, act))
    begun = time.monotonic()
    codes = finish(started, timeout=60)
    assert time.monotonic() - begun < 60
    assert codes[0] != 0
    assert codes[1] == (1 if way == "raises" else -signal.SIGKILL)
    if way == "raises":
        text = started[1].text()
        assert "rank 1 failed in step 3" in text
        assert text.index("a fault of rank 1") < len(text)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
