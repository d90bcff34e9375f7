"""A run that was killed or stopped, and then goes on, is bit for bit the run that was not."""

import os
import shutil
import signal

import pytest
from runs import ALGORITHMS, Run, run, tiny

from benchmarks.chaos import differences, read
from diffusion import Diffusion
from training.signals import GO_ON

LAST = "run/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def wholes(base, tmp_path_factory):
    """algorithm -> (overrides, folder, the last checkpoint) of a run that nothing disturbed."""
    made = {}

    def make(algo):
        if algo not in made:
            folder = tmp_path_factory.mktemp(algo)
            save_dir = f"checkpointing.save_dir={folder / 'run'}"
            overrides = [*base, *ALGORITHMS[algo], save_dir]
            code, text = run(overrides, folder / "log")
            assert code == 0, text
            last = read(folder / LAST)
            made[algo] = overrides, folder, last
        overrides, folder, last = made[algo]
        shutil.rmtree(folder / "run", ignore_errors=True)
        return overrides, folder, last

    return make


def at_call(owner, name, number, act):
    """Patch for the new process: `act` happens as call `number` of owner.name begins."""
    real, calls = getattr(owner, name), [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            act()
        return real(*args, **kwargs)

    return lambda: setattr(owner, name, counting)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def tell(number, times=1):
    def act():
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act


def goes_on_to_the_same_end(overrides, folder, expected):
    code, text = run(overrides, folder / "log")
    assert code == 0, text
    assert differences(read(folder / LAST), expected) == []
    return text


# validation comes after steps 4 and 8, a checkpoint at 4, 8 and the end
MOMENTS = {
    "validation, once step 4 is saved": (Diffusion, "validation_step", 2),
    "the second micro-batch of a step": (Diffusion, "training_step", 4),
    "the renaming of a checkpoint": (os, "replace", 3),
    "the first micro-batch after resuming": (Diffusion, "training_step", 1),
}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_killed_again_and_again_it_ends_the_same(algo, wholes):
    overrides, folder, expected = wholes(algo)
    moments = list(MOMENTS.items())[: 4 if algo == "bamdlm" else 2]
    for moment, (owner, name, call) in moments:
        code, text = run(overrides, folder / "log", before=at_call(owner, name, call, kill))
        assert code == -signal.SIGKILL, f"{moment}: {text}"
    assert "going on from step" in goes_on_to_the_same_end(overrides, folder, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_told_to_stop_it_saves_between_steps_and_goes_on(number, wholes):
    """Told in the first micro-batch of step 3, twice, and on going on in a validation."""
    overrides, folder, expected = wholes("bamdlm")
    before = at_call(Diffusion, "training_step", 5, tell(number, times=2))
    code, text = run(overrides, folder / "log", before=before)
    assert (code, read(folder / LAST)["global_step"]) == (GO_ON, 3), text
    assert f"stopping at step 3 on {number.name}: saved" in text
    assert "Traceback" not in text
    before = at_call(Diffusion, "validation_step", 1, tell(number))
    code, text = run(overrides, folder / "log", before=before)
    assert (code, read(folder / LAST)["global_step"]) == (GO_ON, 4), text
    goes_on_to_the_same_end(overrides, folder, expected)


def test_told_in_a_validation_of_a_step_that_is_not_saved_yet(base, tmp_path):
    """The averaged weights are in place then; the raw ones belong in the checkpoint."""
    every = "callbacks.checkpoint_every_n_steps.every_n_train_steps=3"  # validation: after 4 and 8
    save_dir = f"checkpointing.save_dir={tmp_path / 'run'}"
    overrides = [*base, *ALGORITHMS["bamdlm"], every, save_dir]
    code, text = run(overrides, tmp_path / "log")
    assert code == 0, text
    expected = read(tmp_path / LAST)
    shutil.rmtree(tmp_path / "run")
    before = at_call(Diffusion, "validation_step", 1, tell(signal.SIGTERM))
    code, text = run(overrides, tmp_path / "log", before=before)
    assert (code, read(tmp_path / LAST)["global_step"]) == (GO_ON, 4), text
    goes_on_to_the_same_end(overrides, tmp_path, expected)


def test_a_signal_before_training_ends_the_process_and_loses_nothing(wholes):
    overrides, folder, expected = wholes("ar")
    process = Run(overrides, folder / "log", before=tell(signal.SIGUSR1))
    assert process.wait() == -signal.SIGUSR1  # 138 to a shell: scripts/job.sh requeues
    goes_on_to_the_same_end(overrides, folder, expected)


def test_without_checkpoints_a_signal_ends_the_process(wholes):
    """It would be noted, and nobody would read the note."""
    overrides, folder, _ = wholes("ar")
    before = at_call(Diffusion, "training_step", 2, tell(signal.SIGTERM))
    code, text = run(
        [*overrides, "trainer.enable_checkpointing=false"], folder / "log", before=before
    )
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


def test_few_checkpoints_are_kept(wholes):
    overrides, folder, _ = wholes("ar")
    few = ["callbacks.checkpoint_every_n_steps.every_n_train_steps=1", "checkpointing.keep_every=4"]
    code, text = run([*overrides, *few, "callbacks.checkpoint_monitor=null"], folder / "log")
    assert code == 0, text
    kept = sorted(p.name for p in (folder / "run").rglob("*.ckpt"))  # nor any of Lightning's own
    assert kept == ["last.ckpt", "step=10.ckpt", "step=4.ckpt", "step=8.ckpt", "step=9.ckpt"]


def test_without_intervals_the_end_is_saved(wholes):
    overrides, folder, _ = wholes("ar")
    none = ["callbacks.checkpoint_every_n_steps=null", "callbacks.checkpoint_monitor=null"]
    code, text = run([*overrides, *none], folder / "log")
    assert code == 0, text
    kept = sorted(p.name for p in (folder / "run").rglob("*.ckpt"))
    assert kept == ["last.ckpt", "step=10.ckpt"]
