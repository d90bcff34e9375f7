"""Settings of the algorithm, its network and what it begins with."""

from dataclasses import dataclass

import settings.tables as tables
from settings.limits import Limit, doc, one_of

SHARES = Limit("a list of numbers in (0, 1]", lambda value: all(0 < x <= 1 for x in value), [])
WIDTH = "at least 1 and at most 1000000"


def _values(field: str) -> list[str]:
    """Of a field of the algorithms, each once."""
    return list(dict.fromkeys(entry[field] for entry in tables.algorithms().values()))


@dataclass
class Algo:
    name: str = doc("algorithm; choose it with algo=NAME", one_of(*tables.algorithms()))
    backbone: str = doc(
        "network: dit from model.*; hf_dit from an exported folder or hub; llama (Llama, Qwen, "
        "Mistral, SmolLM2) from a checkpoint where there is one, else from model.*",
        one_of("dit", "hf_dit", "llama"),
    )
    parameterization: str = doc(
        "what the logits mean; fixed by the algorithm", one_of(*_values("parameterization"))
    )
    time_conditioning: bool = doc("tell the network the noise level; fixed by the algorithm")
    T: int = doc(
        "sampling steps per block, for rules that need a number; 0: none",
        "at least 0 and at most 1000000",
    )
    ignore_bos: bool = doc("never mask the first token of a row")
    cross_attn: bool = doc("train on noised and clean text with the block-diffusion mask (bamdlm)")
    var_min: bool = doc("allow the search for the interval of t with the least variance (bamdlm)")
    clip_search_delta: float = doc("distance between the intervals searched", "in (0, 1)")
    clip_search_widths: list[float] = doc(
        "widths of the intervals searched, or of the ranges of counts as shares of a block; []: no "
        "search",
        SHARES,
    )
    fix_clipping: bool = doc(
        "search and log, but keep training.sampling_eps_min and _max, or training.counts"
    )
    sampler: str = doc("how samples are drawn; fixed by the algorithm", one_of(*_values("sampler")))
    mdlm_loss_scale: bool = doc("loglinear noise by its total noise, as in MDLM: p = (1 - 1e-3) t")


@dataclass
class Model:
    hidden_size: int = doc("width of the network, a multiple of 2 * n_heads", WIDTH)
    cond_dim: int = doc("width of the embedding of the noise level", WIDTH)
    length: int = doc("tokens of a sequence", "at least 1")
    n_blocks: int = doc("number of layers", "at least 1 and at most 1000")
    n_heads: int = doc("attention heads per layer", "at least 1")
    dropout: float | None = doc("dropout probability; null: 0.1, llama: 0", "in [0, 1)")
    adaln: bool = doc("for algo=ar: modulate the layers by a noise level, as the others do")
    attn_backend: str = doc(
        "implementation of attention; auto: the fastest that suits algorithm and machine",
        one_of("auto", *tables.attention_backends()),
    )
    compile: bool = doc("compile the layers: faster after a minute or two; needs a C++ compiler")
    activation_checkpointing: str = doc(
        "layers whose activations the backward pass makes again, which saves memory and takes time:"
        " none, full (all but the last), selective (every second one)",
        one_of(*tables.activation_checkpointing()),
        default="none",
    )
    param_dtype: str = doc(
        "format of the weights in training; with bfloat16 the optimizer keeps float32 masters of "
        "those that are trained, and checkpoints hold these",
        one_of("float32", "bfloat16"),
        default="float32",
    )
    n_kv_heads: int | None = doc(
        "llama: heads of keys and values, a divisor of n_heads; null: n_heads", "at least 1"
    )
    head_dim: int | None = doc("llama: width of a head, even; null: hidden_size / n_heads", WIDTH)
    ffn_size: int | None = doc(
        "llama: inner width of the MLP; null: 8/3 of hidden_size, up to a multiple of 64", WIDTH
    )
    rope_theta: float = doc("llama: base of the rotary positions", "above 0")
    rms_norm_eps: float = doc("llama: added to the mean square in norms", "above 0")
    qk_norm: bool = doc("llama: normalise queries and keys, as Qwen3 does")
    qkv_bias: bool = doc("llama: biases of queries, keys and values, as Qwen2 has them")
    tied: bool = doc("llama: the embedding is the head's weight too")


@dataclass
class LoRA:
    """Of training: small matrices beside the linear layers, and all else frozen."""

    rank: int | None = doc(
        "rank of the adapters that are trained beside frozen weights (training.from_pretrained); "
        "null: all weights are trained",
        "at least 1",
    )
    alpha: float | None = doc(
        "an adapter's product is multiplied by alpha / rank; null: twice the rank", "above 0"
    )
    dropout: float = doc("dropout probability of what enters an adapter", "in [0, 1)")
    modules: list[str] | None = doc(
        "linear layers of the blocks that get one, such as [q_proj, v_proj]; null: all"
    )
    mask_row: bool = doc(
        "train the mask's row of the embedding too; algo=ar, which sees no mask, has none"
    )


@dataclass
class Noise:
    type: str = doc("noise schedule; choose it with noise=NAME", one_of(*tables.schedules()))


@dataclass
class Adapt:
    clean: str = doc(
        "what a clean token sees (bamdlm): its block and those before it, or as in an AR network "
        "itself and the tokens before it",
        one_of("block", "causal"),
    )
    label: str = doc(
        "where the prediction of a token is read (bamdlm): at itself, or as in an AR network at "
        "the token before it",
        one_of("same", "next"),
    )
    ar_loss: float = doc(
        "with adapt.clean=causal, how often the AR loss on the clean half counts in training, "
        "beside the loss of diffusion",
        "at least 0",
    )
