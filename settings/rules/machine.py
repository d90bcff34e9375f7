"""What the machine must have for a run: GPUs, processes, packages, a compiler."""

import os
import shutil
from collections.abc import Iterator

from settings.defaults import (
    all_devices,
    has_package,
    has_wide_heads,
    head_width,
    is_elsewhere,
    needs_block_mask,
    started_by_torchrun,
    visible_gpus,
)
from settings.keys import get
from settings.schema import Config
from settings.tables import attention_backends

URLS = (  # settings that may be a URL
    "checkpointing.save_dir",
    "checkpointing.resume_ckpt_path",
    "data.cache_dir",
    "eval.checkpoint_path",
    "training.from_pretrained",
)
DISTRIBUTED = ("train", "ppl_eval", "sample_eval")  # modes that share work out by trainer.devices


def machine(config: Config) -> Iterator[str]:
    trainer = config.trainer
    gpu, elsewhere = trainer.accelerator == "gpu", is_elsewhere(config)
    gpus = visible_gpus() if gpu and not elsewhere else None
    if elsewhere and not gpu:
        yield (
            f"trainer.accelerator={trainer.accelerator}: plan.gpu={config.plan.gpu} is a GPU; leave"
            " one of them out"
        )
    if gpus == 0:
        yield "trainer.accelerator=gpu: torch sees no GPU here; use trainer.accelerator=auto"
    elif gpus is not None and trainer.devices > gpus:
        yield f"trainer.devices={trainer.devices}: this machine has {gpus}"
    started = started_by_torchrun()
    if started not in (None, trainer.devices) and config.mode in DISTRIBUTED:
        yield (
            f"trainer.devices={trainer.devices}: torchrun started {started} processes here;"
            " leave trainer.devices out"
        )
    if trainer.precision.startswith("16") and not gpu:
        yield f"trainer.precision={trainer.precision} needs a GPU; a CPU can do bf16 and 32"
    if config.strategy.name == "fsdp":
        yield from _sharded(config)
    yield from _attention(config, gpu)
    yield from _compiled(config, gpu)


def _sharded(config: Config) -> Iterator[str]:
    groups, devices = config.strategy.replicate, all_devices(config)
    if config.trainer.precision == "16-mixed":
        yield (
            "trainer.precision=16-mixed does not go with strategy=fsdp; use bf16, 32, or"
            " strategy=ddp"
        )
    if devices == 1:
        yield "strategy=fsdp has nothing to share out on one device; use strategy=ddp"
    elif devices % groups:
        yield (
            f"strategy.replicate={groups} does not divide the {devices} devices (trainer.devices x"
            " trainer.num_nodes); use a number of groups that does"
        )
    elif groups == devices:
        yield (
            f"strategy.replicate={groups} leaves one device to a group, and nothing to share out;"
            " use fewer groups, or strategy=ddp"
        )


def _attention(config: Config, gpu: bool) -> Iterator[str]:
    """What the entry of the backend says it cannot do, and this run needs."""
    model = config.model
    entry = attention_backends().get(model.attn_backend)
    if entry is None:  # auto, a stand-in
        return
    needed = f"model.attn_backend={model.attn_backend}"
    package = entry["package"]
    way_out = "use model.attn_backend=sdpa or auto"
    if not gpu and not entry["cpu"]:
        yield f"{needed} needs a GPU; {way_out}"
    elif not gpu and not entry["cpu_backward"] and config.mode == "train":
        yield f"{needed} cannot train on a CPU (no backward pass); {way_out}"
    elif gpu and package and not is_elsewhere(config) and not has_package(package):
        yield (
            f"{needed}: the package {package} is not installed: pip install {package}; or {way_out}"
        )
    elif not entry["full_precision"] and not config.trainer.precision.startswith(("bf16", "16")):
        yield f"{needed} needs trainer.precision=bf16; or {way_out}"
    if gpu and not has_wide_heads(config, entry["least_head_width"]):
        llama = config.algo.backbone == "llama"
        width = "model.head_dim" if llama else "model.hidden_size / model.n_heads"
        yield (
            f"{needed} needs heads of at least {entry['least_head_width']} on a GPU, but"
            f" {width} is {head_width(config)}; {way_out}"
        )
    if needs_block_mask(config) and not entry["block_masks"]:
        yield (
            f"{needed} cannot apply the block mask of algo={config.algo.name};"
            " use model.attn_backend=flex, sdpa or auto"
        )
    if not entry["document_ids"] and not config.data.wrap:
        yield f"{needed} cannot hide padding (data.wrap=False); {way_out}"
    if not entry["document_ids"] and config.data.pack != "wrap":
        yield f"{needed} cannot keep documents apart (data.pack={config.data.pack}); {way_out}"
    if config.mode == "sample_eval" and config.sampling.kv_cache and not entry["cache"]:
        yield f"{needed} does not serve sampling.kv_cache=True; {way_out}"


def _compiled(config: Config, gpu: bool) -> Iterator[str]:
    if not config.model.compile or is_elsewhere(config):
        return
    if gpu and not has_package("triton"):
        yield (
            "model.compile=True: the package triton is not installed: pip install triton; or use"
            " model.compile=False"
        )
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        yield "model.compile=True needs a C++ compiler (g++, or $CXX); use model.compile=False"


def packages(config: Config) -> Iterator[str]:
    """Where one that a run may do without is asked for and not installed, how to get it."""
    if config.mode == "train" and config.wandb is not None and not has_package("wandb"):
        yield "wandb: the package wandb is not installed: pip install wandb, or set wandb=null"
    said = set()
    for key in URLS:
        value = get(config, key) or ""
        package = _package(value)
        if package is not None and package not in said and not has_package(package):
            said.add(package)
            yield f"{key}={value}: the package {package} is not installed: pip install {package}"


def _package(value: str) -> str | None:
    """What fsspec needs for a URL, beside itself; None: nothing, or it does not know."""
    protocol, is_url, _ = value.partition("://")
    if not is_url:
        return None
    from fsspec.registry import known_implementations, registry  # takes time

    name = known_implementations.get(protocol, {}).get("class", "fsspec").partition(".")[0]
    known = protocol in registry or name == "fsspec"
    return None if known else name
