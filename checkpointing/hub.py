"""Where a checkpoint lies: a local path, an fsspec URL, or a model on the Hugging Face hub; and
folders in hub format: config.json beside safetensors or pickled weights, whole or in shards (models
of transformers: safetensors alone).

Only huggingface_hub talks to the hub, so its own settings hold (HF_HOME, HF_ENDPOINT, HF_TOKEN, and
HF_HUB_OFFLINE, which reads its cache alone). Any fsspec file system serves; a local one maps
safetensors into memory instead of reading them.
"""

import json
import logging
import os
import re
from functools import partial
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from checkpointing import sharded_index, torch_file
from checkpointing.families import SAFETENSORS, layout_of
from checkpointing.restricted_pickle import CheckpointError
from data.hub_errors import CONNECT_SECONDS, HubUnreachable, hub_errors

log = logging.getLogger(__name__)

# The first name of each pair is looked for; an index also names the shards that belong to it.
WEIGHT_FILES = (*SAFETENSORS, "pytorch_model.bin", "pytorch_model.bin.index.json")

MOST_JSON = 1 << 24  # bytes of a config.json, an index of shards, or a head of safetensors

_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_FILE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".gguf")
NO_GGUF = (
    "a GGUF file, which is not read: give the folder with config.json and safetensors that it was"
    " made from, or make one with scripts/adapt/convert_gguf.py"
)


def locate(path_or_id: str | Path, *, revision: str | None = None):
    """(fsspec file system, path in it) of a file or folder that exists.

    A local path wins over a hub id; `id@revision` is short for the argument.
    """
    text = os.fspath(path_or_id)
    local = Path(os.path.expanduser(text))
    if "://" in text or local.exists():
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} concerns hub ids, but {text} is a file or folder"
            )
        try:
            fs, path = url_to_fs(text if "://" in text else str(local.absolute()))
            exists = fs.exists(path)
        except (ImportError, ValueError) as error:  # a protocol whose package is not installed
            raise FileNotFoundError(f"{text} cannot be opened: {error}") from error
        if not exists:
            raise FileNotFoundError(f"{text} {_why_absent(fs, path)}")
        return fs, path
    match = _HUB_ID.fullmatch(text)
    if match is None or text.endswith(_FILE_ENDINGS):
        raise FileNotFoundError(f"{text} does not exist (looked at {local.absolute()})")
    if match["revision"] and revision and match["revision"] != revision:
        raise ValueError(f"{text} and revision {revision!r} name two revisions; give one")
    return url_to_fs(str(fetch(match["id"], match["revision"] or revision)))


def in_parts(fs, path: str) -> bool:
    """Whether a checkpoint in parts lies there (sharded.py). CheckpointError where it cannot be
    read, because it is not on a disk."""
    if isinstance(fs, LocalFileSystem):
        return sharded_index.is_in_parts(path)
    if fs.exists(f"{path}/{sharded_index.NAME}"):
        raise CheckpointError(
            f"{path} is a checkpoint in parts, which is read from a disk alone: download the"
            " folder, or the file that scripts/consolidate.py makes of it"
        )
    return False


def _why_absent(fs, path: str) -> str:
    """A web server that does not answer looks to fsspec as if it did not have the file."""
    try:
        fs.info(path)
    except OSError as error:
        if isinstance(error.__cause__, OSError):  # of the connection
            return f"cannot be reached ({error.__cause__})"
    return "does not exist"


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Folder with config.json and the weights of a hub model, downloaded unless it is cached."""
    from huggingface_hub import hf_hub_download

    what = f"hub model {repo_id}" + (f" at revision {revision}" if revision else "")
    present, note = _listing(repo_id, revision, what)

    def get(name: str) -> Path:
        with hub_errors(f"{name} of {what}", absent=" does not exist"):
            cached = {"revision": revision, "local_files_only": bool(note)}
            return Path(hf_hub_download(repo_id, name, **cached))

    if "config.json" not in present:
        raise FileNotFoundError(f"hub model {repo_id} has no config.json: not one of this family")
    folder = get("config.json").parent
    config = read_json(LocalFileSystem(), str(folder / "config.json"))
    weights = weight_file(f"hub model {repo_id}", config, present, note)
    found = get(weights)
    for shard in shards(found, json.loads(found.read_text())) if weights.endswith(".json") else ():
        if shard not in present:
            raise FileNotFoundError(f"{repo_id}: {weights} names {shard}, which is not there{note}")
        get(shard)
    return folder


def shards(place: str | Path, index: dict) -> list[str]:
    """File names of a sharded model, from its index at `place`."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{place}: the index has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or re.fullmatch(r"[\w-][\w.-]*", name) is None:
            raise CheckpointError(
                f"{place}: the index names the shard {name!r}; a plain file name was expected"
            )
    return sorted(set(weight_map.values()))


def _listing(repo_id: str, revision: str | None, what: str) -> tuple[set[str], str]:
    """File names of a hub model; and the reason where only the cache can tell, else nothing.

    One question first: downloads would retry for half a minute before reporting a missing network.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    no_path = f"there is no local path {Path(repo_id).absolute()}"
    absent = f" does not exist (or is private: `hf auth login`), and {no_path}"
    note = " in the cache (HF_HUB_OFFLINE is set)"
    if not constants.is_offline_mode():
        try:
            with hub_errors(what, absent=absent):
                info = HfApi().model_info(repo_id, revision=revision, timeout=CONNECT_SECONDS)
            return {file.rfilename for file in info.siblings or ()}, ""
        except HubUnreachable as error:
            log.warning("%s; looking in its cache", error)
            note = " in the cache, and the hub cannot be reached"
    try:
        folder = snapshot_download(repo_id, revision=revision, local_files_only=True)
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{what} is not{note}, and {no_path}. With a connection: hf download {repo_id}"
        ) from error
    return {path.name for path in Path(folder).iterdir()}, note


def weight_file(place: str, config: dict, present: set[str], note: str = "") -> str:
    """The name of the file, or of the index, that holds the weights of a folder of these files;
    CheckpointError where there is none that is read."""
    wanted = SAFETENSORS if layout_of(place, config) == "transformers" else WEIGHT_FILES
    if found := next((name for name in wanted if name in present), None):
        return found
    if any(name in present for name in WEIGHT_FILES):
        raise CheckpointError(
            f"{place} has its weights as pickles, which are not read: load it in transformers where"
            " you trust it, and write it again with save_pretrained"
        )
    if gguf := sorted(name for name in present if name.endswith(".gguf")):
        raise CheckpointError(f"{place} has no weights but {gguf[0]}, {NO_GGUF}")
    raise CheckpointError(
        f"{place} has config.json but no weights: none of {', '.join(wanted)}{note}"
    )


def check_file(fs, path: str, most: int | None = None) -> None:
    """CheckpointError where it is no regular file, or has more than `most` bytes."""
    info = fs.info(path)
    if info["type"] != "file":
        raise CheckpointError(f"{path} is no regular file")
    if most is not None and (info["size"] or 0) > most:
        raise CheckpointError(f"{path} has {info['size']:,} bytes, more than {most:,}")


def read_json(fs, path: str) -> dict:
    check_file(fs, path, MOST_JSON)
    try:
        value = json.loads(fs.cat_file(path))
    except (ValueError, RecursionError) as error:  # a number may have too many digits
        raise CheckpointError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_folder(fs, folder: str) -> tuple[dict, dict]:
    """(config.json, {full name: tensor}) of a folder."""
    present = {path.rstrip("/").rpartition("/")[2] for path in fs.ls(folder, detail=False)}
    if "config.json" not in present:
        if gguf := sorted(name for name in present if name.endswith(".gguf")):
            raise CheckpointError(f"{folder} holds {gguf[0]}, {NO_GGUF}")
        holds = ", ".join(sorted(present)[:10]) or "nothing"
        raise CheckpointError(
            f"{folder} is a folder without config.json (it holds {holds}); name a .ckpt file, or a"
            " folder written by scripts/export_hf.py or save_pretrained"
        )
    config = read_json(fs, f"{folder}/config.json")
    name = weight_file(folder, config, present)
    read = _read_shards if name.endswith(".json") else read_tensors
    return config, read(fs, f"{folder}/{name}")


def read_tensors(fs, path: str) -> dict:
    """{name: tensor} of one safetensors or torch file."""
    check_file(fs, path)
    if not path.endswith(".safetensors"):
        with fs.open(path, "rb") as file:
            tensors = torch_file.load(file, path)
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, not a state_dict")
        return dict(tensors)
    check_header(fs, path)
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        return load_file(path) if isinstance(fs, LocalFileSystem) else load(fs.cat_file(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or was cut short ({error}); copy or download it again"
        ) from error


def check_header(fs, path: str) -> None:
    """CheckpointError where the head of a safetensors file, which names its tensors, is too large,
    or names one twice: readers differ in which of them they take."""
    with fs.open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_JSON:
            raise CheckpointError(
                f"{path} is damaged or no checkpoint: its head of {size:,} bytes is more than"
                f" {MOST_JSON:,}"
            )
        head = file.read(size)
    try:
        json.loads(head, object_pairs_hook=partial(_once, path))
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        return  # for the library to say


def _once(path: str, pairs: list[tuple[str, object]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise CheckpointError(f"{path} is damaged: it names {name!r} twice")
        seen.add(name)


def _read_shards(fs, index_path: str) -> dict:
    folder = index_path.rpartition("/")[0]
    index = read_json(fs, index_path)
    tensors = {}
    for name in shards(index_path, index):
        if not fs.exists(f"{folder}/{name}"):
            raise CheckpointError(f"{index_path} names {name}, which is missing; download it again")
        found = read_tensors(fs, f"{folder}/{name}")
        expected = {key for key, shard in index["weight_map"].items() if shard == name}
        if expected != found.keys():
            odd = sorted(expected ^ found.keys())
            raise CheckpointError(
                f"{index_path} and {name} disagree on {len(odd)} keys: {', '.join(odd[:10])}"
            )
        tensors.update(found)
    return tensors
