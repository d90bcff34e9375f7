"""A run that was killed or stopped, and then goes on, is bit for bit the run that was not."""

import os
import shutil
import signal

import pytest
from runs import (
    ALGORITHMS,
    LAST,
    Run,
    at_call,
    differences,
    goes_on_to_the_same_end,
    read,
    run,
    tell,
    tiny,
)

from diffusion import Diffusion
from training.signals import GO_ON

# validation comes after steps 4 and 8, a checkpoint at 4, 8 and the end
MOMENTS = {
    "validation, once step 4 is saved": (Diffusion, "validation_step", 2),
    "the second micro-batch of a step": (Diffusion, "training_step", 4),
    "the renaming of a checkpoint": (os, "replace", 3),
    "the first micro-batch after resuming": (Diffusion, "training_step", 1),
}
KILLED_AT = {  # every algorithm is killed, noise by counts too, and at every moment
    "bamdlm": list(MOMENTS),
    "ar": ["the second micro-batch of a step"],
    "counts": ["validation, once step 4 is saved", "the first micro-batch after resuming"],
    "mdlm": ["validation, once step 4 is saved"],
    "sedd": ["the renaming of a checkpoint"],
}


@pytest.mark.parametrize("algo", KILLED_AT)
def test_killed_again_and_again_it_ends_the_same(algo, wholes):
    overrides, folder, expected = wholes(algo)
    for moment in KILLED_AT[algo]:
        before = at_call(*MOMENTS[moment], tell(signal.SIGKILL))
        code, text = run(overrides, folder / "log", before=before)
        assert code == -signal.SIGKILL, f"{moment}: {text}"
    saved = any((folder / "run/checkpoints").glob("step=*.ckpt"))
    text = goes_on_to_the_same_end(overrides, folder, expected)
    assert ("going on from step" in text) == saved


@pytest.mark.slow
def test_compiled_it_goes_on_to_the_same_bits(tmp_path):
    """By the compiler of a CPU, with dropout."""
    words = [*tiny(tmp_path), *ALGORITHMS["bamdlm"], "model.compile=true", "model.dropout=0.1"]
    ends = []
    for name, stops in (("whole", (6,)), ("parts", (3, 6))):
        folder = tmp_path / name
        for steps in stops:
            more = [f"trainer.max_steps={steps}", f"checkpointing.save_dir={folder}"]
            code, text = run([*words, *more], tmp_path / "log")
            assert code == 0, text
        ends.append(read(folder / "checkpoints/last.ckpt"))
    whole, parts = ends
    for state in "state_dict", "optimizer_states", "ema":
        assert differences(parts[state], whole[state]) == []


def test_told_to_stop_it_saves_between_steps_and_goes_on(wholes):
    """In the first micro-batch of step 2, twice; in the validation after step 4, which is not saved
    yet (averaged weights are in place then, and raw ones belong in the checkpoint); in the one
    after step 8, which is."""
    overrides, folder, expected = wholes("bamdlm")
    seldom = "callbacks.checkpoint_every_n_steps.every_n_train_steps=3"
    for more, number, times, name, call, step in (
        ([seldom], signal.SIGTERM, 2, "training_step", 3, 2),
        ([seldom], signal.SIGUSR1, 1, "validation_step", 1, 4),
        ([], signal.SIGTERM, 1, "validation_step", 4, 8),  # the one after step 4 has 3 batches
    ):
        before = at_call(Diffusion, name, call, tell(number, times))
        code, text = run([*overrides, *more], folder / "log", before=before)
        assert (code, read(folder / LAST)["global_step"]) == (GO_ON, step), text
        assert f"stopping at step {step} on {number.name}: saved" in text
        assert "Traceback" not in text
    goes_on_to_the_same_end(overrides, folder, expected)


def test_where_nobody_would_read_a_note_a_signal_ends_the_process(wholes):
    """Before training, and in a run without checkpoints."""
    overrides, folder, expected = wholes("ar")
    process = Run(overrides, folder / "log", before=tell(signal.SIGUSR1))
    assert process.wait() == -signal.SIGUSR1  # 138 to a shell: scripts/job.sh requeues
    goes_on_to_the_same_end(overrides, folder, expected)
    shutil.rmtree(folder / "run")
    before = at_call(Diffusion, "training_step", 2, tell(signal.SIGTERM))
    none = "trainer.enable_checkpointing=false"
    code, text = run([*overrides, none], folder / "log", before=before)
    assert code == -signal.SIGTERM, text


def test_the_newest_complete_checkpoint_is_taken_and_named(wholes):
    overrides, folder, expected = wholes("ar")
    code, text = run([*overrides, "trainer.max_steps=9"], folder / "log")
    assert code == 0, text
    checkpoints = folder / "run/checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "step=8.ckpt",
        "step=9.ckpt",
    ]
    whole = (checkpoints / "step=9.ckpt").read_bytes()
    for name in ("step=9.ckpt", "last.ckpt"):  # one file with two names
        (checkpoints / name).unlink()
        (checkpoints / name).write_bytes(whole[: len(whole) // 2])
    (checkpoints / ".step=7.ckpt.x.partial").touch()  # of a save that was killed
    text = goes_on_to_the_same_end(overrides, folder, expected)
    for name in ("last.ckpt", "step=9.ckpt"):
        assert f"not complete: {checkpoints}/{name} is damaged or was cut short" in text
    assert f"going on from step 8 of {checkpoints}/step=8.ckpt" in text
    assert not list(checkpoints.glob("*.partial"))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (
            ["callbacks.checkpoint_every_n_steps.every_n_train_steps=1"],
            ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=5.ckpt"],
        ),
        (["callbacks.checkpoint_every_n_steps=null"], ["last.ckpt", "step=5.ckpt"]),
    ],
    ids=["every step", "no interval"],
)
def test_few_checkpoints_are_kept(settings, kept, wholes):
    """The last one, and those of every second step; without an interval the end alone is saved."""
    overrides, folder, _ = wholes("ar")
    few = ["trainer.max_steps=5", "checkpointing.keep_every=2", "trainer.limit_val_batches=0"]
    few.append("callbacks.checkpoint_monitor=null")
    code, text = run([*overrides, *settings, *few], folder / "log")
    assert code == 0, text
    found = sorted(p.name for p in (folder / "run").rglob("*.ckpt"))  # nor any of Lightning's own
    assert found == kept
    shutil.rmtree(folder / "run")
