"""Learning-rate schedules, as factors on the learning rate: lr_scheduler=NAME."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """What the schedules are made from; steps are optimizer steps."""

    lr: float
    max_steps: int
    warmup_steps: int
    lr_init: float | None = None
    lr_min: float | None = None


@dataclass(frozen=True)
class LRSchedule:
    """`factor(step, numbers)` on numbers.lr. `reads`: what it needs of lr_scheduler."""

    factor: Callable[[int, LearningRate], float]
    reads: tuple[str, ...] = ()


def constant(step: int, numbers: LearningRate) -> float:
    return 1.0


def constant_warmup(step: int, numbers: LearningRate) -> float:
    """From 0 to 1 over `warmup_steps`, then 1."""
    return step / numbers.warmup_steps if step < numbers.warmup_steps else 1.0


def cosine_decay_warmup(step: int, numbers: LearningRate) -> float:
    """Linear from lr_init to lr, then a half cosine to lr_min at max_steps, then lr_min."""
    lr, warmup, init, least = numbers.lr, numbers.warmup_steps, numbers.lr_init, numbers.lr_min
    if step < warmup:
        return (init + step * (lr - init) / warmup) / lr
    if step >= numbers.max_steps:
        return least / lr
    phase = math.pi * (step - warmup) / (numbers.max_steps - warmup)
    return (least + 0.5 * (lr - least) * (1 + math.cos(phase))) / lr


LR_SCHEDULES = {
    "constant_warmup": LRSchedule(constant_warmup, reads=("num_warmup_steps",)),
    "constant": LRSchedule(constant),
    "cosine_decay_warmup": LRSchedule(
        cosine_decay_warmup, reads=("num_warmup_steps", "warmup_lr_init", "lr_min")
    ),
}


def lr_factor(name: str, **numbers) -> functools.partial:
    """step -> factor on the learning rate, for a choice of lr_scheduler. numbers: LearningRate.

    A functools.partial: LambdaLR saves its (empty) __dict__, as the published checkpoints have it.
    """
    return functools.partial(LR_SCHEDULES[name].factor, numbers=LearningRate(**numbers))
