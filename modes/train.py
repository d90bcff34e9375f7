"""mode=train: train, or continue the run that the same command began."""

from collections.abc import Callable

import lightning as L

import settings
from checkpointing.layouts import read_checkpoint, section
from evaluation.table import check_likelihoods, check_training, parse_likelihood
from modes.build import (
    build_backbone,
    build_data,
    build_module,
    build_shape,
    build_tokenizer,
    start_from,
)
from objectives.algorithms import get_algorithm
from settings import Config
from settings.defaults import default_likelihood
from training.flops import flops
from training.signals import Signals
from training.trainer import build_trainer, examples_seen, resume_point, training_logs
from utils import rank, say


def prepare(config: Config) -> Callable[[], None]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    wanted = [parse_likelihood(label) for label in config.eval.likelihood]
    writes = get_algorithm(config.algo.name).writes
    check_likelihoods(wanted, algo=writes, block_size=1, draws=1, most=config.eval.max_passes)
    check_training(wanted, exact=default_likelihood(config) == "exact")
    resume = resume_point(config)
    pretrained = None
    if config.training.from_pretrained and resume is None:
        pretrained = read_checkpoint(config.training.from_pretrained)
    tokenizer = build_tokenizer(config)
    backbone = build_backbone(config, tokenizer, pretrained)
    module = build_module(config, backbone, tokenizer)
    if pretrained is not None:
        start_from(module, pretrained, config)
    data = build_data(config, tokenizer, train=True)
    module.validation_rows = len(data.valid)
    run_folder = config.checkpointing.save_dir
    own = settings.local_folder(run_folder)
    signals = Signals()
    trainer = build_trainer(
        config,
        loggers=training_logs(config),
        signals=signals,
        step_flops=flops(build_shape(config, backbone)).step,
    )

    def run() -> None:
        if rank() == 0:
            settings.write_settings(config)
        if resume is not None:
            data.start_at(examples_seen(resume, config), resume.step)
            say(f"going on from step {resume.step:,} of {resume.source}")
            say_measure(config, section(resume.config, "eval").get("likelihood"))
        steps = config.trainer.max_steps
        finished = resume is not None and resume.step >= steps
        if finished:
            say(f"nothing is left to train: trainer.max_steps={steps}")
        say(f"run folder: {run_folder}" + f" (its log: {own})" * ("://" in run_folder))
        if config.trainer.enable_checkpointing:  # else nobody would read what they note
            signals.listen()
        path = None if resume is None else resume.source
        trainer.fit(module, datamodule=data, ckpt_path=path)
        if config.trainer.enable_checkpointing and not finished and trainer.global_step >= steps:
            say(f"trained to step {steps:,}; checkpoints: {run_folder}/checkpoints")

    return run


def say_measure(config: Config, before: list[str] | None) -> None:
    """One line where val/nll is no longer measured as it was. before: by the run so far; runs of
    before there was a choice have None."""
    now, before = config.eval.likelihood[0], (before or ["nelbo"])[0]
    if now != before and default_likelihood(config) == "counts":
        say(
            f"val/nll was measured by {before} and is now by {now}: both estimate the same bound,"
            " but the score of best.ckpt is of the old kind"
            f" (eval.likelihood={before} stays with it)"
        )
