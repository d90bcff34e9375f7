"""Where a published SSD-LM lies and whether its files are there; imports no torch.

The folder holds config.json, model.safetensors (or pytorch_model.bin), the tokenizer's files, and
embed_sum_layer.pt with timestep_layer.pt, or extra_layers.safetensors in their place.
"""

import hashlib
import json
import os
from pathlib import Path

from utils import first_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
LAYERS_TOGETHER = "extra_layers.safetensors"
LAYER_FILES = ("embed_sum_layer.pt", "timestep_layer.pt")
HUB_FILES = ("*.json", "*.txt", "*.safetensors", "pytorch_model.bin", *LAYER_FILES)
SHAPING = {".json", ".safetensors", ".bin", ".pt", ".txt"}


class ModelError(ValueError):
    """The folder does not hold an SSD-LM; the message says what to do."""


def looks_like_hub_id(path_or_id: str) -> bool:
    return path_or_id.count("/") == 1 and path_or_id[0] not in "./~" and path_or_id[-1] != "/"


def find_folder(path_or_id: str) -> Path:
    """A local folder as it is, else the hub's `name/name`: files only, no code."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not looks_like_hub_id(path_or_id):
        raise ModelError(f"{path_or_id} is neither a folder nor a hub id such as xhan77/ssdlm")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{path_or_id}: there is no such folder, and the hub did not give it"
            f" ({first_line(error)}); download it where there is a network and pass the folder"
        ) from error


def folder_problems(folder: Path) -> list[str]:
    """One sentence for each file that is missing or of another model."""
    problems = []
    config_file = folder / "config.json"
    if not config_file.is_file():
        problems.append(f"{config_file} is missing: the folder must be a RoBERTa masked LM's")
    else:
        try:
            config = json.loads(config_file.read_text())
        except (ValueError, OSError) as error:
            problems.append(f"{config_file} cannot be read as JSON: {error}")
        else:
            kind = config.get("model_type") if isinstance(config, dict) else None
            if kind != "roberta":
                problems.append(f"{config_file}: model_type is {kind!r}, SSD-LM needs 'roberta'")
    if not any((folder / name).is_file() for name in WEIGHTS):
        problems.append(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    if not (folder / LAYERS_TOGETHER).is_file():
        problems += [
            f"{folder / name} is missing: SSD-LM keeps this layer beside the masked LM"
            for name in LAYER_FILES
            if not (folder / name).is_file()
        ]
    return problems


def fingerprint(folder: Path) -> str:
    """Changes when the model does: names, sizes, and both ends of every file that shapes it."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in SHAPING and f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)), os.SEEK_SET)
            digest.update(stream.read())
    return digest.hexdigest()[:16]
