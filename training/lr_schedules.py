"""Learning-rate schedules, as factors on the learning rate: lr_scheduler=NAME."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LRSchedule:
    """`factor(step, ...)` on the learning rate, see `lr_factor`. `reads`: what it needs of
    lr_scheduler."""

    factor: Callable[..., float]
    reads: tuple[str, ...] = ()


def constant(step: int, **numbers) -> float:
    return 1.0


def constant_warmup(step: int, *, warmup_steps: int, **numbers) -> float:
    """From 0 to 1 over `warmup_steps`, then 1."""
    return step / warmup_steps if step < warmup_steps else 1.0


def cosine_decay_warmup(
    step: int, *, lr: float, max_steps: int, warmup_steps: int, lr_init: float, lr_min: float
) -> float:
    """Linear from lr_init to lr, then a half cosine to lr_min at max_steps, then lr_min."""
    if step < warmup_steps:
        return (lr_init + step * (lr - lr_init) / warmup_steps) / lr
    if step >= max_steps:
        return lr_min / lr
    phase = math.pi * (step - warmup_steps) / (max_steps - warmup_steps)
    return (lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(phase))) / lr


LR_SCHEDULES = {
    "constant_warmup": LRSchedule(constant_warmup, reads=("num_warmup_steps",)),
    "constant": LRSchedule(constant),
    "cosine_decay_warmup": LRSchedule(
        cosine_decay_warmup, reads=("num_warmup_steps", "warmup_lr_init", "lr_min")
    ),
}


def lr_factor(name: str, **numbers) -> functools.partial:
    """step -> factor on the learning rate, for a choice of lr_scheduler. numbers: lr, max_steps,
    warmup_steps, lr_init and lr_min; steps are optimizer steps.

    A functools.partial: LambdaLR saves its (empty) __dict__, as the published checkpoints have it.
    """
    return functools.partial(LR_SCHEDULES[name].factor, **numbers)
