"""Where the time of a training step goes under Lightning, with a run's own logs and callbacks.

Used by train_step.py. The network's work is: loss, backward, clipping, AdamW. The rest (data, draws
of noise, logging, checks, EMA, Lightning itself) is overhead.
"""

import tempfile
import time
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import torch

from dataloader import DataModule
from diffusion import Diffusion, NoiseSettings
from noise_schedule import get_schedule
from objectives.block_diffusion import MaskedDiffusion
from training.csv_log import CSVLog
from training.logged import StepLog
from training.lr_schedules import lr_factor
from training.optimizers import OptimizerSettings

WARM_UP = 3  # steps that are not counted: optimizer states are made, pages touched
WORK = ("loss", "backward", "clip", "optimizer")


class SyntheticRows:
    """Random ids in memory, read as prepared rows are."""

    apart = False

    def __init__(self, rows: int, length: int, vocab: int):
        self.length = length
        self.ids = np.random.default_rng(0).integers(0, vocab - 1, (rows, length), np.uint16)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(self.ids[rows], np.int64)
        return ids, np.ones_like(ids)


class Watch(L.Callback):
    """Seconds per part of a step, of the steps after the warm-up."""

    def __init__(self, clock):
        self.clock = clock
        self.seconds: Counter[str] = Counter()
        self.steps, self.started = -WARM_UP, 0.0

    def timed(self, name: str, call):
        def run(*args, **kwargs):
            started = self.clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += self.clock() - started

        return run

    def on_train_start(self, trainer, pl_module) -> None:
        trainer.strategy.backward = self.timed("backward", trainer.strategy.backward)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps += 1
        if self.steps == 0:
            self.seconds.clear()
            self.started = self.clock()

    def on_train_end(self, trainer, pl_module) -> None:
        self.seconds["whole"] = self.clock() - self.started


def watch(module: Diffusion, clock) -> Watch:
    watched = Watch(clock)
    module.training_loss = watched.timed("loss", module.training_loss)
    module.noise = watched.timed("draws", module.noise)
    module.loss_inputs = watched.timed("loss", module.loss_inputs)
    module.log = watched.timed("logging", module.log)
    module.health.inspect = watched.timed("checks", module.health.inspect)
    module.health.scale = watched.timed("clip", module.health.scale)
    module.ema.update = watched.timed("ema", module.ema.update)
    step = module.optimizer_step

    def optimizer_step(epoch, batch_idx, optimizer, closure=None):
        step(epoch, batch_idx, optimizer, watched.timed("closure", closure))

    module.optimizer_step = watched.timed("update", optimizer_step)
    return watched


def profile(
    net,
    *,
    vocab: int,
    length: int,
    batch: int,
    block_size: int,
    steps: int,
    device: str,
    clock=None,
) -> dict:
    """Shares of a bamdlm step; "overhead" is what is not the network's work."""
    noise = NoiseSettings(
        seed=1,
        interval=(1e-3, 1.0),
        sampling_eps=1e-3,
        antithetic=True,
        global_batch=batch,
        eval_global_batch=batch,
    )
    module = Diffusion(
        backbone=net,
        objective=MaskedDiffusion(vocab - 1, block_size, get_schedule("loglinear")),
        noise=noise,
        optimizer=OptimizerSettings({"lr": 3e-4, "weight_decay": 0.0}),
        lr_factor=lr_factor("constant", lr=3e-4, max_steps=0, warmup_steps=0),
        ema_decay=0.9999,
    )
    watched = watch(module, clock or time.perf_counter)
    rows = SyntheticRows((steps + WARM_UP + 1) * batch, length, vocab)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            max_steps=steps + WARM_UP,
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=CSVLog(Path(folder) / "metrics.csv"),
            callbacks=[watched, StepLog(1.0, torch.float32, rates=False)],
            use_distributed_sampler=False,
        )
        data = DataModule(
            train=rows, valid=rows, length=length, batch_size=batch, eval_batch_size=batch
        )
        trainer.fit(module, datamodule=data)
    found = watched.seconds
    found["optimizer"] = found["update"] - found["closure"] - found["ema"]
    whole = found["whole"]
    parts = (*WORK, "draws", "logging", "checks", "ema")
    shares = {name: found[name] / whole for name in parts}
    work = sum(found[name] for name in WORK)
    named = sum(found[name] for name in parts)
    return {
        "seconds": whole / steps,
        **shares,
        "data_and_lightning": (whole - named) / whole,
        "overhead": (whole - work) / whole,
    }
