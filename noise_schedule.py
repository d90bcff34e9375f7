"""Masking schedules: how likely a token is masked at time t.

Time runs from 0 (clean text) to 1 (every token masked). A schedule maps t in (0, 1] to

    p(t)       probability that a token is masked, increasing in t,
    weight(t)  p'(t) / p(t), nats of loss per nat of cross-entropy in the NELBO, >= 0.

The reference's `loss_scaling` is -weight. Total noise sigma = -ln(1 - p) (MDLM, arXiv:2406.07524).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-3  # the least masking probability of the clamped schedules, and what total noise stops at
SIGMA_MAX = -math.log(EPS)


def total_noise(p: Tensor) -> Tensor:
    """sigma = -ln(1 - p), at most SIGMA_MAX; p of any shape."""
    return (-torch.log1p(-p)).clamp(max=SIGMA_MAX)


@dataclass(frozen=True)
class NoiseLevel:
    """What a schedule says about one time. Both tensors have the shape of t."""

    p: Tensor  # probability that a token is masked
    weight: Tensor  # p' / p

    @property
    def sigma(self) -> Tensor:
        return total_noise(self.p)


@dataclass(frozen=True)
class LogLinear:
    """p = t: the schedule of all published runs."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(p=t, weight=1 / t)


@dataclass(frozen=True)
class ScaledLogLinear:
    """The loglinear schedule through its total noise -ln(1 - (1 - eps) t), as in the MDLM and SEDD
    papers: p = (1 - eps) t (`algo.mdlm_loss_scale`)."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        sigma = -torch.log1p(-(1 - EPS) * t)
        rate = (1 - EPS) / (1 - (1 - EPS) * t)
        return NoiseLevel(p=-torch.expm1(-sigma), weight=rate / torch.expm1(sigma))


@dataclass(frozen=True)
class Cosine:
    """p = 1 - (1 - eps) cos(pi t / 2)."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        angle = t * math.pi / 2
        p = 1 - (1 - EPS) * torch.cos(angle)
        return NoiseLevel(p=p, weight=(1 - EPS) * torch.sin(angle) * (math.pi / 2) / p)


@dataclass(frozen=True)
class Power:
    """p = t ** exponent, at least eps. 2 masks little early on, 0.5 masks much."""

    exponent: float

    def __call__(self, t: Tensor) -> NoiseLevel:
        free = t**self.exponent
        weight = self.exponent / t
        return NoiseLevel(
            p=free.clamp(min=EPS), weight=torch.where(free > EPS, weight, torch.zeros_like(t))
        )


@dataclass(frozen=True)
class Logarithmic:
    """p = ln(1 + t) / ln 2."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        free = torch.log1p(t)
        return NoiseLevel(p=free / math.log(2), weight=1 / (free * (1 + t)))


Schedule = Callable[[Tensor], NoiseLevel]

SCHEDULES = {
    "loglinear": LogLinear(),
    "cosine": Cosine(),
    "square": Power(2),
    "square_root": Power(0.5),
    "log": Logarithmic(),
}


def get_schedule(name: str, mdlm_loss_scale: bool = False) -> Schedule:
    if name not in SCHEDULES:
        raise ValueError(f"noise must be one of {sorted(SCHEDULES)}, got {name!r}")
    if mdlm_loss_scale:
        if name != "loglinear":
            raise ValueError(f"algo.mdlm_loss_scale belongs to noise=loglinear, got noise={name}")
        return ScaledLogLinear()
    return SCHEDULES[name]
