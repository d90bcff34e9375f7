"""What a single setting may be, whatever the others are: choices and ranges, one line each."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from settings.overrides import nearest
from settings.tables import attention_backends, confidences, modes, schedules, step_rules

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
CHOICES = {
    "mode": tuple(modes()),
    "sampling.steps": tuple(step_rules()),
    "sampling.confidence": tuple(confidences()),
    "sampling.dtype": ("float32", "float64"),
    "data.pack": ("wrap", "documents"),
    "trainer.accelerator": ("auto", "gpu", "cpu"),
    "trainer.precision": PRECISIONS,
    "trainer.gradient_clip_algorithm": ("norm", "value"),
    "algo.name": ("bamdlm", "mdlm", "sedd", "ar"),
    "algo.backbone": ("dit", "hf_dit"),
    "algo.parameterization": ("subs", "sedd", "ar"),
    "algo.sampler": ("semi_ar", "analytic", "ar"),
    "model.attn_backend": ("auto", *attention_backends()),
    "noise.type": tuple(schedules()),
    "lr_scheduler.name": ("constant_warmup", "constant", "cosine_decay_warmup"),
    "strategy.name": ("ddp", "fsdp"),
    "checkpointing.on_save_error": ("continue", "stop"),
    "callbacks.checkpoint_monitor.monitor": ("val/nll", "val/bpd", "val/ppl"),
    "callbacks.checkpoint_monitor.mode": ("min", "max"),
    "callbacks.learning_rate_monitor.logging_interval": ("step", "epoch"),
}

# (what it must be, the test, a value that passes, the settings)
RANGES = (
    (
        "at least 1",
        lambda value: value >= 1,
        1,
        (
            "block_size",
            "loader.global_batch_size",
            "loader.eval_global_batch_size",
            "loader.batch_size",
            "loader.eval_batch_size",
            "sampling.num_sample_batches",
            "sampling.batch_size",
            "sampling.k",
            "sampling.context_size",
            "eval.perplexity_batch_size",
            "eval.tokens_per_batch",
            "trainer.devices",
            "trainer.num_nodes",
            "trainer.max_steps",
            "trainer.accumulate_grad_batches",
            "trainer.log_every_n_steps",
            "model.hidden_size",
            "model.cond_dim",
            "model.length",
            "model.n_blocks",
            "model.n_heads",
            "callbacks.checkpoint_every_n_steps.every_n_train_steps",
            "checkpointing.keep_every",
        ),
    ),
    (
        "at least 0",
        lambda value: 0 <= value < math.inf,
        0,
        (
            "loader.num_workers",
            "training.max_bad_steps",
            "optim.weight_decay",
            "trainer.gradient_clip_val",
            "algo.T",
            "lr_scheduler.num_warmup_steps",
            "lr_scheduler.warmup_lr_init",
            "lr_scheduler.lr_min",
        ),
    ),
    (
        "at least -1",
        lambda value: value >= -1,
        0,
        (
            "trainer.num_sanity_val_steps",
            "checkpointing.keep_last",
            "callbacks.checkpoint_monitor.save_top_k",
        ),
    ),
    ("above 0", lambda value: 0 < value < math.inf, 1.0, ("optim.lr", "optim.eps")),
    (
        "in (0, 1]",
        lambda value: 0 < value <= 1,
        1.0,
        (
            "sampling.nucleus_p",
            "sampling.threshold",
            "training.sampling_eps_min",
            "training.sampling_eps_max",
        ),
    ),
    (
        "in (0, 1)",
        lambda value: 0 < value < 1,
        0.5,
        ("training.sampling_eps", "algo.clip_search_delta"),
    ),
    (
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        0.0,
        ("training.ema", "optim.beta1", "optim.beta2", "model.dropout"),
    ),
    ("in [0, 1]", lambda value: 0 <= value <= 1, 0.0, ("sampling.remask_eta",)),
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, 1, ("seed",)),
    (
        "a number of batches, at least 1: the training data are an endless stream",
        lambda value: isinstance(value, int) and value >= 1,
        1,
        ("trainer.limit_train_batches", "trainer.val_check_interval"),
    ),
    (
        "a number of batches (0, 1, 2 ...) or a share (0.0 to 1.0)",
        lambda value: value >= 0 and (isinstance(value, int) or value <= 1),
        1.0,
        ("trainer.limit_val_batches",),
    ),
    (
        "DD:HH:MM:SS, such as 01:12:00:00",
        lambda value: re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value),
        "01:00:00:00",
        ("trainer.max_time",),
    ),
)


@dataclass(frozen=True)
class Outside:
    """A setting outside its choices or range, and a value that the other rules can go on with."""

    key: str
    problem: str
    stand_in: object


def limits(flat: dict) -> Iterator[Outside]:
    """Every setting that cannot be what it is. Settings that are null pass."""
    for key, allowed in CHOICES.items():
        value = flat.get(key)
        if value is not None and value not in allowed:
            problem = f"{key}={value} must be one of {', '.join(allowed)}.{nearest(value, allowed)}"
            yield Outside(key, problem.removesuffix("."), allowed[0])
    for rule, test, stand_in, keys in RANGES:
        for key in keys:
            value = flat.get(key)
            if value is not None and not test(value):
                yield Outside(key, f"{key}={value} must be {rule}", stand_in)
    widths = "algo.clip_search_widths"
    wrong = [width for width in flat[widths] if not 0 < width <= 1]
    if wrong:
        yield Outside(widths, f"{widths}: {wrong} must be in (0, 1]", [])
