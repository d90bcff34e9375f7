"""The average of a Diffusion's weights during a run: exchanged with the weights for validation,
kept in step with optimizer steps that turn out to have been left out."""

import lightning as L
from torch import Tensor

from training import distributed
from training.optimizers import trained


def averaged_weights(module: L.LightningModule) -> list[tuple[str, Tensor]]:
    """What the average follows: with fsdp this rank's part of every weight."""
    return [(name, distributed.part(p)) for name, p in trained(module.backbone)]


def put_average(module: L.LightningModule, on: bool) -> None:
    """Put the averaged weights in place, or the raw ones back."""
    if module.ema is not None and on != module.averaged:
        distributed.reshard(module.backbone)  # what is put together would not see the exchange
        module.ema.swap(averaged_weights(module))
        if module.backbone.masters is not None:
            module.backbone.masters.round()
        module.averaged = on


def update(module: L.LightningModule) -> None:
    """After an optimizer step."""
    if module.backbone.masters is not None:
        module.backbone.masters.round()
    if module.ema is not None and not module.health.skipped:
        module.ema.update(averaged_weights(module), unless=module.health.found)


def uncount(module: L.LightningModule, steps: int) -> None:
    """Take back the counts of steps that turn out to have been left out."""
    if module.ema is not None:
        module.ema.num_updates -= steps


def settle(module: L.LightningModule) -> None:
    """Wait until the host has judged all steps."""
    uncount(module, module.health.settle(module.trainer))
