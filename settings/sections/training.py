"""Settings of training: batches, noise, optimizer, trainer, devices."""

import re
from dataclasses import dataclass

import settings.tables as tables
from settings.limits import SIZES, Limit, doc, one_of

COUNTS = Limit(
    "two numbers [least, most] of masked tokens with 1 <= least <= most",
    lambda value: len(value) == 2 and 1 <= value[0] <= value[1],
    [1, 1],
)
VIEWS = Limit("1 or 2", lambda value: value in (1, 2), 1)
SCHEDULE = Limit(
    "sizes of blocks, at least 1, by the step from which they are trained, the first 0, such as"
    " {0: 1, 500: 4}",
    lambda value: bool(value) and min(value) == 0 and min(value.values()) >= 1,
    {0: 1},
)
BATCHES = Limit(
    "a number of batches, at least 1: the training data are an endless stream",
    lambda value: isinstance(value, int) and value >= 1,
    1,
)
BATCHES_OR_SHARE = Limit(
    "a number of batches (0, 1, 2 ...) or a share (0.0 to 1.0)",
    lambda value: value >= 0 and (isinstance(value, int) or value <= 1),
    1.0,
)
DURATION = Limit(
    "DD:HH:MM:SS, such as 01:12:00:00",
    lambda value: re.fullmatch(r"[0-9]{1,6}(:[0-9]{2}){3}", value) is not None,
    "01:00:00:00",
)


@dataclass
class Loader:
    global_batch_size: int = doc("sequences per optimizer step, on all devices", "at least 1")
    eval_global_batch_size: int = doc("sequences per evaluation batch on all devices", "at least 1")
    batch_size: int | None = doc(
        "sequences per device and forward pass; null: global_batch_size / devices. Smaller "
        "values accumulate gradients",
        "at least 1",
    )
    eval_batch_size: int | None = doc(
        "the same in evaluation; null: eval_global_batch_size / devices", "at least 1"
    )
    num_workers: int | None = doc("processes that load data; null: one per core", "at least 0")
    pin_memory: bool = doc("load batches into page-locked memory, which speeds up copies to a GPU")


@dataclass
class Training:
    ema: float = doc("decay of the moving average of the weights; 0: no average", "in [0, 1)")
    antithetic_sampling: bool = doc(
        "spread the noise levels evenly over the global batch, which lowers the variance"
    )
    sampling_eps: float = doc(
        "lower end of the full interval of t, of validation and the clip search", "in (0, 1)"
    )
    sampling_eps_min: float = doc("lower end of the interval of t in training", "in (0, 1]")
    sampling_eps_max: float = doc("upper end of the interval of t in training", "in (0, 1]")
    resample: bool = doc(
        "redraw until each block's masked share is in [sampling_eps_min, sampling_eps_max]"
    )
    noise: str = doc(
        "what is drawn for each block: a time in [sampling_eps_min, sampling_eps_max], or the "
        "number of its masked tokens (bamdlm, mdlm)",
        one_of("times", "counts"),
    )
    counts: list[int] | None = doc(
        "with training.noise=counts, the least and the most masked tokens of a block, such as "
        "[2, 3], not reweighted: such a range is no bound; null: all, whose loss is the bound",
        COUNTS,
    )
    count_law: str = doc(
        "with training.noise=counts, each count equally likely, or as each validation finds it to "
        "vary least; both are the bound",
        one_of("uniform", "learnt"),
    )
    views: int = doc(
        "noised versions of a row in a step; 2: with training.noise=counts, of complementary "
        "masks, which share its clean half (bamdlm)",
        VIEWS,
    )
    block_sizes: dict[int, float] | None = doc(
        "sizes from which each row draws that of its blocks, with their proportions, such as "
        "{1: 0.25, 4: 0.5, 16: 0.25}; their sum does not matter. block_size, one of them, is that "
        "of validation (bamdlm); null: block_size",
        SIZES,
    )
    block_schedule: dict[int, int] | None = doc(
        "block sizes by the step from which they are trained, such as {0: 1, 500: 4, 1000: 16}; "
        "block_size, one of them, is that of validation (bamdlm); null: block_size",
        SCHEDULE,
    )
    from_pretrained: str | None = doc("weights to start from: .ckpt, exported folder or hub id")
    eval_nll: bool = doc("with block_size=1, validate the exact NLL, not the bound")
    max_bad_steps: int = doc(
        "skipped steps in a row (loss or gradient not finite) that stop training", "at least 0"
    )


@dataclass
class Optim:
    name: str = doc(
        "optimizer; choose it with optim=NAME: AdamW, or Muon for the matrices of the blocks and "
        "AdamW for all else",
        one_of("adamw", "muon"),
    )
    lr: float = doc("learning rate, after the warm-up; of Muon too", "above 0")
    beta1: float = doc("AdamW: decay of the average of gradients", "in [0, 1)")
    beta2: float = doc("AdamW: decay of the average of squared gradients", "in [0, 1)")
    eps: float = doc("AdamW: added to the denominator", "above 0")
    weight_decay: float = doc("weight decay; of Muon too", "at least 0")
    momentum: float | None = doc("Muon: decay of the average of gradients", "in [0, 1)")


@dataclass
class LRScheduler:
    name: str = doc("learning-rate schedule; set lr_scheduler=NAME", one_of(*tables.lr_schedules()))
    num_warmup_steps: int | None = doc(
        "optimizer steps until lr is optim.lr; null: a tenth of trainer.max_steps", "at least 0"
    )
    warmup_lr_init: float | None = doc("learning rate at start (cosine_decay_warmup)", "at least 0")
    lr_min: float | None = doc("learning rate at the end (cosine_decay_warmup)", "at least 0")


@dataclass
class Trainer:
    """Arguments of lightning.Trainer, under its own names."""

    accelerator: str = doc("device; auto: a GPU where there is one", one_of("auto", "gpu", "cpu"))
    devices: int | None = doc(
        "devices per machine; auto: all GPUs, or one CPU process", "at least 1"
    )
    num_nodes: int = doc("number of machines", "at least 1")
    precision: str | None = doc(
        "number format; 32, bf16 and 16 are short; null: bf16-mixed on a GPU, else 32-true",
        one_of("32-true", "bf16-mixed", "16-mixed"),
    )
    max_steps: int = doc("optimizer steps of the run", "at least 1")
    max_time: str | None = doc("stop training after this time", DURATION)
    accumulate_grad_batches: int | None = doc(
        "forward passes per optimizer step; null: as many as the batch sizes need", "at least 1"
    )
    gradient_clip_val: float | None = doc("limit of the gradient; 0 or null: none", "at least 0")
    gradient_clip_algorithm: str = doc("limit the norm or each value", one_of("norm", "value"))
    limit_train_batches: int | float | None = doc("most training batches; null: no limit", BATCHES)
    limit_val_batches: int | float | None = doc(
        "validation batches: a number, or a share such as 0.5; null: all", BATCHES_OR_SHARE
    )
    val_check_interval: int | float = doc(
        "training batches between validations. It counts batches, not optimizer steps: one "
        "step takes trainer.accumulate_grad_batches batches",
        BATCHES,
    )
    num_sanity_val_steps: int = doc(
        "validation batches tried before training; -1: all", "at least -1"
    )
    log_every_n_steps: int = doc(
        "optimizer steps between two rows of metrics.csv; lines in the terminal follow the clock",
        "at least 1",
    )
    enable_checkpointing: bool = doc("write checkpoints")
    enable_progress_bar: bool = doc("show a progress bar")
    enable_model_summary: bool = doc("print a table of the layers")
    deterministic: bool = doc("refuse operations whose results vary from run to run")
    benchmark: bool = doc("let cuDNN time several algorithms and take the fastest")
    detect_anomaly: bool = doc("find the operation that made a NaN; slow")
    profiler: str | None = doc(
        "torch: write what happens in five steps, from the eleventh on, into the run folder, for"
        " ui.perfetto.dev; null: nothing",
        one_of("torch"),
    )


@dataclass
class Strategy:
    name: str = doc("devices: ddp copies weights to each, fsdp shards them", one_of("ddp", "fsdp"))
    replicate: int = doc(
        "groups of devices, each of which shards a copy of the weights (fsdp); 1: one of all",
        "at least 1",
        default=1,
    )
    gradients: str = doc(
        "what devices exchange gradients in; bf16: half the bytes, rounded to 8 bits of precision",
        one_of("float32", "bf16"),
        default="float32",
    )


@dataclass
class PlannedFor:
    """Of mode=plan: other machines than this one, as in plan.gpu=H100-80GB plan.nodes=4."""

    gpu: str | None = doc(
        "GPU to plan for; null: the one at hand. trainer.devices is how many a node has, one where"
        " it is not set, and 8 on several nodes",
        one_of(*tables.gpus()),
    )
    nodes: int | None = doc("nodes to plan for; null: trainer.num_nodes", "at least 1")
