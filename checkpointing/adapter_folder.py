"""The adapters of a run as a folder that peft loads on top of the base, instead of merged weights.

peft is not needed to write it: config and names are those of its LoraConfig, and the mask's row is
what it calls trainable token indices.
"""

import json
from pathlib import Path
from string import Template

import torch

from checkpointing.checkpoint import Checkpoint, section
from checkpointing.export import check_free
from checkpointing.layouts import adapter_of, read_checkpoint
from checkpointing.load import averages
from checkpointing.restricted_pickle import CheckpointError
from checkpointing.vocabulary import with_mask
from data.tokenizer import Tokenizer
from models.lora import of_adapter
from utils import atomic_folder

CARD = Path(__file__).parents[1] / "scripts" / "hub_files" / "adapter_card.md"
NAMES = {  # the last part of a name here: of its place in peft
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "mask_row": "token_adapter.trainable_tokens_delta",
}


def write_adapter(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    use_ema: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the folder: complete, or not at all. CheckpointError where peft could not use it."""
    from safetensors.torch import save_file

    check_free(folder, overwrite)
    record = section(section(checkpoint.raw, "hyper_parameters"), "lora")
    if not record:
        raise CheckpointError(
            f"{checkpoint.source} has no adapters (it was trained without lora.rank): leave out"
            " --adapter"
        )
    base, added = _base(checkpoint, record, tokenizer)
    named = adapters(checkpoint, use_ema)
    config = peft_config(checkpoint, record, base, named)
    tensors = {peft_name(name): torch.atleast_2d(value.detach()) for name, value in named.items()}
    resize = f"base.resize_token_embeddings({tokenizer.mask_id + 1})\n" if added else ""
    about = {"base": base, "rank": config["r"], "mask_id": tokenizer.mask_id, "resize": resize}
    with atomic_folder(Path(folder), overwrite=True) as made:
        tokenizer.save(made)
        save_file(tensors, made / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (made / "adapter_config.json").write_text(text)
        (made / "README.md").write_text(Template(CARD.read_text()).substitute(about))
    return Path(folder)


def adapters(checkpoint: Checkpoint, use_ema: bool) -> dict:
    """{name: tensor} of the adapters, raw or averaged."""
    state = checkpoint.raw["state_dict"]
    own = of_adapter({name.removeprefix("backbone."): value for name, value in state.items()})
    if use_ema and averages(checkpoint):
        return dict(zip(own, checkpoint.raw["ema"]["shadow_params"], strict=True))
    return own


def peft_name(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"base_model.model.{module}.{NAMES[last]}"


def peft_config(checkpoint: Checkpoint, record: dict, base: str, named: dict) -> dict:
    """adapter_config.json; what is not in it has peft's default."""
    adapter = adapter_of(checkpoint.source, record)
    layers = {name.rpartition(".")[0] for name in named if name.endswith(".lora_A")}
    modules = {layer.removeprefix("model.layers.").partition(".")[2] for layer in layers}
    rows = None if adapter.mask_id is None else {"embed_tokens": [adapter.mask_id]}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": section(checkpoint.config, "lora").get("dropout", 0.0),
        "target_modules": sorted(modules),
        "trainable_token_indices": rows,
        "inference_mode": True,
    }


def _base(checkpoint: Checkpoint, record: dict, tokenizer: Tokenizer) -> tuple[str, bool]:
    """Where the base is, and whether a row for the mask was added to it."""
    said = section(record, "base")
    source, own = said.get("source"), f"{checkpoint.source} has adapters of"
    if not isinstance(source, str):
        raise CheckpointError(f"{checkpoint.source} does not say to which weights it belongs")
    found = read_checkpoint(source)
    if found.layout != "transformers":
        raise CheckpointError(
            f"{own} {source}, which transformers does not load as it is, nor does peft: leave"
            " out --adapter, which writes merged weights"
        )
    with_row, _ = with_mask(found, tokenizer, tokenizer.hf.name_or_path)
    if with_row.fingerprint != said.get("fingerprint"):
        raise CheckpointError(
            f"{own} {source}, which has other weights now: put those back, or leave out --adapter,"
            " which writes merged weights"
        )
    place = Path(source).expanduser()
    return str(place.absolute()) if place.exists() else source, with_row is not found
