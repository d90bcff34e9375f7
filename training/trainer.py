"""The Lightning trainer of a run, its logs and callbacks, and where a stopped run goes on."""

import dataclasses
import math
import os

import lightning as L
from fsspec.core import url_to_fs
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import Strategy

import settings
from checkpointing.checkpoint import Checkpoint, section
from checkpointing.layouts import read_checkpoint
from checkpointing.restricted_pickle import CheckpointError
from settings import Config
from settings.defaults import all_devices
from training.checkpoint_io.files import CarefulIO
from training.checkpoint_io.parts import PartsIO
from training.csv_log import CSVLog
from training.distributed import Replicated, Sharded
from training.flops import matmul_dtype
from training.health import RankFailure, StallWatch
from training.logged import StepLog
from training.profiling import TorchTrace
from training.progress import NetworkSummary, RunProgress
from training.saving import LAST, BestCheckpoint, Deadline, StepCheckpoints, steps_in
from training.signals import Signals
from utils import plain_errors, say


def build_trainer(
    config: Config,
    *,
    loggers: list,
    signals: Signals | None = None,
    step_flops: float | None = None,
) -> L.Trainer:
    """`signals`: what tells training to stop; the caller lets it listen. `step_flops`: of a
    sequence, forward and backward. Only training needs them."""
    t = config.trainer
    in_parts = config.checkpointing.format == "sharded" and config.mode == "train"
    io = PartsIO() if in_parts else CarefulIO()
    callbacks = []
    if step_flops is not None and loggers:
        rates = _rates(config) == "step"
        callbacks.append(StepLog(step_flops, matmul_dtype(t.precision), rates=rates))
    callbacks += [RunProgress()] if t.enable_progress_bar else []
    if config.mode == "train":
        callbacks += training_callbacks(config, io, signals or Signals())
    ours = {  # the other settings of trainer.* are arguments of Lightning's of the same name
        "gradient_clip_val": t.gradient_clip_val or None,
        "max_time": None,  # there is a Deadline
        "profiler": None,  # there is a TorchTrace
        # true without one of Lightning's own would make it add one
        "enable_checkpointing": any(isinstance(each, BestCheckpoint) for each in callbacks),
        "enable_model_summary": False,  # ours is among the callbacks
    }
    trainer = L.Trainer(
        **dataclasses.asdict(t) | ours,
        strategy=build_strategy(config),
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[io],
        use_distributed_sampler=False,  # the data module shares out rows itself
        default_root_dir=settings.local_folder(config.checkpointing.save_dir),
    )
    leave_signals(trainer)
    return trainer


def build_strategy(config: Config) -> Strategy | str:
    """fsdp is for training; an evaluation holds the network once per device."""
    devices, half = all_devices(config), config.strategy.gradients == "bf16"
    if devices == 1:
        return "auto"
    if config.strategy.name == "fsdp" and config.mode == "train":
        return Sharded(devices, config.strategy.replicate, half)
    return Replicated(half)


def leave_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals; saving.py reads them between steps.

    Its handlers would save, requeue and talk to other devices while a signal is handled. Before
    each batch it also asks the first of several devices whether it was told to end, and waits for
    all the work of that device. Lightning has no setting and no hook for either, so two of its
    private methods are replaced, here alone.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def training_callbacks(config: Config, io: CarefulIO, signals: Signals) -> list[L.Callback]:
    """The summary of the network, what watches over the run, what saves and stops it."""
    t, c, wanted = config.trainer, config.checkpointing, config.callbacks
    every, best = wanted.checkpoint_every_n_steps, wanted.checkpoint_monitor
    made = [NetworkSummary()] if t.enable_model_summary else []
    made += [RankFailure(), StallWatch()]
    if t.profiler is not None:
        made.append(TorchTrace(settings.local_folder(c.save_dir)))
    deadline = None if t.max_time is None else Deadline(t.max_time)
    if t.enable_checkpointing or deadline is not None:
        steps = every.every_n_train_steps if every else 0
        saver = StepCheckpoints(
            settings=c,
            folder=checkpoint_folder(c),
            every=steps if t.enable_checkpointing else None,
            io=io,
            signals=signals,
            deadline=deadline,
        )
        made += [saver] if deadline is None else [saver, deadline]
    if t.enable_checkpointing and best:
        made.append(
            BestCheckpoint(
                **dataclasses.asdict(best),
                dirpath=checkpoint_folder(c),
                filename="best" if best.save_top_k == 1 else "best-{step}",
                enable_version_counter=False,
            )
        )
    if _rates(config) == "epoch":
        made.append(LearningRateMonitor("epoch"))
    return made


def _rates(config: Config) -> str | None:
    """When the learning rate is logged."""
    monitor = config.callbacks.learning_rate_monitor
    return monitor and monitor.logging_interval


def checkpoint_folder(c: settings.Checkpointing) -> str:
    return f"{c.save_dir.rstrip('/')}/checkpoints"


def training_logs(config: Config) -> list:
    """metrics.csv in the run folder, and wandb unless wandb=null: offline with one line where
    nobody is logged in, never a prompt."""
    folder, w = settings.local_folder(config.checkpointing.save_dir), config.wandb
    own = CSVLog(folder / "metrics.csv")
    if w is None:
        return [own]
    import wandb

    mode = "offline" if w.offline else os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not wandb.login(prompt=False):
        say(f"wandb: nobody is logged in, logging to {folder}/wandb (wandb login, or wandb=null)")
        mode = "offline"
    if mode == "offline":
        # WandbLogger(offline=True) sets an environment variable, which wandb has read by now
        wandb.setup(wandb.Settings(mode="offline", silent=True))
    folder.mkdir(parents=True, exist_ok=True)
    named = dataclasses.asdict(w)
    del named["offline"]
    about = dataclasses.asdict(config)
    logger = WandbLogger(**named, save_dir=folder, config=about, resume="allow")
    del logger._wandb_init["anonymous"]  # wandb warns of it, whatever its value
    return [own, logger]


def resume_point(config: Config) -> Checkpoint | None:
    """The checkpoint to go on from, or None; refuses one of a run with other shaping settings."""
    if not config.checkpointing.resume_from_ckpt:
        return None
    with plain_errors(config.checkpointing.resume_ckpt_path):
        checkpoint = newest_complete(config.checkpointing)
    if checkpoint is None or "examples_seen" not in section(checkpoint.raw, "sampler"):
        return checkpoint  # a file of the authors does not tell of all settings
    if differing := settings.differences(config, checkpoint.config):
        raise ValueError(
            f"{checkpoint.source} belongs to a run with other settings: {'; '.join(differing)}."
            " Give those, another checkpointing.save_dir, or checkpointing.resume_from_ckpt=false"
        )
    return checkpoint


def newest_complete(c: settings.Checkpointing) -> Checkpoint | None:
    """What checkpointing.resume_ckpt_path names; if that is the run's own last.ckpt and cannot be
    read or is not the newest, the newest that can. None where there is no file at all."""
    folder = checkpoint_folder(c)
    last = c.resume_ckpt_path
    if last != f"{folder}/{LAST}":
        return read_checkpoint(last, numbers=False) if exists(last) else None
    steps = sorted(steps_in(folder), reverse=True)
    files = {math.inf: last} if exists(last) else {}
    files |= {step: f"{folder}/step={step}.ckpt" for step in steps}
    damaged, newest = [], None
    for step, path in files.items():
        if newest is not None and (newest.step or 0) >= step:
            break
        try:
            newest = read_checkpoint(path, numbers=False)
        except CheckpointError as error:
            damaged.append(str(error))
    best = f"{folder}/best.ckpt"
    if newest is None and damaged and exists(best):
        newest = read_checkpoint(best, numbers=False)
    for problem in dict.fromkeys(damaged):  # last.ckpt may lead to one of the others
        say(f"not complete: {problem}")
    if newest is None and damaged:
        raise ValueError(
            f"no checkpoint in {folder} can be read; delete them or give"
            " checkpointing.resume_from_ckpt=false to start anew"
        )
    return newest


def exists(path: str) -> bool:
    fs, place = url_to_fs(path)
    return fs.exists(place)


def examples_seen(checkpoint: Checkpoint, config: Config) -> int:
    """How far into the stream of examples a checkpoint is; the authors' files do not say."""
    by_steps = checkpoint.step * config.loader.global_batch_size
    return section(checkpoint.raw, "sampler").get("examples_seen", by_steps)
