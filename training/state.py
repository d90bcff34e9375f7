"""What a checkpoint holds of the module beside its weights, in the published layout: the average,
the clipped interval, the law of counts, the place in the data; and Lightning's counters.

Lightning also stores how far it had come in its own loops, which depends on the number of devices
and on when the file was written; resumed as it stands, a step could begin in the middle of its
micro-batches, or a validation be left out. So the counters are written, and read again, from the
optimizer step alone: they are those at its end.
"""

from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from random_streams import version_of
from training import averaging, distributed
from training.checkpoint_io.parts import as_part, saves_parts
from training.optimizers import trained
from training.resuming import check_optimizer
from training.validation import set_interval
from utils import say


def save_state(module: L.LightningModule, checkpoint: dict) -> None:
    """Completes the checkpoint of a Diffusion, in place; with fsdp every rank must ask, and that of
    rank 0 is whole. In one in parts, the average stays cut."""
    trainer = module.trainer
    averaging.settle(module)
    checkpoint["hparams_name"] = "kwargs"
    checkpoint["hyper_parameters"] = module.description
    distributed.set_fused(checkpoint, None)  # says how a step is computed here, not what it is
    if module.backbone.masters is not None:
        _put_masters(module, checkpoint["state_dict"])
    if module.ema is not None:
        whole = as_part if saves_parts(trainer.strategy) else distributed.whole_of
        checkpoint["ema"] = {
            "decay": module.ema.decay,
            "num_updates": module.ema.num_updates,
            "shadow_params": [
                whole(module.ema.shadow[name], p) for name, p in trained(module.backbone)
            ],
        }
    if module.clip is not None:
        checkpoint["sampling_eps_min"] = module.sampling_eps_min.clone()
        checkpoint["sampling_eps_max"] = module.sampling_eps_max.clone()
    if module.count_law is not None:
        checkpoint["count_law"] = module.count_law.density.clone()
    step = trainer.global_step
    if _endless(trainer):
        _set_counters(trainer, checkpoint, pending=module.validated_at != step)
        # Lightning empties the gradients as a step begins, and that step may have been broken off
        optimizer = "epoch_loop.automatic_optimization.optim_progress"
        progress = checkpoint["loops"]["fit_loop"][optimizer]["optimizer"]["zero_grad"]
        for counts in progress.values():
            counts.update(dict.fromkeys(counts, step))
    # The authors' code restores its data order from a generator; ours is (seed, examples seen).
    checkpoint["sampler"] = {
        "random_state": torch.Generator().manual_seed(module.noise_settings.seed).get_state(),
        "examples_seen": step * module.noise_settings.global_batch,
        "streams": version_of(module.noise_settings.seed),
    }


def load_state(module: L.LightningModule, checkpoint: dict) -> None:
    """Take over from a checkpoint what `save_state` put there; changes its counters in place."""
    trainer = module.trainer
    if trainer.state.fn == TrainerFn.FITTING:
        check_optimizer(checkpoint.get("optimizer_states"), module)
    distributed.set_fused(checkpoint, module.fused())
    if trainer.state.fn == TrainerFn.FITTING and _endless(trainer):
        due = _set_counters(trainer, checkpoint, pending=_validation_due(checkpoint["loops"]))
        module.validated_at = -1 if due else checkpoint["global_step"]
    if module.backbone.masters is not None:
        prefix, state = "backbone.", checkpoint["state_dict"]
        module.backbone.masters.load({k.removeprefix(prefix): v for k, v in state.items()})
    if module.clip is not None:
        bounds = (checkpoint["sampling_eps_min"], checkpoint["sampling_eps_max"])
        # float32 buffers: 0.45 is stored as 0.44999999
        set_interval(module, (round(float(bounds[0]), 6), round(float(bounds[1]), 6)))
    if module.count_law is not None:
        module.count_law = replace(module.count_law, density=checkpoint["count_law"].cpu())
    if module.ema is not None:
        _load_average(module, checkpoint)


def _put_masters(module: L.LightningModule, state: dict) -> None:
    """In place of weights in bfloat16, so that a file is like that of any other run."""
    masters = module.backbone.masters
    for name, p in module.backbone.named_parameters():
        state[f"backbone.{name}"] = masters[name].detach() if name in masters else p.float()


def _load_average(module: L.LightningModule, checkpoint: dict) -> None:
    if "ema" in checkpoint:
        averages = checkpoint["ema"]["shadow_params"]
        updates = checkpoint["ema"]["num_updates"]
    else:
        say("the checkpoint has no EMA: the average starts at its weights")
        weights, updates = checkpoint["state_dict"], 0
        averages = [weights[f"backbone.{name}"] for name, _ in trained(module.backbone)]
    named = zip(trained(module.backbone), averages, strict=True)
    parts = {name: distributed.part_of(average, p) for (name, p), average in named}
    module.ema.load(parts, updates)


def _endless(trainer: L.Trainer) -> bool:
    """Whether the training data are one epoch without end, as they are unless limited."""
    return not isinstance(trainer.limit_train_batches, int)


def _validation_due(loops: dict) -> bool:
    """Whether the run that wrote these counters had not validated after the step, if it was to."""
    fit = loops["fit_loop"]
    valid = fit["epoch_loop.val_loop.batch_progress"]["total"]
    train = fit["epoch_loop.batch_progress"]["total"]
    return valid["processed"] < valid["started"] or train["completed"] < train["processed"]


def _set_counters(trainer: L.Trainer, checkpoint: dict, *, pending: bool) -> bool:
    """Returns whether a validation is still to be run. pending: it is if one follows the step."""
    step, fit = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
    batches = step * trainer.accumulate_grad_batches
    every = trainer.val_check_interval if trainer.check_val_every_n_epoch is None else None
    validates = isinstance(every, int) and trainer.limit_val_batches and step
    validates = bool(validates and batches % every == 0)
    due = validates and pending
    fit["epoch_loop.batch_progress"] = _progress(batches, batches)
    # Lightning passes once more through the end of a step after which it validates
    fit["epoch_loop.state_dict"] = {"_batches_that_stepped": step - validates}
    # one that is begun Lightning takes up from its first batch
    fit["epoch_loop.val_loop.batch_progress"] = _progress(int(due), 0)
    return due


def _progress(begun: int, done: int) -> dict:
    counts = {"ready": begun, "completed": done, "started": begun, "processed": done}
    return {"total": counts, "current": dict(counts), "is_last_batch": False}
