"""Folders in hub format, made for tests from the recordings."""

import json
import textwrap

import torch
from checkpoint_helpers import BY_ALGO, network, path
from conftest import GOLDEN, load_json
from runs import in_a_copy
from safetensors.torch import load_file, save_file

from checkpointing.layouts import read_checkpoint
from checkpointing.load import load_into
from data.vocabularies import character_set

HUB_FOLDER = GOLDEN / "hf_export"
TENSORS = load_file(HUB_FOLDER / "model.safetensors")
CONFIG = load_json("hf_export/config.json")


def hub_config(algo, **changes):
    """config.json as it is published for the algorithm."""
    if algo == "mdlm":
        kept = ("hidden_dim", "cond_dim", "n_blocks", "n_heads", "vocab_size", "model_length")
        return {"model_type": "mdlm", "dropout": 0.1, **{k: CONFIG[k] for k in kept}} | changes
    switches = {
        "bamdlm": {},
        "sedd": {"cross_attn": False, "time_conditioning": True, "var_min": False},
        "ar": {"cross_attn": False, "causal": True, "adaln": False, "var_min": False},
    }[algo]
    return {**CONFIG, **switches, **changes}


def hub_tensors(algo):
    """The averaged weights, under their published names."""
    checkpoint = read_checkpoint(path(BY_ALGO[algo]))
    return {f"backbone.{k}": v for k, v in {**checkpoint.weights, **checkpoint.ema}.items()}


def put(folder, config, tensors=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder, tensors, ending, save):
    """Two shards and the index that names them."""
    names = sorted(tensors)
    stem, halves = ("model", "pytorch_model")[ending == "bin"], (names[::2], names[1::2])
    weight_map = {}
    for number, half in enumerate(halves, 1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        save({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


LAYOUTS = {
    "one file": lambda folder: save_file(TENSORS, folder / "model.safetensors"),
    "shards": lambda folder: shard(folder, TENSORS, "safetensors", save_file),
    "pickled": lambda folder: torch.save(TENSORS, folder / "pytorch_model.bin"),
    "pickled shards": lambda folder: shard(folder, TENSORS, "bin", torch.save),
}


def same_weights(checkpoint, tensors):
    for name, value in checkpoint.weights.items():
        assert torch.equal(value, tensors[f"backbone.{name}"])
    net = network(checkpoint)
    load_into(net, checkpoint, use_ema=True, algo=checkpoint.algo)


# Models of transformers with random weights: {name: (architecture, changes to config.json)}
SIZES = {
    "vocab_size": 29,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
TRANSFORMERS = {
    "llama": ("Llama", {}),
    "llama, one head of keys, tied": (
        "Llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama, all heads, wide": ("Llama", {"num_key_value_heads": 4, "head_dim": 12}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("Llama", {"rope_parameters": LINEAR}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rms_norm_eps": 1e-5}),
    "qwen3, biases, tied": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, long window": ("Mistral", {"sliding_window": 4096}),
}


def transformers_model(name):
    """The model by its name in TRANSFORMERS; every weight is random, norms and biases too."""
    import transformers

    family, changes = TRANSFORMERS[name]
    given = {k: v for k, v in {**SIZES, **changes}.items() if k != "head_dim" or v is not None}
    config = getattr(transformers, f"{family}Config")(**given)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
    return model


def saved(folder, model, **changes):
    """Its folder as transformers writes it, with changes to config.json; None takes a key out."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept))
    return folder


def with_tokenizer(folder, template=None, family="Qwen3"):
    """A tied network of transformers and its tokenizer of letters, with a chat template if given:
    no row of the embedding is spare, so one is added for the mask."""
    import transformers

    words = character_set("abcdefghijklmnopqrstuvwxyz ")
    words.chat_template = template
    words.save_pretrained(folder)
    given = {**SIZES, "vocab_size": len(words), "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**given)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


AWAY = """
import importlib
import os
import sys

import huggingface_hub.constants
import transformers.dynamic_module_utils

os.chdir("..")
for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
    del sys.modules[name]
# where tests before this one loaded exports
sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, "transformers_modules"))]
importlib.invalidate_caches()
transformers.dynamic_module_utils.HF_MODULES_CACHE = os.path.abspath("hf")
huggingface_hub.constants.HF_HUB_OFFLINE = True
"""


def consumed(folder, program, *words):
    """The tensors that a program makes from in.safetensors of this folder, in a process that does
    not know this project; words: its arguments behind the two files. It is forked: an interpreter
    takes four seconds to import transformers."""
    place = folder / "nothing"  # where it would find Python files that are no library
    place.mkdir()
    arguments = ["in.safetensors", "out.safetensors", *words]
    code, text = in_a_copy(place, AWAY + textwrap.dedent(program), arguments)
    assert code == 0, text[-3000:]
    return load_file(folder / "out.safetensors")
