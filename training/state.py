"""What a checkpoint holds of the module beside its weights, in the published layout: the average,
the clipped interval, the place in the data; and Lightning's counters, set by the step alone."""

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from random_streams import version_of
from training import averaging, distributed, loop_state
from training.resuming import check_optimizer
from training.validation import set_interval
from utils import say


def save_state(module: L.LightningModule, checkpoint: dict) -> None:
    """Completes the checkpoint of a Diffusion, in place; with fsdp every rank must ask."""
    trainer = module.trainer
    averaging.settle(module)
    checkpoint["hparams_name"] = "kwargs"
    checkpoint["hyper_parameters"] = module.description
    distributed.set_fused(checkpoint, None)  # says how a step is computed here, not what it is
    if module.ema is not None:
        checkpoint["ema"] = {
            "decay": module.ema.decay,
            "num_updates": module.ema.num_updates,
            "shadow_params": [
                distributed.whole_of(module.ema.shadow[name], p)
                for name, p in module.backbone.named_parameters()
            ],
        }
    if module.clip is not None:
        checkpoint["sampling_eps_min"] = module.sampling_eps_min.clone()
        checkpoint["sampling_eps_max"] = module.sampling_eps_max.clone()
    step = trainer.global_step
    if _endless(trainer):
        _set_counters(trainer, checkpoint, step, pending=module.validated_at != step)
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
        check_optimizer(checkpoint.get("optimizer_states"), module.backbone)
    distributed.set_fused(checkpoint, module.fused())
    if trainer.state.fn == TrainerFn.FITTING and _endless(trainer):
        step = checkpoint["global_step"]
        pending = loop_state.validation_due(checkpoint["loops"])
        due = _set_counters(trainer, checkpoint, step, pending) == loop_state.DUE
        module.validated_at = -1 if due else step
    if module.clip is not None:
        bounds = (checkpoint["sampling_eps_min"], checkpoint["sampling_eps_max"])
        # float32 buffers: 0.45 is stored as 0.44999999
        set_interval(module, (round(float(bounds[0]), 6), round(float(bounds[1]), 6)))
    if module.ema is not None:
        _load_average(module, checkpoint)


def _load_average(module: L.LightningModule, checkpoint: dict) -> None:
    if "ema" in checkpoint:
        ema = checkpoint["ema"]
        averages = zip(module.backbone.named_parameters(), ema["shadow_params"], strict=True)
        parts = {name: distributed.part_of(average, p) for (name, p), average in averages}
        module.ema.load(parts, ema["num_updates"])
        return
    say("the checkpoint has no EMA: the average starts at its weights")
    weights, like = checkpoint["state_dict"], dict(module.backbone.named_parameters())
    parts = {
        name: distributed.part_of(weights[f"backbone.{name}"], like[name])
        for name in module.ema.shadow
    }
    module.ema.load(parts, 0)


def _endless(trainer: L.Trainer) -> bool:
    """Whether the training data are one epoch without end, as they are unless limited."""
    return not isinstance(trainer.limit_train_batches, int)


def _set_counters(trainer: L.Trainer, checkpoint: dict, step: int, pending: bool) -> str:
    """As they are after `step`; what they note of the validation that follows it."""
    accumulate = trainer.accumulate_grad_batches
    every = trainer.val_check_interval if trainer.check_val_every_n_epoch is None else None
    follows = isinstance(every, int) and trainer.limit_val_batches and step
    validation = loop_state.DUE if pending else loop_state.DONE
    if not follows or step * accumulate % every:
        validation = loop_state.NOTHING
    loop_state.place(checkpoint["loops"], step=step, accumulate=accumulate, validation=validation)
    return validation
