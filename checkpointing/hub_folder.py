"""Folders in hub format: config.json beside safetensors or pickled weights, whole or in shards.

Any fsspec file system serves; a local one maps safetensors into memory instead of reading them.
"""

import json

from checkpointing import torch_file
from checkpointing.hub import WEIGHT_FILES, shards
from checkpointing.restricted_pickle import CheckpointError


def read_json(fs, path: str) -> dict:
    try:
        value = json.loads(fs.cat_file(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_folder(fs, folder: str) -> tuple[dict, dict]:
    """(config.json, {full name: tensor}) of a folder."""
    config_file = f"{folder}/config.json"
    present = {path.rstrip("/").rpartition("/")[2] for path in fs.ls(folder, detail=False)}
    if "config.json" not in present:
        holds = ", ".join(sorted(present)[:10]) or "nothing"
        raise CheckpointError(
            f"{folder} is a folder without config.json (it holds {holds}); name a .ckpt file, or a"
            " folder written by scripts/export_hf.py or save_pretrained"
        )
    config = read_json(fs, config_file)
    for name in WEIGHT_FILES:
        if name in present:
            read = _read_shards if name.endswith(".json") else read_tensors
            return config, read(fs, f"{folder}/{name}")
    raise CheckpointError(f"{folder} has config.json but no weights: {', '.join(WEIGHT_FILES)}")


def read_tensors(fs, path: str) -> dict:
    """{name: tensor} of one safetensors or torch file."""
    if not path.endswith(".safetensors"):
        with fs.open(path, "rb") as file:
            tensors = torch_file.load(file, path)
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, not a state_dict")
        return dict(tensors)
    from fsspec.implementations.local import LocalFileSystem
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        return load_file(path) if isinstance(fs, LocalFileSystem) else load(fs.cat_file(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or was cut short ({error}); copy or download it again"
        ) from error


def _read_shards(fs, index_path: str) -> dict:
    folder = index_path.rpartition("/")[0]
    index = read_json(fs, index_path)
    try:
        names = shards(index)
    except ValueError as error:
        raise CheckpointError(f"{index_path}: {error}") from error
    tensors = {}
    for name in names:
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
