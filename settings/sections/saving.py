"""Settings of what a run keeps: checkpoints and logs."""

from dataclasses import dataclass

import settings.tables as tables
from settings.limits import doc, one_of


@dataclass
class CheckpointEveryNSteps:
    every_n_train_steps: int = doc("optimizer steps between checkpoints", "at least 1")


@dataclass
class CheckpointMonitor:
    monitor: str = doc(
        "metric that ranks checkpoints",
        one_of(*(name for name, entry in tables.logged_figures().items() if entry.get("monitor"))),
    )
    mode: str = doc("whether the best is the smallest or the largest", one_of("min", "max"))
    save_top_k: int = doc("how many of the best are kept; -1: all", "at least -1")


@dataclass
class LearningRateMonitor:
    logging_interval: str = doc("when it is logged", one_of("step", "epoch"))


@dataclass
class Callbacks:
    """Each may be null, which leaves it out."""

    checkpoint_every_n_steps: CheckpointEveryNSteps | None = doc("write checkpoints at intervals")
    checkpoint_monitor: CheckpointMonitor | None = doc("keep the best checkpoint")
    learning_rate_monitor: LearningRateMonitor | None = doc("log the learning rate")


@dataclass
class Checkpointing:
    save_dir: str = doc(
        "run folder or URL; ${cwd:} is outputs/DATA/NAME-HASH, the same for the same settings"
    )
    resume_from_ckpt: bool = doc("continue from resume_ckpt_path if it exists")
    resume_ckpt_path: str = doc("checkpoint to continue from")
    format: str = doc(
        "how a checkpoint is written: file is one file, which the first process brings together;"
        " sharded is a folder to which every process writes what it holds, while training goes on"
        " (scripts/consolidate.py makes the file of it)",
        one_of("file", "sharded"),
    )
    keep_last: int = doc("how many of the newest step=N.ckpt are kept; -1: all", "at least -1")
    keep_every: int | None = doc(
        "keep for good the checkpoints whose step is a multiple of this; null: none", "at least 1"
    )
    on_save_error: str = doc("when a checkpoint cannot be written", one_of("continue", "stop"))


@dataclass
class WandB:
    project: str = doc("Weights & Biases: project")
    notes: str | None = doc("Weights & Biases: notes")
    group: str | None = doc("Weights & Biases: group of runs")
    job_type: str | None = doc("Weights & Biases: type of the run")
    name: str | None = doc("Weights & Biases: name of the run; names the run folder too")
    id: str | None = doc("Weights & Biases: id of the run")
    tags: list[str | None] = doc("Weights & Biases: tags")
    offline: bool = doc("Weights & Biases: log to disk only")
