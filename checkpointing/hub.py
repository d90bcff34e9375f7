"""Where a checkpoint lies: a local path, an fsspec URL, or a model on the Hugging Face hub.

Only huggingface_hub talks to the hub, so its own settings hold (HF_HOME, HF_ENDPOINT, HF_TOKEN, and
HF_HUB_OFFLINE, which reads its cache alone).
"""

import json
import logging
import os
import re
from pathlib import Path

from utils import CONNECT_SECONDS, HubUnreachable, hub_errors

log = logging.getLogger(__name__)

# The first name of each pair is looked for; an index also names the shards that belong to it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_FILE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json")


def locate(path_or_id: str | Path, *, revision: str | None = None, launch_dir=None):
    """(fsspec file system, path in it) of a file or folder that exists; relative to `launch_dir`.

    A local path wins over a hub id; `id@revision` is short for the argument.
    """
    from fsspec.core import url_to_fs

    text = os.fspath(path_or_id)
    if "://" in text:
        _no_revision(text, revision)
        try:
            fs, path = url_to_fs(text)
            exists = fs.exists(path)
        except (ImportError, ValueError) as error:  # a protocol whose package is not installed
            raise FileNotFoundError(f"{text} cannot be opened: {error}") from error
        if not exists:
            raise FileNotFoundError(f"{text} does not exist")
        return fs, path
    local = Path(launch_dir or ".") / Path(text).expanduser()
    fs, path = url_to_fs(str(local.absolute()))
    if local.exists():
        _no_revision(text, revision)
        return fs, path
    match = _HUB_ID.fullmatch(text)
    if match is None or text.endswith(_FILE_ENDINGS):
        raise FileNotFoundError(f"{text} does not exist (looked at {local.absolute()})")
    if match["revision"] and revision and match["revision"] != revision:
        raise ValueError(f"{text} and revision {revision!r} name two revisions; give one")
    return fs, str(fetch(match["id"], match["revision"] or revision))


def _no_revision(path: str, revision: str | None):
    if revision is not None:
        raise ValueError(f"revision {revision!r} concerns hub ids, but {path} is a file or folder")


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Folder with config.json and the weights of a hub model, downloaded unless it is cached."""
    present, note = _listing(repo_id, revision)
    config = _file(repo_id, "config.json", revision, present, note)
    if config is None:
        raise FileNotFoundError(f"hub model {repo_id} has no config.json: not one of this family")
    for name in WEIGHT_FILES:
        weights = _file(repo_id, name, revision, present, note)
        if weights is None:
            continue
        for shard in shards(json.loads(weights.read_text())) if name.endswith(".json") else ():
            if _file(repo_id, shard, revision, present, note) is None:
                raise FileNotFoundError(
                    f"{repo_id}: {name} names {shard}, which is not there{note}"
                )
        return config.parent
    raise FileNotFoundError(f"hub model {repo_id} has none of {', '.join(WEIGHT_FILES)}{note}")


def shards(index: dict) -> list[str]:
    """File names of a sharded model, from its index."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("the index has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not isinstance(name, str) or re.fullmatch(r"[\w-][\w.-]*", name) is None:
            raise ValueError(f"the index names the shard {name!r}; a plain file name was expected")
    return names


def _listing(repo_id: str, revision: str | None) -> tuple[set[str] | None, str]:
    """File names of a hub model, or None and the reason why only the cache can tell.

    One question first: downloads would retry for half a minute before reporting a missing network.
    """
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return None, " in the cache (HF_HUB_OFFLINE is set)"
    absent = f" does not exist (or is private: `hf auth login`), and {_no_local_path(repo_id)}"
    try:
        with hub_errors(_named(repo_id, revision), absent=absent):
            info = HfApi().model_info(repo_id, revision=revision, timeout=CONNECT_SECONDS)
    except HubUnreachable as error:
        log.warning("%s; looking in its cache", error)
        return None, " in the cache, and the hub cannot be reached"
    return {file.rfilename for file in info.siblings or ()}, ""


def _file(repo_id, name, revision, present: set[str] | None, note: str) -> Path | None:
    """A file of a hub model, or None if the model (or without a network the cache) lacks it."""
    from huggingface_hub import errors, hf_hub_download

    if present is not None and name not in present:
        return None
    if present is not None:
        with hub_errors(f"{name} of {_named(repo_id, revision)}", absent=" does not exist"):
            return Path(hf_hub_download(repo_id, name, revision=revision))
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        if name != "config.json":
            return None
        raise FileNotFoundError(
            f"{_named(repo_id, revision)} is not{note}, and {_no_local_path(repo_id)}."
            f" With a connection: hf download {repo_id}"
        ) from error


def _named(repo_id: str, revision: str | None) -> str:
    return f"hub model {repo_id}" + (f" at revision {revision}" if revision else "")


def _no_local_path(repo_id: str) -> str:
    return f"there is no local path {Path(repo_id).absolute()}"
