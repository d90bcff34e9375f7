"""Where a run lives: one folder for all commands whose settings give the same trained weights."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from settings.defaults import EVALUATES, PRECISIONS, WARMUP, default_warmup
from settings.keys import LEAVES, get, nested, put
from settings.schema import Config
from utils import digest, read_json, write_json

OUTPUTS = Path("outputs")
SETTINGS = "settings.json"  # in a run folder: shaping(config) of the run
RUN_FOLDER = "<run folder>"  # stands for ${cwd:} until place(), since it depends on other settings
# What else a value is called in the authors' checkpoints.
SAME_NAME = {("algo.name", "bd3lm"): "bamdlm"} | {
    ("trainer.precision", name): full for name, full in PRECISIONS.items()
}
ABSENT = object()
LONGEST_NAME = 200  # characters of a folder's name; file systems have 255 bytes
SHAPING_SECTIONS = (
    "adapt",
    "algo",
    "data",
    "lora",
    "model",
    "noise",
    "lr_scheduler",
    "optim",
    "training",
)
SHAPING_KEYS = (
    "seed",
    "block_size",
    "loader.global_batch_size",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
)
# Settings of SHAPING_SECTIONS that leave the trained weights as they are, rounding apart.
NOT_SHAPING = {
    "algo.T",
    "algo.sampler",
    "data.cache_dir",
    "model.activation_checkpointing",
    "model.attn_backend",
    "model.compile",
    "training.eval_nll",
    "training.max_bad_steps",
}
# Settings that came later, with what every run before them did: at that they leave the name of a
# run folder as it was.
LATER = {
    "data.format": "text",
    "data.chat_fields": None,
    "data.stream_by": "units",
    "lora.rank": None,
    "lora.alpha": None,
    "lora.dropout": 0.05,
    "lora.modules": None,
    "lora.mask_row": True,
    "training.noise": "times",
    "training.counts": None,
    "training.count_law": "uniform",
    "training.views": 1,
    "training.block_sizes": None,
    "training.block_schedule": None,
    "adapt.clean": "block",
    "adapt.label": "same",
    "adapt.ar_loss": 0.0,
    "optim.name": "adamw",
    "optim.momentum": None,
    "model.param_dtype": "float32",
    "model.n_kv_heads": None,
    "model.head_dim": None,
    "model.ffn_size": None,
    "model.rope_theta": 1e4,
    "model.rms_norm_eps": 1e-6,
    "model.qk_norm": False,
    "model.qkv_bias": False,
    "model.tied": True,
}
# They decide which intervals the clip search compares, what a law of counts is learnt from, and
# when.
SEARCH_KEYS = (
    "loader.eval_global_batch_size",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
)


def shaping(config: Config) -> dict:
    """{dotted key: value} of the settings that shape training; runs that agree in them are one run.

    Left out: devices, workers, logging, checkpoints, evaluation, sampling. trainer.max_steps
    counts only where the learning rate depends on it, so that a run can be made longer; validation
    settings only where the clip search or the law of counts uses them. block_size is such a one
    where rows draw theirs, or blocks follow a schedule.
    """
    keys = [key for key in LEAVES if key.split(".")[0] in SHAPING_SECTIONS]
    keys = [*SHAPING_KEYS, *(key for key in keys if key not in NOT_SHAPING)]
    if config.lr_scheduler.name == "cosine_decay_warmup":
        keys.append("trainer.max_steps")
    searched = config.algo.clip_search_widths and not config.algo.fix_clipping
    if searched or config.training.count_law == "learnt":
        keys.extend(SEARCH_KEYS)
    if config.training.block_sizes is not None or config.training.block_schedule is not None:
        keys.remove("block_size")
    return {key: get(config, key) for key in sorted(keys)}


def differences(config: Config, recorded: dict | None) -> list[str]:
    """How the shaping settings differ from those recorded in a checkpoint (nested, may be partial).

    Settings that the record does not have are not compared: the authors' checkpoints have others.
    Those of LATER had but one value before.
    """
    found = []
    for key, value in shaping(config).items():
        section, _, name = key.rpartition(".")
        node = nested(recorded, section) if section else recorded
        there = node.get(name, LATER.get(key, ABSENT)) if isinstance(node, dict) else ABSENT
        there = SAME_NAME.get((key, str(there)), there)
        if there is not ABSENT and there != value:
            theirs = f"the checkpoint has {there}"
            if key == WARMUP and value == default_warmup(config):
                theirs += f"; null is a tenth of trainer.max_steps: set {WARMUP}={there} to go on"
            found.append(f"{key}={value} ({theirs})")
    return found


def run_dir(config: Config) -> Path:
    """outputs/<data.train>/<wandb.name, else algo-length-blocks>-<8 hex digits of shaping>, as in
    bamdlm-1024-16; settings of LATER count only where they are another value."""
    name = get(config, "wandb.name")
    drawn = config.training.block_sizes or (config.training.block_schedule or {}).values()
    sizes = "_".join(map(str, dict.fromkeys(drawn) or [config.block_size]))
    name = name or f"{config.algo.name}-{config.model.length}-{sizes}"
    shapes = {k: v for k, v in shaping(config).items() if k not in LATER or v != LATER[k]}
    shaped = digest(json.dumps(shapes, sort_keys=True), 8)
    corpus = Path(config.data.train or "none")
    corpus = corpus.stem if corpus.suffix else str(corpus)
    return OUTPUTS / _slug(corpus) / f"{_slug(name)}-{shaped}"


def _slug(text: str) -> str:
    """A name that is one path component, of a length that leaves room for endings."""
    return re.sub(r"[^\w.+=-]+", "-", text)[:LONGEST_NAME].strip("-.") or "run"


def place(config: Config) -> None:
    """Puts the run folder where ${cwd:} stood."""
    folder = str(run_dir(config))
    for key in LEAVES:
        value = get(config, key)
        if isinstance(value, str) and RUN_FOLDER in value:
            put(config, key, value.replace(RUN_FOLDER, folder))


def local_folder(save_dir: str) -> Path:
    """Where a run keeps what is no checkpoint: its folder, or if that is a URL, under outputs/."""
    scheme, url, place = save_dir.partition("://")
    return OUTPUTS / scheme / place.strip("/") if url else Path(save_dir)


def write_settings(config: Config) -> Path:
    """Puts settings.json into the run folder: what newest_checkpoint reads."""
    path = local_folder(config.checkpointing.save_dir) / SETTINGS
    write_json(path, shaping(config))
    return path


def take_newest_checkpoint(config: Config) -> list[str]:
    """Sets eval.checkpoint_path where the mode needs one and none is given; the note that says so,
    or none."""
    needed = config.mode in EVALUATES and config.algo.backbone != "hf_dit"
    if not needed or config.eval.checkpoint_path is not None:
        return []
    config.eval.checkpoint_path = found = newest_checkpoint(config)
    return [f"eval.checkpoint_path is not set: taking {found}"] if found else []


def newest_checkpoint(config: Config) -> str | None:
    """The checkpoint written last by a run of the same algorithm and network: in the run folder,
    where it is another than run_dir's, or else under outputs/. None where there is none."""
    own = local_folder(config.checkpointing.save_dir)
    if own != run_dir(config) and (found := _newest(config, own.glob(SETTINGS))):
        return found
    outputs = (*OUTPUTS.glob(f"*/{SETTINGS}"), *OUTPUTS.glob(f"*/*/{SETTINGS}"))
    return _newest(config, outputs)


def _newest(config: Config, runs: Iterable[Path]) -> str | None:
    """Of runs, by their settings.json."""
    found = []
    for path in runs:
        try:
            theirs = read_json(path)
            same = theirs["algo.name"] == config.algo.name
            llama = theirs.get("algo.backbone") == "llama"
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # not written by write_settings
        if same and llama == (config.algo.backbone == "llama"):
            found += filter(Path.exists, path.parent.glob("checkpoints/*.ckpt"))
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None
