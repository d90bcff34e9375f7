"""Turn a GGUF file into a Hugging Face folder: config.json, model.safetensors and the tokenizer.

    pip install --no-deps gguf accelerate psutil
    python scripts/adapt/convert_gguf.py MODEL.gguf FOLDER [--dtype float32|bfloat16|float16]

The weights are those of the file, which are often quantized: the folder holds what they decode to.
A chat template in the file is kept. algo.backbone=llama reads the folder.
"""

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.support.command import answered, new_parser
from utils import atomic_folder, check_file, reason, say, shown

NEEDED = ("gguf", "accelerate", "psutil")
MAGIC = b"GGUF"
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # mistral calls itself llama
MOST_LAYERS = 10_000
MOST_WEIGHTS = 8  # in a byte; the smallest format has 1.56 bits each


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("file", metavar="MODEL.gguf", type=Path)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to be written")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args(arguments)
    return answered("convert_gguf", lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    if options.folder.exists():
        raise ValueError(f"{options.folder} exists; name a folder that is not there")
    check_file(options.file, math.inf)
    with options.file.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{options.file} is no GGUF file: it does not begin with GGUF")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"GGUF files need {', '.join(missing)}: pip install --no-deps {' '.join(missing)}"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    from safetensors.torch import save_file

    model, tokenizer = read(options.file.resolve(), options.dtype)
    # by hand: transformers does not save a model that it calls quantized, though nothing in it is
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    with atomic_folder(options.folder) as made:
        model.config.save_pretrained(made)
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(made)
    count = sum(weight.numel() for weight in weights.values())
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    say(
        f"{options.folder}: {type(model).__name__}, {count:,} parameters in {options.dtype},"
        f" {len(tokenizer):,} tokens, {template}"
    )


def read(path: Path, dtype: str):
    """transformers' model and tokenizer of the file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        check_head(path)
        check_size(AutoConfig.from_pretrained(**where), path.stat().st_size)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # whatever the reader makes of a damaged file
        raise ValueError(f"{path} cannot be read: {shown(reason(error))}") from error
    return model, tokenizer


def check_head(path: Path) -> None:
    """ValueError for another network than algo.backbone=llama reads, and for so many layers that
    the reader would be long at listing them."""
    from gguf import GGUFReader

    fields = GGUFReader(str(path)).fields
    name = fields["general.architecture"].contents()
    if name not in ARCHITECTURES:
        raise ValueError(f"its architecture {name!r} is none of {', '.join(ARCHITECTURES)}")
    if (layers := fields[f"{name}.block_count"].contents()) > MOST_LAYERS:
        raise ValueError(f"it describes {layers:,} layers")


def check_size(described, size: int) -> None:
    """ValueError where a file of `size` bytes cannot hold the network that it describes: the reader
    would make what is not there, of any size."""
    width, layers = described.hidden_size, described.num_hidden_layers
    inner = max(width, getattr(described, "intermediate_size", None) or 0)
    least = width * (described.vocab_size + layers * inner)
    if least > MOST_WEIGHTS * size:
        raise ValueError(f"it describes {least:,} weights or more, and has {size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
