"""The files of a foreign judge, looked at before transformers makes a network of them.

It makes every layer that config.json asks for, and memory for every weight that is not there,
before it says that some are missing; and it unpickles without a bound.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from checkpointing import torch_file
from checkpointing.hub import check_header
from utils import read_json

LAYERS = re.compile(r"(num|n)(_\w+)?_layers?|num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
MOST_LAYERS = 1000
MOST_PER_BYTE = 16  # weights; those of two bits are four


def check_judge(folder: Path) -> None:
    """ValueError where config.json describes more weights than the folder can hold, or a pickle of
    weights or a head of safetensors is refused."""
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    size = sum(path.stat().st_size for path in weights)
    for part in _dicts(read_json(folder / "config.json")):
        sizes = {str(name): n for name, n in part.items() if type(n) is int}
        layers = max((n for name, n in sizes.items() if LAYERS.fullmatch(name)), default=1)
        width = max((sizes[name] for name in WIDTHS if name in sizes), default=1)
        rows = sizes.get("vocab_size", 1)
        if layers > MOST_LAYERS:
            raise ValueError(f"its config.json asks for {layers:,} layers")
        least = max(layers * width, rows) * width  # every layer has a matrix of width times width
        if least > MOST_PER_BYTE * size:
            raise ValueError(
                f"its config.json asks for {least:,} weights, its files have {size:,} bytes"
            )
    for path in weights:
        if path.suffix == ".safetensors":
            check_header(LocalFileSystem(), str(path))
        else:
            with path.open("rb") as file:
                torch_file.load(file, str(path), numbers=False)


def _dicts(node: object, deep: int = 0) -> Iterator[dict]:
    """A configuration and those inside of it, such as text_config."""
    if isinstance(node, dict) and deep < 4:
        yield node
        for value in node.values():
            yield from _dicts(value, deep + 1)
