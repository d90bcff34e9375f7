"""What null and auto mean: settings that depend on others, on the machine, or on earlier runs."""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from settings.compose import RUN_FOLDER, flatten
from settings.overrides import LEAVES
from settings.schema import Config

OUTPUTS = Path("outputs")
SETTINGS = "settings.json"  # in a run folder: shaping(config) of the run
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
WARMUP = "lr_scheduler.num_warmup_steps"
# Settings whose null is replaced by fill(), though their type has no None.
CHOSEN = {
    "loader.batch_size",
    "loader.eval_batch_size",
    "loader.num_workers",
    "sampling.batch_size",
    "trainer.devices",
    "trainer.precision",
    "trainer.accumulate_grad_batches",
    "data.cache_dir",
    WARMUP,
}
# Other names for the same, as Lightning has them.
ACCELERATORS = {"cuda": "gpu"}
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
# What else a value is called in the authors' checkpoints.
SAME_NAME = {("algo.name", "bd3lm"): "bamdlm"} | {
    ("trainer.precision", name): full for name, full in PRECISIONS.items()
}
ABSENT = object()
FLEX_HEAD_WIDTH = 16  # the narrowest heads that FlexAttention's kernel takes on a GPU
# Settings of the sections below that leave the trained weights as they are, rounding apart.
NOT_SHAPING = {
    "algo.T",
    "algo.sampler",
    "data.cache_dir",
    "model.attn_backend",
    "model.compile",
    "training.eval_nll",
    "training.max_bad_steps",
}
SHAPING_SECTIONS = ("algo", "data", "model", "noise", "lr_scheduler", "optim", "training")
SHAPING_KEYS = (
    "seed",
    "block_size",
    "loader.global_batch_size",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
)
# They decide which intervals the clip search compares, and when.
SEARCH_KEYS = (
    "loader.eval_global_batch_size",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
)


def visible_gpus() -> int:
    """GPUs that torch can use here; torch is imported only where a driver is installed."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def started_by_torchrun() -> int | None:
    """Processes that torchrun started on this machine; None without it."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def user_cache() -> Path:
    """This project's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bamdlm"


def has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def needs_block_mask(algo: str, block_size: int, length: int) -> bool:
    """Whether attention is more than full or causal."""
    return algo == "bamdlm" and block_size < length


def flex_takes(hidden_size: int, n_heads: int) -> bool:
    """Whether heads are wide enough for FlexAttention's kernel on a GPU."""
    return hidden_size >= FLEX_HEAD_WIDTH * n_heads


def _attn_backend(values: dict, gpu: bool) -> str:
    if not gpu:
        return "sdpa"
    masked = needs_block_mask(values["algo.name"], values["block_size"], values["model.length"])
    half = values["trainer.precision"].startswith(("bf16", "16"))
    if masked:
        taken = flex_takes(values["model.hidden_size"], values["model.n_heads"])
        return "flex" if taken else "sdpa"
    one_text = values["data.wrap"] and values["data.pack"] == "wrap"
    plain = half and one_text and values["mode"] != "sample_eval"
    return "flash_attn" if plain and has_flash_attn() else "sdpa"


def _per_device(total: int, devices: int) -> int:
    return -(-total // devices)


def _fill_machine(values: dict):
    accelerator = values["trainer.accelerator"]
    accelerator = ACCELERATORS.get(accelerator, accelerator)
    gpus = 0 if accelerator == "cpu" else visible_gpus()
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    values["trainer.accelerator"] = accelerator
    gpu = accelerator == "gpu"
    if values["trainer.devices"] is None:
        values["trainer.devices"] = started_by_torchrun() or (max(gpus, 1) if gpu else 1)
    if values["trainer.precision"] is None:
        values["trainer.precision"] = "bf16-mixed" if gpu else "32-true"
    precision = values["trainer.precision"]
    values["trainer.precision"] = PRECISIONS.get(precision, precision)
    if values["loader.num_workers"] is None:
        values["loader.num_workers"] = len(os.sched_getaffinity(0))
    if values["data.cache_dir"] is None:
        values["data.cache_dir"] = str(user_cache())
    if values["model.attn_backend"] == "auto":
        values["model.attn_backend"] = _attn_backend(values, gpu)


def _fill_sizes(values: dict):
    devices = max(values["trainer.devices"] * values["trainer.num_nodes"], 1)
    for prefix in ("", "eval_"):
        if values[f"loader.{prefix}batch_size"] is None:
            total = values[f"loader.{prefix}global_batch_size"]
            values[f"loader.{prefix}batch_size"] = _per_device(total, devices)
    if values["trainer.accumulate_grad_batches"] is None:
        at_once = max(values["loader.batch_size"], 1) * devices
        passes = _per_device(values["loader.global_batch_size"], at_once)
        values["trainer.accumulate_grad_batches"] = max(passes, 1)
    if values["sampling.batch_size"] is None:
        values["sampling.batch_size"] = values["loader.eval_batch_size"]
    if values[WARMUP] is None:
        values[WARMUP] = values["trainer.max_steps"] // 10


def fill(values: dict) -> dict:
    """The flat values with every null of CHOSEN replaced."""
    values = dict(values)
    _fill_machine(values)
    _fill_sizes(values)
    if values["sampling.steps"] is None and values["algo.sampler"] == "semi_ar":
        ancestral = not values["sampling.first_hitting"]
        values["sampling.steps"] = "ancestral" if ancestral else "first_hitting"
    return values


def shaping(config: Config) -> dict:
    """{dotted key: value} of the settings that shape training; runs that agree in them are one run.

    Left out: devices, workers, logging, checkpoints, evaluation, sampling. trainer.max_steps
    counts only where the learning rate depends on it, so that a run can be made longer; validation
    settings only where the clip search uses them.
    """
    flat = flatten(config)
    keys = [key for key in LEAVES if key.split(".")[0] in SHAPING_SECTIONS]
    keys = [*SHAPING_KEYS, *(key for key in keys if key not in NOT_SHAPING)]
    if config.lr_scheduler.name == "cosine_decay_warmup":
        keys.append("trainer.max_steps")
    if config.algo.clip_search_widths and not config.algo.fix_clipping:
        keys.extend(SEARCH_KEYS)
    return {key: flat[key] for key in sorted(keys)}


def differences(config: Config, recorded: dict | None) -> list[str]:
    """How the shaping settings differ from those recorded in a checkpoint (nested, may be partial).

    Settings that the record does not have are not compared: the authors' checkpoints have others.
    """
    found = []
    for key, value in shaping(config).items():
        node = recorded or {}
        for part in key.split("."):
            node = node.get(part, ABSENT) if isinstance(node, dict) else ABSENT
        if node is ABSENT:
            continue
        node = SAME_NAME.get((key, str(node)), node)
        if node != value:
            theirs = f"the checkpoint has {node}"
            if key == WARMUP and value == config.trainer.max_steps // 10:
                theirs += f"; null is a tenth of trainer.max_steps: set {WARMUP}={node} to go on"
            found.append(f"{key}={value} ({theirs})")
    return found


def _slug(text: str) -> str:
    """A name that is one path component."""
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "run"


def run_dir(config: Config) -> Path:
    """outputs/<data.train>/<wandb.name, else algo-length-block>-<8 hex digits of shaping>."""
    name = config.wandb.name if config.wandb is not None else None
    name = name or f"{config.algo.name}-{config.model.length}-{config.block_size}"
    digest = hashlib.sha256(json.dumps(shaping(config), sort_keys=True).encode()).hexdigest()
    corpus = Path(config.data.train or "none")
    corpus = corpus.stem if corpus.suffix else str(corpus)
    return OUTPUTS / _slug(corpus) / f"{_slug(name)}-{digest[:8]}"


def with_run_folder(values: dict, folder: Path) -> dict:
    """The values with ${cwd:} replaced."""
    return {
        key: value.replace(RUN_FOLDER, str(folder)) if isinstance(value, str) else value
        for key, value in values.items()
    }


def local_folder(save_dir: str) -> Path:
    """Where a run keeps what is no checkpoint: its folder, or if that is a URL, under outputs/."""
    scheme, url, place = save_dir.partition("://")
    return OUTPUTS / scheme / place.strip("/") if url else Path(save_dir)


def write_settings(config: Config) -> Path:
    """Puts settings.json into the run folder: what newest_checkpoint reads."""
    path = local_folder(config.checkpointing.save_dir) / SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(shaping(config), indent=2) + "\n")
    os.replace(unfinished, path)
    return path


def newest_checkpoint(config: Config) -> str | None:
    """The checkpoint written last by a run of the same algorithm: in the run folder, where it is
    another than run_dir's, or else under outputs/. None where there is none."""
    own = local_folder(config.checkpointing.save_dir)
    if own != run_dir(config) and (found := _newest(config.algo.name, own.glob(SETTINGS))):
        return found
    outputs = (*OUTPUTS.glob(f"*/{SETTINGS}"), *OUTPUTS.glob(f"*/*/{SETTINGS}"))
    return _newest(config.algo.name, outputs)


def _newest(algorithm: str, runs: Iterable[Path]) -> str | None:
    """Of runs, by their settings.json."""
    found = []
    for path in runs:
        try:
            theirs = json.loads(path.read_text())["algo.name"]
        except (ValueError, KeyError):
            continue  # not written by write_settings
        if theirs == algorithm:
            found += path.parent.glob("checkpoints/*.ckpt")
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None
