"""mode=train: train, or continue the run that the same command began."""

import os
from collections.abc import Callable

import lightning as L

import settings
from checkpointing.as_trained import check_as_trained, streams_version
from checkpointing.checkpoint import Checkpoint, section
from checkpointing.restricted_pickle import CheckpointError
from dataloader import DataModule
from evaluation.table import check_likelihoods, check_training, parse_likelihood
from modes.build import build_backbone, build_module, build_shape, read_weights, start_from
from modes.build_data import build_data, build_tokenizer
from modes.lora import build_adapter, start_adapter
from objectives.algorithms import get_algorithm
from random_streams import VERSION
from settings import Config
from settings.defaults import default_likelihood
from training.flops import flops
from training.profiling import TorchTrace
from training.resuming import check_resumable
from training.run_lock import RunLock
from training.saving import steps_in
from training.signals import Signals
from training.trainer import (
    build_trainer,
    checkpoint_folder,
    examples_seen,
    resume_point,
    training_logs,
)
from utils import Failure, rank, say


def prepare(config: Config) -> Callable[[], None]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    check_validation(config)
    saved = steps_in(checkpoint_folder(config.checkpointing))
    resume, start = resume_point(config), config.training.from_pretrained
    tokenizer = build_tokenizer(config)
    begins = start is not None and resume is None
    pretrained = read_weights(config, start, tokenizer) if begins else None
    if begin := resume or pretrained:
        check_as_trained(begin, config, tokenizer, config.data.tokenizer_name_or_path)
    backbone = build_backbone(config, tokenizer, resume or pretrained)
    version = VERSION if resume is None else streams_version(resume)
    adapter, about = build_adapter(config, tokenizer), {}
    if adapter is not None:
        about["lora"] = start_adapter(config, backbone, adapter, pretrained, resume, tokenizer)
    module = build_module(config, backbone, tokenizer, version)
    module.description |= about
    if pretrained is not None and adapter is None:
        start_from(module, pretrained, config)
    data = build_data(config, tokenizer, train=True, version=version)
    module.validation_rows = len(data.valid)
    logs, signals = training_logs(config), Signals()
    cost = flops(build_shape(config, backbone))
    trainer = build_trainer(config, loggers=logs, signals=signals, step_flops=cost.step)
    if resume is not None:
        check_resumable(resume, module, trainer)
    lock = take_folder(config, saved)

    def run() -> None:
        with lock:
            if rank() == 0:
                settings.write_settings(config)
            if resume is not None:
                go_on(config, data, resume)
            if config.trainer.enable_checkpointing:  # else nobody would read what they note
                signals.listen()
            fit(config, trainer, module, data, resume)

    return run


def take_folder(config: Config, saved: list[int]) -> RunLock:
    """The lock of the run folder, which had checkpoints of the steps `saved` when this run looked
    where to go on from. ValueError where another run has it, or has saved since."""
    folder = config.checkpointing.save_dir
    lock = RunLock(settings.local_folder(folder))
    if saved != steps_in(checkpoint_folder(config.checkpointing)):
        with lock:
            raise ValueError(f"another run has saved in {folder} meanwhile: start this one again")
    return lock


def check_validation(config: Config) -> None:
    """ValueError where training cannot validate by eval.likelihood."""
    wanted = [parse_likelihood(label) for label in config.eval.likelihood]
    writes = get_algorithm(config.algo.name).writes
    check_likelihoods(wanted, algo=writes, block_size=1, draws=1, most=config.eval.max_passes)
    check_training(wanted, exact=default_likelihood(config) == "exact")


def fit(config: Config, trainer, module, data: DataModule, resume: Checkpoint | None) -> None:
    steps, folder = config.trainer.max_steps, config.checkpointing.save_dir
    finished = resume is not None and resume.step >= steps
    if finished:
        say(f"nothing is left to train: trainer.max_steps={steps}")
    log = f" (its log: {settings.local_folder(folder)})" if "://" in folder else ""
    say(f"run folder: {folder}{log}")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else resume.source)
    except CheckpointError as error:  # numbers that are read only now
        raise CheckpointError(f"{error}; {way_out(config, resume.source)}") from error
    trainer.strategy.checkpoint_io.wait()
    if rank() == 0:  # again: a folder that was deleted is begun anew by a save
        settings.write_settings(config)
    lost = [trainer.loggers[0].failure, *trainer.strategy.checkpoint_io.lost()]
    lost += [each.failure for each in trainer.callbacks if isinstance(each, TorchTrace)]
    if any(lost):
        raise Failure("; ".join(filter(None, lost)))
    if config.trainer.enable_checkpointing and not finished and trainer.global_step >= steps:
        say(f"trained to step {steps:,}; checkpoints: {folder}/checkpoints")


def way_out(config: Config, damaged: str) -> str:
    """What to do about a checkpoint that cannot be read."""
    place = os.path.realpath(damaged)
    if os.path.dirname(place) != os.path.realpath(checkpoint_folder(config.checkpointing)):
        return "or give another checkpointing.resume_ckpt_path"
    return f"or delete {place}, and the run goes on from the checkpoint before it"


def go_on(config: Config, data: DataModule, resume: Checkpoint) -> None:
    """With the data from the checkpoint on. A line where val/nll is no longer measured as it was;
    runs of before there was a choice do not say by what. Another block_size is refused, but where
    training draws several."""
    data.start_at(examples_seen(resume, config), resume.step)
    say(f"going on from step {resume.step:,} of {resume.source}")
    if (version := streams_version(resume)) < VERSION:
        say(f"the run keeps version {version} of the random streams, with which it began")
    if (size := resume.block_size) != config.block_size:
        say(
            f"val/nll was measured at block_size={size} and is now at {config.block_size}: the"
            f" score of best.ckpt is of the old one (block_size={size} stays with it)"
        )
    before = (section(resume.config, "eval").get("likelihood") or ["nelbo"])[0]
    now = config.eval.likelihood[0]
    if now != before and default_likelihood(config) == "counts":
        say(
            f"val/nll was measured by {before} and is now by {now}: both estimate the same bound,"
            " but the score of best.ckpt is of the old kind"
            f" (eval.likelihood={before} stays with it)"
        )
