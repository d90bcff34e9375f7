"""Packages that a run may do without: where one is asked for and not installed, how to get it."""

from collections.abc import Iterator

from settings.defaults import has_package
from settings.keys import get
from settings.schema import Config

URLS = (  # settings that may be a URL
    "checkpointing.save_dir",
    "checkpointing.resume_ckpt_path",
    "data.cache_dir",
    "eval.checkpoint_path",
    "training.from_pretrained",
)


def packages(config: Config) -> Iterator[str]:
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
