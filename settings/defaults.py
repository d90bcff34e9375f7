"""What null and auto mean: settings that depend on the machine or on others."""

import importlib.metadata
import importlib.util
import math
import os
from pathlib import Path

from settings.schema import Config
from settings.tables import algorithms, attention_backends
from utils import whole_number

TRAINS = ("train", "plan", "prepare")  # modes that read the settings of training
EVALUATES = ("ppl_eval", "sample_eval", "demo")  # modes that read eval.checkpoint_path
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
OF_SIZES = ("exact", "counts")  # eval.likelihood with eval.block_sizes: the first affordable
ROUNDING = 1e-9  # weights of this sum but for rounding stay as they are typed
GPUS_OF_A_NODE = 8  # of several nodes, in a plan that does not say it
WARMUP = "lr_scheduler.num_warmup_steps"
# Other names for the same, as Lightning has them.
ACCELERATORS = {"cuda": "gpu"}
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def fill(config: Config) -> None:
    """Replaces auto, and every null that stands for a choice of this machine."""
    trainer = config.trainer
    trainer.accelerator = ACCELERATORS.get(trainer.accelerator, trainer.accelerator)
    if config.mode == "plan":
        _plan_elsewhere(config)
    gpus = 0 if trainer.accelerator == "cpu" else visible_gpus()
    if trainer.accelerator == "auto":
        trainer.accelerator = "gpu" if gpus else "cpu"
    gpu = trainer.accelerator == "gpu"
    _set(
        trainer,
        devices=started_by_torchrun() or (max(gpus, 1) if gpu else 1),
        precision="bf16-mixed" if gpu else "32-true",
    )
    trainer.precision = PRECISIONS.get(trainer.precision, trainer.precision)
    _fill_batches(config)
    _set(config.data, cache_dir=str(user_cache()) if has_user_cache() else None)
    _set(config.lr_scheduler, num_warmup_steps=default_warmup(config))
    _fill_sizes(config)
    _set(config.eval, likelihood=[default_likelihood(config)])
    if "steps" in _entry(config).get("can", ()):
        steps = "first_hitting" if config.sampling.first_hitting else "ancestral"
        _set(config.sampling, steps=steps)
    _set(config.model, dropout=0.0 if config.algo.backbone == "llama" else 0.1)
    if config.algo.backbone == "llama":
        _fill_llama(config)
    if config.lora.rank is not None:
        _set(config.lora, alpha=2.0 * config.lora.rank)
    if config.model.attn_backend == "auto":
        config.model.attn_backend = _attn_backend(config) if gpu else "sdpa"


def _fill_batches(config: Config) -> None:
    loader, devices = config.loader, max(all_devices(config), 1)
    _set(
        loader,
        batch_size=_share(loader.global_batch_size, devices),
        eval_batch_size=_share(loader.eval_global_batch_size, devices),
        num_workers=len(os.sched_getaffinity(0)),
    )
    at_once = max(loader.batch_size, 1) * devices
    accumulated = max(_share(loader.global_batch_size, at_once), 1)
    _set(config.trainer, accumulate_grad_batches=accumulated)
    _set(config.sampling, batch_size=loader.eval_batch_size)


def _fill_sizes(config: Config) -> None:
    for section in (config.training, config.eval):
        if section.block_sizes is not None:
            section.block_sizes = normalised(section.block_sizes)
    if config.training.block_schedule is not None:
        config.training.block_schedule = dict(sorted(config.training.block_schedule.items()))
    if config.eval.block_sizes is not None and config.mode == "ppl_eval":
        _set(config.eval, likelihood=list(OF_SIZES))


def all_devices(config: Config) -> int:
    """Of all machines together."""
    return config.trainer.devices * config.trainer.num_nodes


def _plan_elsewhere(config: Config) -> None:
    """The nodes of a plan, and its GPUs where they are named, as if they were these."""
    trainer = config.trainer
    trainer.num_nodes = config.plan.nodes or trainer.num_nodes
    if config.plan.gpu is not None:
        _set(trainer, devices=GPUS_OF_A_NODE if trainer.num_nodes > 1 else 1)
        if trainer.accelerator == "auto":
            trainer.accelerator = "gpu"


def is_elsewhere(config: Config) -> bool:
    """Whether the run is planned for GPUs that are named, and need not be here."""
    return config.mode == "plan" and config.plan.gpu is not None


def _fill_llama(config: Config) -> None:
    model = config.model
    _set(model, n_kv_heads=model.n_heads, ffn_size=-(-model.hidden_size * 8 // 3 // 64) * 64)
    if model.n_heads > 0 and model.hidden_size % model.n_heads == 0:  # else a check says so
        _set(model, head_dim=model.hidden_size // model.n_heads)


def sized_by_checkpoint(config: Config) -> bool:
    """Whether the sizes of the network are those of a checkpoint, and model.* has no say."""
    starts = config.mode in ("train", "plan") and config.training.from_pretrained is not None
    evaluates = config.mode in EVALUATES
    of_file = config.algo.backbone == "hf_dit"
    return of_file or (config.algo.backbone == "llama" and (starts or evaluates))


def head_width(config: Config) -> int | None:
    """None: as the checkpoint has it."""
    model = config.model
    if sized_by_checkpoint(config):
        return None
    if config.algo.backbone == "llama" and model.head_dim is not None:
        return model.head_dim
    return model.hidden_size // max(model.n_heads, 1)


def has_wide_heads(config: Config, least: int) -> bool:
    width = head_width(config)
    return width is None or width >= least


def _set(section: object, **values) -> None:
    """Those settings of the section that are null."""
    for name, value in values.items():
        if getattr(section, name) is None:
            setattr(section, name, value)


def normalised(weights: dict[int, float]) -> dict[int, float]:
    """Weights of sizes that add up to 1, in ascending order: proportions that are typed in two ways
    are the same run. What cannot be a weight stays, for the limit of the setting to refuse."""
    total = sum(weights.values())
    if abs(total - 1) < ROUNDING or not all(0 < x < math.inf for x in (*weights.values(), total)):
        total = 1.0
    return {size: weights[size] / total for size in sorted(weights)}


def default_likelihood(config: Config) -> str:
    """Of the least variance at the cost of one pass."""
    entry = _entry(config)
    if entry.get("blocks") and config.block_size == 1:
        return "exact" if config.training.eval_nll else "nelbo"
    return entry.get("likelihood", "counts")


def _entry(config: Config) -> dict:
    """Of the algorithm; empty where there is none of its name: the checks will say so."""
    return algorithms().get(config.algo.name, {})


def default_warmup(config: Config) -> int:
    """Steps of warm-up where none are given: a tenth of all."""
    return config.trainer.max_steps // 10


def _share(total: int, parts: int) -> int:
    """A part of the total, rounded up."""
    return -(-total // parts)


def _attn_backend(config: Config) -> str:
    """The fastest on a GPU that can do what the algorithm needs."""
    backends = attention_backends()
    if needs_block_mask(config):
        wide = has_wide_heads(config, backends["flex"]["least_head_width"])
        return "flex" if wide else "sdpa"
    half = config.trainer.precision.startswith(("bf16", "16"))
    one_text = config.data.wrap and config.data.pack == "wrap"
    plain = half and one_text and config.mode != "sample_eval"
    return "flash_attn" if plain and has_package("flash_attn") else "sdpa"


def visible_gpus() -> int:
    """GPUs that torch can use here; torch is imported only where a driver is installed."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def started_by_torchrun() -> int | None:
    """Processes that torchrun started on this machine; None without it."""
    inside = "TORCHELASTIC_RUN_ID" in os.environ
    return whole_number(os.environ.get("LOCAL_WORLD_SIZE")) if inside else None


def user_cache() -> Path:
    """This project's folder in the user's cache folder; it means nothing without has_user_cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "bamdlm"


def has_user_cache() -> bool:
    """A user without an entry in /etc/passwd and without $HOME has none."""
    return bool(os.environ.get("XDG_CACHE_HOME")) or os.path.expanduser("~") != "~"


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def torch_version() -> tuple[int, ...]:
    """Of the installed torch, without importing it: (2, 13)."""
    return tuple(map(int, importlib.metadata.version("torch").split(".")[:2]))


def noise_block(config: Config) -> int:
    """Tokens that share one time, or one number of masked tokens."""
    return config.block_size if _entry(config).get("blocks") else config.model.length


def block_sizes(config: Config) -> list[int]:
    """Of the blocks that a run has; several where training draws them, or they are measured."""
    if config.mode == "ppl_eval" and config.eval.block_sizes:
        return [*config.eval.block_sizes]
    training = config.training
    if config.mode not in TRAINS:
        return [config.block_size]
    grown = (training.block_schedule or {}).values()
    return [*dict.fromkeys([config.block_size, *(training.block_sizes or ()), *grown])]


def needs_block_mask(config: Config) -> bool:
    """Whether attention is more than full or causal. An AR loss has a clean half to itself."""
    clean = config.adapt.ar_loss > 0 and config.mode in TRAINS
    one = min(block_sizes(config)) >= config.model.length and not clean
    return bool(_entry(config).get("blocks")) and not one
