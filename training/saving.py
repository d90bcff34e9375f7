"""When checkpoints are written, which are kept, and how a run stops: between optimizer steps."""

import re
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import lightning as L
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn

from checkpointing import replacing
from models.compiling import keep_signal
from settings import Checkpointing
from training.averaging import put_average
from training.checkpoint_io.files import CarefulIO
from training.checkpoint_io.parts import PartsIO
from training.distributed import Poll
from training.signals import BY_HAND, GO_ON, LOST, Signals, Stopped
from utils import DataFailure, Failure, atomic_link, say

LAST = "last.ckpt"


class SaveError(Failure):
    """A checkpoint could not be written and checkpointing.on_save_error=stop."""


class Deadline(Timer):
    """trainer.max_time, by Lightning's clock, which a checkpoint keeps.

    Lightning's own Timer would make one validation more than a run that is not stopped. It would
    also ask the first rank after each batch, which waits for the device.
    """

    state_key = Timer.__qualname__  # in checkpoints

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.strategy.reduce_boolean_decision(self.over(), all=False):
            step = trainer.global_step
            say(f"at step {step:,}: trainer.max_time is used up, no step is made")
            raise Stopped(0)

    def state_dict(self) -> dict:
        """Seconds, also of stages that have not begun; Lightning has the integer 0 for those."""
        seconds = super().state_dict()["time_elapsed"]
        return {"time_elapsed": {stage: float(spent) for stage, spent in seconds.items()}}

    def _check_time_remaining(self, trainer) -> None:
        """Nothing: this is where Lightning's Timer would end the run."""

    def over(self) -> bool:
        begun = self.start_time() is not None  # not so in the validation ahead of training
        return begun and self.time_remaining() <= 0


@dataclass(eq=False)
class StepCheckpoints(L.Callback):
    """Writes step=N.ckpt every `every` steps, at the end, and when the run is told to stop or the
    deadline has passed. With every=0 only the last two are written, with None nothing. last.ckpt is
    the newest of these files.

    The newest `keep_last` of them are kept (-1: all), and each whose step is a multiple of
    `keep_every`. The ranks ask each other whether to stop, after each step and each batch of a
    validation.
    """

    settings: Checkpointing  # checkpointing.*
    folder: str
    every: int | None
    io: CarefulIO
    signals: Signals
    deadline: Deadline | None
    _step: int = 0
    _begun: int | None = None  # the step that is being written
    _saved: int | None = None  # the step that is on the disk
    _failure: str = ""
    _poll: Poll = field(default_factory=Poll)

    def on_train_start(self, trainer, pl_module) -> None:
        self._step = self._saved = trainer.global_step
        self._poll = Poll()
        if trainer.is_global_zero and self.every is not None:
            self.io.attempt(self.folder, self._tidy, "tidied up")

    def _tidy(self) -> None:
        """Delete what saves that were killed left unfinished. No later save may replace it."""
        fs, place = url_to_fs(self.folder)
        for path in fs.ls(place, detail=False) if fs.isdir(place) else []:
            if path.endswith(".partial"):
                fs.rm(path, recursive=True)
        if isinstance(fs, LocalFileSystem):
            for left in list(replacing.left_behind(Path(place))):
                replacing.remove(left)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self._step:
            return  # between two micro-batches
        self._step = trainer.global_step
        if self.every and self._step % self.every == 0:
            self.save(trainer, wait=False)
        self.stop_if_told(trainer)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        """A validation that is broken off begins anew when the run goes on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.stop_if_told(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        """With on_save_error=continue as well: what was trained since the last save is lost."""
        if self.every is not None and not self.save(trainer):
            failure = self.io.failed(*self._paths(trainer.global_step))
            failure = failure or "the last checkpoint could not be written by rank 0"
            raise SaveError(f"not saved: step {trainer.global_step:,}; {failure}")

    def on_exception(self, trainer, pl_module, exception) -> None:
        """Data that end are missed between two steps. Several ranks do not miss them together, and
        could not save together. What they have begun to save, they finish."""
        self.io.wait()
        alone = trainer.world_size == 1 and self._saved is not None  # and training has begun
        if isinstance(exception, DataFailure) and alone:
            put_average(pl_module, False)
            if self.save(trainer):
                say(f"saved step {trainer.global_step:,}; the same command goes on from here")

    def stop_if_told(self, trainer) -> None:
        """Every rank must call this equally often. They stop together, with the raw weights in
        place."""
        keep_signal()
        told = self.signals.received is not None
        over = self.deadline is not None and self.deadline.over()
        self._notice_failure()
        device = trainer.strategy.root_device
        any_told, any_over, any_failed = self._poll(device, told, over, bool(self._failure))
        if any_failed:
            raise SaveError(self._failure or "a checkpoint could not be written by rank 0")
        if not (any_told or any_over):
            return
        put_average(trainer.lightning_module, False)
        saved, place = self.save(trainer), f"stopping at step {trainer.global_step:,}"
        if not any_told:
            what = "saved; a longer one goes on from here" if saved else "nothing was saved"
            say(f"{place}: trainer.max_time has passed; {what}")
            raise Stopped(0 if saved or self.every is None else LOST)
        name = self.signals.received.name if told else "a signal"
        what = "saved; the same command goes on from here" if saved else "could not save"
        say(f"{place} on {name}: {what if trainer.global_step else 'nothing to save yet'}")
        raise Stopped(self._exit_code(trainer, saved))

    def _exit_code(self, trainer, saved: bool) -> int:
        by_hand = self.signals.received == signal.SIGINT
        code = GO_ON if saved else LOST
        code = BY_HAND if trainer.strategy.reduce_boolean_decision(by_hand, all=False) else code
        # Lightning's own launcher kills the whole job when one of its processes ends with an error
        ours = trainer.strategy.cluster_environment if trainer.world_size > 1 else None
        started_by_lightning = ours is not None and not ours.creates_processes_externally
        return 0 if started_by_lightning and not trainer.is_global_zero else code

    def _notice_failure(self) -> None:
        """The answer of other ranks may come when a later save has succeeded."""
        failure = self.io.failed(*self._paths(self._begun))
        if failure is not None and self.settings.on_save_error == "stop":
            self._failure = failure

    def _paths(self, step: int | None) -> tuple[str, str]:
        """What a save of this step writes."""
        return f"{self.folder}/step={step}.ckpt", f"{self.folder}/{LAST}"

    def save(self, trainer, *, wait: bool = True) -> bool:
        """Save this step unless that is done. Returns whether it is on disk; without `wait`, where
        it is written while training goes on, whether that is still possible. Only the first rank
        knows of a failure, and it tells the others: another attempt needs all ranks."""
        step = trainer.global_step
        if self.every is None or step == self._saved:
            return self.every is not None
        again = step == self._begun
        if not again:
            self.io.wait()
            self._notice_failure()
            self.io.failure = None
            path, last = self._paths(step)
            trainer.save_checkpoint(path)
            self._begun = step
            if trainer.is_global_zero:
                keep = partial(self._keep, path)
                self.io.afterwards(lambda: self.io.attempt(last, keep))
        if isinstance(self.io, PartsIO) and not wait:
            return True
        self.io.wait()
        self._begun = None
        failure = self.io.failed(*self._paths(step))
        saved = trainer.strategy.reduce_boolean_decision(failure is None)
        if saved:
            self._saved = step
        return saved or (again and self.save(trainer))  # it failed while training went on

    def _keep(self, path: str) -> None:
        """Makes `path` the last checkpoint, then deletes those that are not to be kept."""
        fs, newest = url_to_fs(path)
        folder, name = newest.rpartition("/")[::2]
        local = isinstance(fs, LocalFileSystem)
        if local:
            with replacing.making_way(Path(folder, LAST), keeps=True):
                atomic_link(f"{folder}/{LAST}", newest)
        else:
            fs.cp_file(newest, f"{folder}/{LAST}")
        keep_last, keep_every = self.settings.keep_last, self.settings.keep_every
        steps = sorted(steps_in(self.folder))
        for step in steps[: len(steps) - keep_last] if keep_last >= 0 else []:
            old = f"step={step}.ckpt"
            if old == name or (keep_every and step % keep_every == 0):
                continue
            replacing.remove(Path(folder, old)) if local else fs.rm_file(f"{folder}/{old}")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, whose state after a resume is that of a run that was not interrupted, also where
    the run folder has another name now."""

    def state_dict(self) -> dict:
        return {**super().state_dict(), "current_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict) -> None:
        """Files elsewhere are forgotten: the checkpoint may be anyone's, and what is no longer
        among the best is deleted."""
        state = _moved(state_dict, self.dirpath)
        named = [*state.get("best_k_models", {}), *(state.get(name, "") for name in BEST_PATHS)]
        if all(_is_best(path, self.dirpath) for path in named if path):
            super().load_state_dict(state)


BEST_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def _is_best(path: object, folder: str) -> bool:
    """Whether a path is one that a BestCheckpoint of this folder writes."""
    place, _, name = str(path).rpartition("/")
    return place == folder and re.fullmatch(r"best(-step=\d+)?\.ckpt", name) is not None


def _moved(state: dict, folder: str) -> dict:
    """The state of a BestCheckpoint whose files have come along into `folder`. Otherwise it is as
    it was, and Lightning forgets scores that belong to another folder."""

    def here(path: str) -> str:
        return path and f"{folder}/{path.rpartition('/')[2]}"

    best = {here(path): score for path, score in state.get("best_k_models", {}).items()}
    if not best or not all(fs.exists(place) for fs, place in map(url_to_fs, best)):
        return state
    paths = {name: here(state.get(name, "")) for name in BEST_PATHS}
    return state | paths | {"dirpath": folder, "best_k_models": best}


def steps_in(folder: str) -> list[int]:
    """The steps N of which folder/step=N.ckpt exists."""
    fs, path = url_to_fs(folder)
    names = fs.ls(path, detail=False) if fs.isdir(path) else []
    numbered = (re.fullmatch(r"(?:.*/)?step=(\d+)\.ckpt", name) for name in names)
    return [int(match[1]) for match in numbered if match]
