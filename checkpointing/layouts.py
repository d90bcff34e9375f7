"""Weights in every published layout: Lightning checkpoints, hub folders, models of transformers.

Names are those of the network (`blocks.0.norm1.weight`): the `backbone.` of the files and the
`_orig_mod.` of compiled models are taken off. The EMA list of a Lightning checkpoint is put under
the names of its parameters.
"""

import math
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpointing import hub, torch_file
from checkpointing.checkpoint import Checkpoint, check_whole, section
from checkpointing.families import ARCHITECTURES, architecture_of, layout_of
from checkpointing.interpolation import resolve
from checkpointing.restricted_pickle import CheckpointError
from models import lora
from settings.tables import algorithms
from utils import plain_errors, reason

ALIASES = {"bd3lm": "bamdlm"}
INTERVAL = ("sampling_eps_min", "sampling_eps_max")
BUFFERS = ("rotary_emb.inv_freq",)  # in state_dict, but not averaged
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PUBLISHED_EPS = (0.001, 0.999)  # written by BD3LMConfig whatever the weights were trained with


def read_checkpoint(
    path_or_id: str | Path, *, revision: str | None = None, numbers: bool = True
) -> Checkpoint:
    """The checkpoint at a local path, an fsspec URL or a hub id, or a CheckpointError. Without
    `numbers`, one in parts has its tensors on the meta device."""
    source = str(path_or_id) + (f" (revision {revision})" if revision else "")
    try:
        with plain_errors(source):
            fs, path = hub.locate(path_or_id, revision=revision)
            if hub.in_parts(fs, path):
                from checkpointing import sharded  # imports torch.distributed.checkpoint

                wanted = ("state_dict", "ema") if numbers else ()
                return _from_lightning(source, sharded.read(path, wanted))
            if fs.isdir(path):
                return _from_hub(source, *hub.read_folder(fs, path))
            if path.endswith(".safetensors"):
                return _from_hub(source, *_beside_config(fs, path))
            hub.check_file(fs, path)
            if path.endswith(".gguf"):
                raise CheckpointError(f"{source} is {hub.NO_GGUF}")
            with fs.open(path, "rb") as file:
                raw = torch_file.load(file, source, described=("optimizer_states",))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        said = reason(error)
        raise CheckpointError(said if source in said else f"{source}: {said}") from error
    return _from_lightning(source, raw)


def _beside_config(fs, path):
    config = f"{path.rpartition('/')[0]}/config.json"
    if not fs.exists(config):
        raise CheckpointError(f"{path} needs the config.json that belongs to it in the same folder")
    return hub.read_json(fs, config), hub.read_tensors(fs, path)


def _from_lightning(source: str, raw: Any) -> Checkpoint:
    raw = canonical(raw, source)
    optimizer = raw.pop("optimizer_states", None)
    weights, foreign, interval = _sort(source, raw["state_dict"])
    config = section(raw["hyper_parameters"], "config")
    name, length = section(config, "algo").get("name"), section(config, "model").get("length")
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    known = name and _named(source, name, config.get("block_size"), length)
    adapted = section(raw["hyper_parameters"], "lora")
    average = _average(raw.get("ema"), lora.of_adapter(weights) if adapted else weights)
    if adapted:
        weights, average = _merged(source, adapted, weights, average)
    return Checkpoint(
        source=source,
        layout="lightning",
        algorithms=known or _from_keys(weights, interval),
        config=config,
        weights=weights,
        foreign=foreign,
        interval=interval,
        step=raw.get("global_step"),
        raw=raw,
        optimizer=optimizer,
        **average,
    )


def adapter_of(source: str, record: dict) -> lora.Adapter:
    """What a checkpoint with adapters says about them; CheckpointError where that cannot be."""
    rank, alpha, mask = (record.get(key) for key in ("rank", "alpha", "mask_id"))
    check_whole(source, "the rank of its adapters", rank)
    check_whole(source, "the mask's row of its adapters", mask, least=0)
    if rank is None or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        said = f"rank {reprlib.repr(rank)} and alpha {reprlib.repr(alpha)}"
        raise CheckpointError(f"{source}: its adapters have {said}")
    return lora.Adapter(rank=rank, alpha=alpha, mask_id=mask)


def _merged(source: str, record: dict, weights: dict, average: dict) -> tuple[dict, dict]:
    """Weights and average (see `_average`) of the network without adapters."""
    adapter, ema = adapter_of(source, record), average.get("ema")
    try:
        if ema:
            average = {**average, "ema": lora.merged({**weights, **ema}, adapter)}
        return lora.merged(weights, adapter), average
    except ValueError as error:
        raise CheckpointError(f"{source}: its adapters do not fit it: {error}") from error


def canonical(raw: Any, source: str) -> dict:
    """A Lightning checkpoint without `_orig_mod.` in its names, configuration resolved."""
    if not isinstance(raw, dict) or not isinstance(raw.get("state_dict"), dict):
        holds = ", ".join(map(str, list(raw)[:10])) if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(
            f"{source} is a torch file without a state_dict (it holds {holds}): not a checkpoint of"
            " this project. Weights alone belong in a folder with a config.json"
        )
    names = [plain_name(name) for name in raw["state_dict"]]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise CheckpointError(f"{source} holds compiled and plain weights at once: {twice[:10]}")
    values = raw["state_dict"].values()
    state = type(raw["state_dict"])(zip(names, values, strict=True))
    hyper = dict(section(raw, "hyper_parameters"))
    if isinstance(hyper.get("config"), dict):
        try:
            hyper["config"] = resolve(hyper["config"])
        except (RecursionError, ValueError) as error:
            raise CheckpointError(f"{source}: its config cannot be read ({error})") from error
    return {**raw, "state_dict": state, "hyper_parameters": hyper}


def plain_name(name: str) -> str:
    """Less what torch.compile puts in."""
    return ".".join(part for part in str(name).split(".") if part != "_orig_mod")


def _sort(source, state) -> tuple[dict, dict, tuple[float, float] | None]:
    """state_dict -> (weights by the network's names, keys of nobody, clipped interval)."""
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{source}: not tensors in its state_dict: {', '.join(odd[:10])}")
    weights, foreign = {}, {}
    for name, value in state.items():
        name = plain_name(name)
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value
        elif name not in INTERVAL:
            foreign[name] = value
    bounds = [state[name] for name in INTERVAL if name in state]
    if len(bounds) == 1 or any(bound.numel() != 1 for bound in bounds):
        raise CheckpointError(f"{source}: {' and '.join(INTERVAL)} must be two numbers")
    return weights, foreign, _interval(source, [float(bound) for bound in bounds])


def _interval(source: str, bounds: Sequence) -> tuple[float, float] | None:
    numbers = all(isinstance(bound, int | float) for bound in bounds)
    if bounds and not (len(bounds) == 2 and numbers and 0 <= bounds[0] <= bounds[1] < math.inf):
        raise CheckpointError(
            f"{source}: {' and '.join(INTERVAL)} are {reprlib.repr(bounds)}, no interval"
        )
    return tuple(bounds) or None


def _named(source: str, name: str, block_size, length) -> tuple[str, ...]:
    """The algorithm `name`; with one block to a sequence two are the same."""
    if not isinstance(name, str) or name not in algorithms():
        known = ", ".join(algorithms())
        raise CheckpointError(f"{source} was trained with algo={name}; known: {known}")
    one_block = name == "bamdlm" and block_size is not None and block_size == length
    return ("bamdlm", "mdlm") if one_block else (name,)


def _from_keys(weights, interval) -> tuple[str, ...]:
    if interval is not None:
        return ("bamdlm",)
    if not any(name.startswith("sigma_map.") for name in weights):
        return ("ar",)
    return ("mdlm", "sedd", "ar")  # ar: model.adaln=True


def _from_hub(source: str, config: dict, tensors: dict) -> Checkpoint:
    if layout_of(source, config) == "transformers":
        return _from_transformers(source, config, tensors)
    weights, foreign, interval = _sort(source, tensors)
    listed = tuple(config[name] for name in INTERVAL if name in config)
    if interval is None and config.get("var_min") and listed not in ((), PUBLISHED_EPS):
        interval = _interval(source, listed)
    return Checkpoint(
        source=source,
        layout="hub",
        algorithms=_hub_algorithms(source, config),
        config=config,
        weights=weights,
        foreign=foreign,
        interval=interval,
    )


def _from_transformers(source: str, config: dict, tensors: dict) -> Checkpoint:
    """Names are the network's as they are. Left out: the head of a model with tied embeddings where
    it is stored all the same, and frequencies, which follow from config.json."""
    weights = {k: v for k, v in tensors.items() if not k.endswith(".rotary_emb.inv_freq")}
    odd = [k for k, v in weights.items() if v.dtype not in FLOATS]
    if odd:
        raise CheckpointError(
            f"{source}: {odd[0]} is {weights[odd[0]].dtype}; only {', '.join(map(str, FLOATS))} are"
            " read: take the model that it was made from"
        )
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.get("tie_word_embeddings") is True and {head, embedding} <= weights.keys():
        if not torch.equal(weights[head], weights[embedding]):
            raise CheckpointError(
                f"{source}: config.json has tie_word_embeddings=true, but {head} is not {embedding}"
            )
        del weights[head]
    algorithm = ARCHITECTURES[architecture_of(config)].algorithm
    return Checkpoint(
        source=source,
        layout="transformers",
        algorithms=(algorithm,),
        config=config,
        weights=weights,
    )


def _hub_algorithms(source, config) -> tuple[str, ...]:
    """`algo` of config.json where this project wrote it, else what its switches imply."""
    if "algo" not in config:
        if config["model_type"] == "mdlm":
            return ("mdlm",)
        if config.get("causal"):
            return ("ar",)
        if not config.get("cross_attn"):
            return ("sedd",) if config.get("time_conditioning") else ("mdlm", "sedd")
    name, length = config.get("algo", "bamdlm"), config.get("model_length")
    return _named(source, name, config.get("block_size"), length)


def _average(ema: Any, weights: dict[str, Tensor]) -> dict:
    """Fields of Checkpoint about the EMA. One that does not fit is reported when it is asked for,
    because missing weights, which come first, explain it better."""
    if ema is None:
        return {}
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list) or not {"decay", "num_updates"} <= ema.keys():
        return {"ema": {}, "ema_problem": "ema must hold decay, num_updates and shadow_params"}
    about = {"ema_decay": ema["decay"], "ema_updates": ema["num_updates"] or 0}
    updates, decay = about["ema_updates"], about["ema_decay"]
    if not isinstance(decay, float) or type(updates) is not int or updates < 0:
        kinds = f"decay is {reprlib.repr(decay)} and num_updates {reprlib.repr(updates)}"
        return {"ema": {}, "ema_problem": f"ema: {kinds}, no numbers of an average"}
    parameters = {name: weight for name, weight in weights.items() if name not in BUFFERS}
    if len(shadow) != len(parameters):
        counts = f"the EMA has {len(shadow)} tensors, the network {len(parameters)} parameters"
        return {"ema": {}, "ema_problem": counts, **about}
    named = dict(zip(parameters, shadow, strict=True))  # the list is in their order
    for name, value in named.items():
        fits = isinstance(value, Tensor) and value.shape == parameters[name].shape
        if not (fits and value.is_floating_point()):
            problem = f"the EMA does not fit the parameters, first at {name}"
            return {"ema": {}, "ema_problem": problem, **about}
    return {"ema": named, **about}
