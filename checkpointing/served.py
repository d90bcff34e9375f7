"""A folder that servers of block diffusion load as `SDARForCausalLM` (SGLang 0.5.23, LMDeploy).

They compute the layers of Qwen3, a mask token of one fixed id, full attention inside a block and to
all blocks before, and no shift of the labels: what algo=bamdlm trains. They read rope_theta at the
top of config.json, and no scaling of it here: under transformers 5 that would hide rope_theta.
"""

from collections.abc import Iterator
from pathlib import Path

from checkpointing.checkpoint import Checkpoint
from checkpointing.load import is_llama
from checkpointing.restricted_pickle import CheckpointError
from data.tokenizer import Tokenizer
from models.llama import LlamaShape

FILES = Path(__file__).parents[1] / "scripts" / "hub_files"
CARD = FILES / "served_card.md"
CONFIGURATION = FILES / "configuration_sdar.py"
MASK_ID = 151_669  # whatever config.json says: SGLang's srt/dllm/config.py


def sdar_config(
    checkpoint: Checkpoint, shape: LlamaShape | None, tokenizer: Tokenizer, algo: str
) -> dict:
    """config.json. CheckpointError with every reason why no server would compute this network;
    shape: None of a DiT."""
    problems = list(_problems(checkpoint, shape, tokenizer, algo))
    if problems:
        raise CheckpointError(
            f"{checkpoint.source} cannot be served as SDARForCausalLM: {'; '.join(problems)}."
            " --format project writes a folder for transformers"
        )
    return {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": shape.qkv_bias,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": f"{CONFIGURATION.stem}.SDARConfig"},
        "block_size": checkpoint.block_size,
        "bos_token_id": tokenizer.bos_id,
        "dtype": "float32",
        "eos_token_id": tokenizer.eos_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "mask_token_id": tokenizer.mask_id,
        "max_position_embeddings": checkpoint.length,
        "model_type": "sdar",
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_blocks,
        "num_key_value_heads": shape.n_kv_heads,
        "pad_token_id": tokenizer.pad_id,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def _problems(
    checkpoint: Checkpoint, shape: LlamaShape | None, tokenizer: Tokenizer, algo: str
) -> Iterator[str]:
    if algo != "bamdlm":
        yield f"it was trained by algo={algo}, and servers know blocks alone (bamdlm)"
    if not is_llama(checkpoint):
        yield "its network is dit, and servers know Qwen3's layers (algo.backbone=llama)"
        return
    wanted = {
        "qk_norm": True,
        "mlp_bias": False,
        "o_bias": shape.qkv_bias,
        "rope_type": "default",
        "sliding_window": None,
    }
    for name, value in wanted.items():
        if (theirs := getattr(shape, name)) != value:
            yield f"Qwen3 has {name}={value}, it has {theirs}"
    for name, value in (("clean", "block"), ("label", "same")):
        if (theirs := checkpoint.adapt.get(name, value)) != value:
            yield f"servers compute adapt.{name}={value}, it was trained with {name}={theirs}"
    if tokenizer.mask_id != MASK_ID:
        yield (
            f"its mask token has id {tokenizer.mask_id:,}, and servers mask with {MASK_ID:,}, the"
            " first free id of Qwen3's tokenizer: a smaller vocabulary cannot be served"
        )
