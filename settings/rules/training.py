"""What must hold between the settings of training: batches, optimizer, adapters, checkpoints."""

from collections.abc import Iterator

from settings.defaults import all_devices, torch_version
from settings.schema import Config

MUON_SINCE = (2, 9)  # of torch


def batches(config: Config) -> Iterator[str]:
    loader, trainer = config.loader, config.trainer
    tokens, length = config.eval.tokens_per_batch, config.model.length
    if tokens is not None and tokens < length:
        yield f"eval.tokens_per_batch={tokens} is less than a row of model.length={length}"
    if config.mode == "ppl_eval" and trainer.limit_val_batches == 0:
        yield f"trainer.limit_val_batches={trainer.limit_val_batches} leaves nothing to evaluate"
    if config.mode not in ("train", "plan"):
        return
    devices = all_devices(config)
    at_once = loader.batch_size * devices
    total = at_once * trainer.accumulate_grad_batches
    each = f"loader.batch_size={loader.batch_size} on {devices} device{'s' * (devices > 1)}"
    wanted = f"loader.global_batch_size={loader.global_batch_size}"
    if loader.global_batch_size % at_once:
        yield f"{wanted} is not a multiple of {at_once}: {each}"
    elif total != loader.global_batch_size:
        yield (
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} with {each} makes"
            f" {total}, not {wanted}; leave it out"
        )


def optimizer(config: Config) -> Iterator[str]:
    if config.optim.name != "muon":
        return
    if config.optim.momentum is None:
        yield "optim.momentum=null: optim=muon needs a number in [0, 1), such as 0.95"
    if config.strategy.name == "fsdp":
        yield (
            "optim=muon works on whole matrices, which strategy=fsdp shards; use strategy=ddp or"
            " optim=adamw"
        )
    if config.mode == "train" and (found := torch_version()) < MUON_SINCE:
        yield (
            f"optim=muon needs torch {'.'.join(map(str, MUON_SINCE))} or newer, here is"
            f" {'.'.join(map(str, found))}; use optim=adamw"
        )


def masters(config: Config) -> Iterator[str]:
    asked, trainer = f"model.param_dtype={config.model.param_dtype}", config.trainer
    if config.model.param_dtype == "float32" or config.mode not in ("train", "plan"):
        return
    if trainer.precision != "bf16-mixed":
        yield (
            f"{asked} needs trainer.precision=bf16-mixed, not {trainer.precision}: products are"
            " made in the format of the weights"
        )
    if config.strategy.name == "fsdp":
        yield f"{asked} does not go with strategy=fsdp, which shares out float32 weights; use ddp"
    if config.strategy.gradients == "bf16":
        yield f"{asked} does not go with strategy.gradients=bf16: its gradients are sums in float32"


def adapters(config: Config) -> Iterator[str]:
    asked = f"lora.rank={config.lora.rank}"
    if config.lora.rank is None or config.mode not in ("train", "plan"):
        return
    if config.training.from_pretrained is None:
        yield (
            f"{asked} needs weights to start from: set training.from_pretrained, or lora.rank=null"
            " to train all weights"
        )
    if config.strategy.name == "fsdp":
        yield f"{asked} does not go with strategy=fsdp, which shares out what is trained; use ddp"
    if config.optim.name == "muon":
        yield f"{asked} does not go with optim=muon, which is for whole matrices; use optim=adamw"
    if config.lora.modules == []:
        yield "lora.modules=[] names no layer; null: all linear layers of the blocks"


def optimization(config: Config) -> Iterator[str]:
    schedule, trainer = config.lr_scheduler, config.trainer
    if schedule.name == "cosine_decay_warmup":
        if schedule.num_warmup_steps >= trainer.max_steps:
            yield (
                f"lr_scheduler.num_warmup_steps={schedule.num_warmup_steps} must be below"
                f" trainer.max_steps={trainer.max_steps}"
            )
        for key in ("warmup_lr_init", "lr_min"):
            value = getattr(schedule, key)
            if value is None or value > config.optim.lr:
                yield f"lr_scheduler.{key}={value} must be at most optim.lr={config.optim.lr}"
    monitor = config.callbacks.checkpoint_monitor
    if monitor is not None and monitor.mode == "max":
        yield (
            f"callbacks.checkpoint_monitor.mode=max would keep the worst checkpoint: less"
            f" {monitor.monitor} is better; use min"
        )


def saving(config: Config) -> Iterator[str]:
    folder = config.checkpointing.save_dir
    if config.checkpointing.format == "sharded" and "://" in folder and config.mode == "train":
        yield (
            f"checkpointing.format=sharded writes to a disk alone, not to"
            f" checkpointing.save_dir={folder}: give a folder, or checkpointing.format=file"
        )
