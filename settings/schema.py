"""The schema of a run: every setting with its type and what it means, by sections.

The values are in configs/ (config.yaml and one file per choice of a group); a test holds the two
together. In the YAML files null means "chosen when the run starts"; where the type here has no
None, settings.load has chosen. A device is a GPU, or a process on a CPU.
"""

from dataclasses import dataclass

import settings.tables as tables
from settings.limits import Limit, doc, one_of
from settings.sections.data import Data
from settings.sections.inference import Demo, Eval, Sampling
from settings.sections.network import Adapt, Algo, LoRA, Model, Noise
from settings.sections.saving import Callbacks, Checkpointing, WandB
from settings.sections.training import (
    Loader,
    LRScheduler,
    Optim,
    PlannedFor,
    Strategy,
    Trainer,
    Training,
)

SEED = Limit("from 0 to 4294967295", lambda value: 0 <= value < 2**32, 1)


@dataclass
class Config:
    mode: str = doc("what the command does", one_of(*tables.modes()))
    seed: int = doc("seed of weights, data order, noise and samples", SEED)
    block_size: int = doc("tokens of a block; divides model.length; 1 for algo=ar", "at least 1")
    loader: Loader
    sampling: Sampling
    demo: Demo
    training: Training
    adapt: Adapt
    eval: Eval
    optim: Optim
    trainer: Trainer
    data: Data
    algo: Algo
    model: Model
    lora: LoRA
    noise: Noise
    lr_scheduler: LRScheduler
    strategy: Strategy
    plan: PlannedFor
    callbacks: Callbacks
    checkpointing: Checkpointing
    wandb: WandB | None
