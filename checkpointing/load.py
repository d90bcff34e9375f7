"""Weights into networks: all of them, or an error that says which keys do not fit and why.

`read_checkpoint` (layouts.py) opens every published layout. `load_into` is for evaluation and
sampling: the algorithm must be the file's own. `load_pretrained` starts a new run from the weights
of another; exactly the tensors that its algorithm adds may be new, and they are named.
"""

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from checkpointing.checkpoint import Checkpoint, section
from checkpointing.families import recorded_shape, shape_of
from checkpointing.layouts import BUFFERS, INTERVAL, plain_name
from checkpointing.restricted_pickle import CheckpointError
from models.dit import DiT
from models.llama import Llama, LlamaShape
from models.network import Network
from objectives.algorithms import get_algorithm
from utils import listed, say

EMBEDDING = "model.embed_tokens.weight"  # of models/llama.py
SHOWN = 10  # keys of each kind in an error
DEFAULT_COND_DIM = 129  # of the published config class, whatever the weights have
INV_FREQ_TOLERANCE = 0.01  # bfloat16 rounds by 0.004


@dataclass(frozen=True)
class Pretrained:
    """What a finetuning run takes over beside the weights."""

    new_keys: tuple[str, ...]  # of the run's state_dict, absent from the file
    ema: dict[str, Tensor] | None  # by parameter name, new parameters included; None: start anew
    ema_updates: int


def is_llama(checkpoint: Checkpoint) -> bool:
    """Whether its network is that of models/llama.py."""
    return checkpoint.layout == "transformers" or EMBEDDING in checkpoint.weights


def build_network(checkpoint: Checkpoint, **options) -> Network:
    """The network that the weights are for; options: other arguments of its class. CheckpointError,
    before anything is allocated, where they do not fit it."""
    network = Llama if is_llama(checkpoint) else DiT
    arguments = {**build_backbone_args(checkpoint), **options}
    if network is Llama:  # its sizes are stated, not read off the weights
        with torch.device("meta"):
            planned = network(**arguments)
        _check_fit(planned, checkpoint, checkpoint.algorithms[0], may_be_new=())
    return network(**arguments)


def build_backbone_args(checkpoint: Checkpoint) -> dict:
    """Arguments of its network for these weights (sizes, dropout), checked against the config."""
    if is_llama(checkpoint):
        return dataclasses.asdict(_llama_shape(checkpoint))
    weights, config = checkpoint.weights, checkpoint.config
    model = config if checkpoint.layout == "hub" else section(config, "model")
    if section(config, "algo").get("backbone") == "hf_dit":
        model = {}  # the run took the sizes of another checkpoint
    width_key = "hidden_dim" if checkpoint.layout == "hub" else "hidden_size"
    needed = {"vocab_embed.embedding": 2, "blocks.0.attn_qkv.weight": 2, "rotary_emb.inv_freq": 1}
    missing = [n for n, dim in needed.items() if n not in weights or weights[n].dim() != dim]
    missing = missing or [name for name in needed if not weights[name].numel()]
    if missing:
        foreign = f" It has instead: {_some(checkpoint.foreign)}" if checkpoint.foreign else ""
        raise CheckpointError(
            f"{checkpoint.source} is not a network of this family: it has no"
            f" {', '.join('backbone.' + name for name in missing)}.{foreign}"
        )
    vocab_size, width = weights["vocab_embed.embedding"].shape
    adaln = "sigma_map.mlp.2.bias" in weights
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "cond_dim": len(weights["sigma_map.mlp.2.bias"]) if adaln else model.get("cond_dim", 128),
        "n_blocks": len(blocks),
        "n_heads": width // (2 * len(weights["rotary_emb.inv_freq"])),
    }
    stated = {name: model.get(width_key if name == "hidden_size" else name) for name in sizes}
    odd = [
        f"{name} {stated[name]} but weights of {sizes[name]}"
        for name in sizes
        if stated[name] not in (None, sizes[name])
        and not (name == "cond_dim" and stated[name] == DEFAULT_COND_DIM)
    ]
    if odd:
        raise CheckpointError(f"{checkpoint.source} contradicts itself: it states {'; '.join(odd)}")
    dropout = model.get("dropout")
    dropout = float(dropout) if isinstance(dropout, int | float) else 0.1
    return {**sizes, "dropout": dropout, "adaln": adaln}


def _llama_shape(checkpoint: Checkpoint) -> LlamaShape:
    source, hyper = checkpoint.source, section(checkpoint.raw, "hyper_parameters")
    if checkpoint.layout == "transformers":
        return shape_of(source, checkpoint.config)
    record = hyper if checkpoint.layout == "lightning" else checkpoint.config
    return recorded_shape(source, section(record, "llama"))


def load_into(backbone: nn.Module, checkpoint: Checkpoint, *, use_ema: bool, algo: str) -> None:
    """Copy all weights, or the averaged ones, into `backbone`; on any doubt copy nothing and
    raise."""
    _check_fit(backbone, checkpoint, algo, may_be_new=())
    if algo not in checkpoint.algorithms:
        raise CheckpointError(
            f"{checkpoint.source} cannot be used here: {_other(checkpoint, algo)}"
        )
    values = {**checkpoint.weights, **(averages(checkpoint) if use_ema else {})}
    _check_finite(checkpoint.source, values)
    _copy(backbone, values)


def trained_sizes(checkpoint: Checkpoint, algo: str) -> tuple[int, ...]:
    """The block sizes of training, where the algorithm has blocks and the file says them."""
    return checkpoint.block_sizes if get_algorithm(algo).blocks else ()


def say_untrained(trained: Collection[int], sizes: Iterable[int]) -> None:
    """A line for each of these block sizes at which the network was not trained. Its weights serve
    any size; how well, nobody has seen."""
    for size in dict.fromkeys(sizes):
        if trained and size not in trained:
            say(f"block_size={size}: the network was trained at {listed(trained)}")


def load_pretrained(backbone: nn.Module, checkpoint: Checkpoint, *, algo: str) -> Pretrained:
    """Weights for a new run of `algo`, trained perhaps as another algorithm or block size.

    New may be: the buffers sampling_eps_min/max (to bamdlm), and coming from ar, sigma_map.* and
    all adaLN_modulation.* (these are set to zero). The file's clipped interval is not taken over.
    """
    trains, may_be_new = get_algorithm(algo), ()
    told = any(get_algorithm(name).noise for name in checkpoint.algorithms)
    if trains.noise and not told and not any(map(_is_conditioning, checkpoint.weights)):
        may_be_new = tuple(filter(_is_conditioning, _expected(backbone)))
    if checkpoint.interval is not None and not trains.blocks and algo not in checkpoint.algorithms:
        raise CheckpointError(
            f"{checkpoint.source} holds bamdlm weights and a clipped schedule; algo={algo} has no"
            f" use for {' and '.join(INTERVAL)}. Only algo=bamdlm can start from it, at any block"
            " size"
        )
    _check_fit(backbone, checkpoint, algo, may_be_new=may_be_new)
    _check_average(checkpoint)
    _check_finite(checkpoint.source, checkpoint.weights)
    ema = checkpoint.ema
    _check_finite(f"the EMA of {checkpoint.source}", ema or {})
    _copy(backbone, checkpoint.weights)
    state = _expected(backbone)
    with torch.no_grad():
        for name in may_be_new:
            if "adaLN_modulation" in name:
                state[name].zero_()
    new = tuple(f"backbone.{name}" for name in may_be_new)
    if trains.blocks and checkpoint.interval is None:
        new = (*INTERVAL, *new)
    if ema is not None:
        parameters = {n: p.detach() for n, p in state.items() if n not in BUFFERS}
        ema = {n: ema[n].float() if n in ema else p.clone() for n, p in parameters.items()}
    return Pretrained(new_keys=new, ema=ema, ema_updates=checkpoint.ema_updates)


def _other(checkpoint: Checkpoint, algo: str) -> str:
    theirs = " or ".join(checkpoint.algorithms)
    return (
        f"another algorithm: the file holds {theirs} weights, the run asks for algo={algo} (set"
        f" algo={checkpoint.algorithms[0]}, or start a new run with training.from_pretrained)"
    )


def averages(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What differs from the weights; CheckpointError where there should be some."""
    _check_average(checkpoint)
    if checkpoint.layout != "lightning":
        return {}
    if checkpoint.ema is not None:
        return checkpoint.ema
    if section(checkpoint.config, "training").get("ema") == 0:
        return {}  # trained without EMA: the weights are all there is
    raise CheckpointError(
        f"{checkpoint.source} has no averaged weights (ema); eval.disable_ema=true takes the others"
        " (use_ema=False in a notebook)"
    )


def _expected(backbone: nn.Module) -> dict[str, Tensor]:
    state = backbone.state_dict(keep_vars=True)
    return {plain_name(name): value for name, value in state.items()}


def _is_conditioning(name: str) -> bool:
    return name.startswith("sigma_map.") or "adaLN_modulation" in name.split(".")


def _copy(backbone: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in _expected(backbone).items():
            if name in values and name not in BUFFERS:
                target.copy_(values[name])


def _check_average(checkpoint: Checkpoint) -> None:
    if checkpoint.ema_problem is not None:
        raise CheckpointError(
            f"{checkpoint.source}: {checkpoint.ema_problem}; eval.disable_ema=true does without it"
            " (use_ema=False in a notebook)"
        )


def _check_fit(backbone, checkpoint: Checkpoint, algo, *, may_be_new) -> None:
    expected, values = _expected(backbone), checkpoint.weights
    missing = [name for name in expected if name not in values and name not in may_be_new]
    unexpected = [name for name in values if name not in expected]
    unexpected += [f"{name} (outside the backbone)" for name in checkpoint.foreign]
    other = {
        name: (list(values[name].shape), list(expected[name].shape))
        for name in expected
        if name in values and values[name].shape != expected[name].shape
    }
    shapes = [f"{name} {mine} in the file, {ours} here" for name, (mine, ours) in other.items()]
    differences = {
        "missing from the file": missing,
        "not in the network": unexpected,
        "of another shape": shapes,
        "not floating point": [name for name in values if not values[name].is_floating_point()],
    }
    found = [f"{what} ({len(n)}): {_some(n)}" for what, n in differences.items() if n]
    if found:
        causes = _causes(checkpoint, algo, missing, unexpected, other)
        raise CheckpointError(
            f"{checkpoint.source} does not fit this network (algo={algo}); nothing was loaded."
            + (f" Probably {'; '.join(causes)}." if causes else "")
            + f" Weights {'; '.join(found)}"
        )
    if "rotary_emb.inv_freq" in expected:
        # inv_freq is computed, not trained: the file must have been made with the same base
        theirs, ours = (each["rotary_emb.inv_freq"].float() for each in (values, expected))
        if not torch.allclose(theirs, ours, rtol=INV_FREQ_TOLERANCE, atol=0):
            raise CheckpointError(
                f"{checkpoint.source}: rotary_emb.inv_freq is not that of rotary base 10 000"
            )


def _some(names: Collection[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join([*names][:SHOWN]) + more


def _causes(checkpoint: Checkpoint, algo, missing, unexpected, other) -> list[str]:
    causes = []
    if EMBEDDING in (*missing, *unexpected):
        theirs = "llama" if is_llama(checkpoint) else "dit"
        return [f"another network: set algo.backbone={theirs}"]
    if algo not in checkpoint.algorithms:
        causes.append(_other(checkpoint, algo))
    elif any(name.startswith("sigma_map.") for name in (*missing, *unexpected)):
        causes.append("model.adaln differs")
    depth = [name for name in (*missing, *unexpected) if name.startswith("blocks.")]
    if depth and not all(map(_is_conditioning, depth)):
        causes.append("another model size: model.n_blocks differs")
    embedding = other.get("vocab_embed.embedding", other.get(EMBEDDING))
    if embedding and len(embedding[0]) == 2:
        (rows, width), (our_rows, our_width) = embedding
        if width != our_width:
            causes.append(f"another model size: model.hidden_size={width} in the file")
        if rows != our_rows:
            causes.append(
                f"another vocabulary: {rows} tokens in the file, {our_rows} here, the mask included"
                " (data.tokenizer_name_or_path)"
            )
    elif any(map(_is_conditioning, other)):
        causes.append("another model size: model.cond_dim differs")
    if "rotary_emb.inv_freq" in other and "vocab_embed.embedding" not in other:
        causes.append("another model size: model.n_heads differs")
    if checkpoint.foreign and not checkpoint.weights:
        causes.append("the weights lack the prefix backbone.: saved from the bare network?")
    return causes


def _check_finite(source: str, values: dict[str, Tensor]) -> None:
    odd = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if odd:
        raise CheckpointError(
            f"{source} has NaN or infinite weights: {_some(odd)}; training had diverged, take an"
            " earlier checkpoint"
        )
