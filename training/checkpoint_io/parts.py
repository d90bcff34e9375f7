"""Checkpoints in parts: every rank writes and reads what it holds."""

import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from checkpointing import sharded
from checkpointing.layouts import plain_name
from checkpointing.sharded import name_of
from training.checkpoint_io.files import CarefulIO
from training.optimizers import trained
from utils import say


class PartsIO(CarefulIO):
    """Copies what this rank holds to the host; a thread writes it while training goes on. One save
    at a time: the next one waits for the one before.

    The threads of the ranks talk in a group of their own.
    """

    def __init__(self):
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._begun: list[Future] = []
        self._parts: sharded.Parts | None = None  # what was saved last
        self._group, self._token = None, secrets.token_hex(4)
        self._has_waited = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        """On every rank."""
        if not (self._has_waited or all(each.done() for each in self._begun)):
            self._has_waited = True
            say(
                "training waits: a checkpoint is due before the last one is written (once in a"
                " while is enough: callbacks.checkpoint_every_n_steps.every_n_train_steps)"
            )
        self.wait()
        rank, ranks = 0, 1
        if distributed.is_initialized():
            rank, ranks = distributed.get_rank(), distributed.get_world_size()
            self._meet()
        self._parts = sharded.take_apart(checkpoint, rank, ranks, before=self._parts)
        self._begun.append(self._thread.submit(self._write, self._parts, os.fspath(path), rank))

    def _meet(self) -> None:
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
            token = [self._token]
            distributed.broadcast_object_list(token, group=self._group)
            self._token = token[0]

    def _write(self, parts: sharded.Parts, path: str, rank: int) -> None:
        write = partial(sharded.write, parts, path, group=self._group, token=self._token)
        if rank == 0:
            if self.attempt(path, write):
                self.failure = None
            return
        try:
            write()
        except (OSError, RuntimeError) as error:  # the first rank has it as well, and says so
            self.failure = f"{path} could not be written ({error})"

    def remove_checkpoint(self, path) -> None:
        self.afterwards(partial(super().remove_checkpoint, path))

    def afterwards(self, act: Callable[[], object]) -> None:
        self._begun.append(self._thread.submit(super().afterwards, act))

    def wait(self) -> None:
        begun, self._begun = self._begun, []
        for each in begun:
            each.result()


def saves_parts(strategy: Strategy) -> bool:
    """Whether every rank writes its own part of a checkpoint."""
    return isinstance(strategy.checkpoint_io, PartsIO)


def as_part(mine: Tensor, like: Tensor) -> Tensor:
    """The whole of which `mine` is this rank's part, without bringing it together."""
    if not isinstance(like, DTensor):
        return mine
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def load_in_place(module: L.LightningModule, optimizers: list[Optimizer], path: str) -> dict:
    """The checkpoint in parts at `path`, of which this rank reads its own: weights into the
    module, averages into its average, moments into new tensors cut as the weights are."""
    stored = sharded.Sharded(path)
    checkpoint, targets = stored.checkpoint, {}
    ours = {plain_name(name): value for name, value in module.state_dict().items()}
    for name in checkpoint["state_dict"]:
        targets[name_of("state_dict", name)] = ours[plain_name(name)]
    if module.ema is not None:
        for number, (name, p) in enumerate(trained(module.backbone)):
            average = as_part(module.ema.shadow[name], p)
            targets[name_of("ema", "shadow_params", number)] = average
    for i, optimizer in enumerate(optimizers):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for number, state in checkpoint["optimizer_states"][i]["state"].items():
            for kind in state:
                moment = name_of("optimizer_states", i, "state", number, kind)
                targets[moment] = torch.empty_like(weights[number], requires_grad=False)
    stored.load({name: targets[name] for name in stored.places if name in targets})
    return checkpoint
