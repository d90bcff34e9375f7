"""What a config.json says that its folder holds: an export of this project or of the published
code, or an autoregressive model as transformers saves it (transformers 4 and 5).

Of transformers' architectures those of the table are read, as one network (models/llama.py). What
the file says otherwise than that network computes is refused, with the key and its value.
"""

import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from checkpointing.restricted_pickle import CheckpointError
from models.llama import ROPE_TYPES, LlamaShape

MODEL_TYPES = ("bd3lm", "bamdlm", "mdlm")
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
MOST = 1_000_000  # of a size; layers at most MOST_LAYERS
MOST_LAYERS = 1000
MOST_IDS = 1 << 24


@dataclass(frozen=True)
class Family:
    """How an architecture differs. biases: whether it has them, whatever config.json says; or the
    key of config.json that decides."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    kv_heads: int | None = None  # where num_key_value_heads is not given; None: all heads
    head_dim: int | None = None  # where head_dim is not given; None: hidden_size / heads
    window: int | None = None  # where sliding_window is not given
    switched: bool = False  # by use_sliding_window
    algorithm: str = "ar"  # that the weights were trained by


_BIASED = Family(qkv_bias="attention_bias", o_bias="attention_bias")
_QWEN3 = replace(_BIASED, qk_norm=True, kv_heads=32, head_dim=128, switched=True)
ARCHITECTURES = {
    "LlamaForCausalLM": replace(_BIASED, mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(kv_heads=8, window=4096),
    "Qwen2ForCausalLM": Family(qkv_bias=True, kv_heads=32, switched=True),
    "Qwen3ForCausalLM": _QWEN3,
    "SDARForCausalLM": replace(_QWEN3, algorithm="bamdlm"),
}
NAMES = {  # of the fields of LlamaShape that config.json calls otherwise
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
}
SCALING = {  # keys that each kind of scaling needs, and the fields they become
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_length",
    },
}


def architecture_of(config: dict) -> str | None:
    """The entry of ARCHITECTURES that config.json names, or none."""
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and len(named) == 1 else None
    return found if isinstance(found, str) and found in ARCHITECTURES else None


def layout_of(place: str, config: dict) -> str:
    """Of a Checkpoint: hub or transformers. CheckpointError for anything else."""
    if config.get("model_type") in MODEL_TYPES:
        return "hub"
    if architecture_of(config) is not None:
        return "transformers"
    kind, named = (reprlib.repr(config.get(key)) for key in ("model_type", "architectures"))
    raise CheckpointError(
        f"{place}: config.json has model_type={kind} and architectures={named}; this project reads"
        f" the model types {', '.join(MODEL_TYPES)} and the architectures"
        f" {', '.join(ARCHITECTURES)}"
    )


class _Config:
    """Values of config.json by key, each of its type or a CheckpointError."""

    def __init__(self, place: str, config: dict):
        self.place, self.config = place, config

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.place}: config.json has {what}")

    def whole(self, key: str, default: int | None = None, most: int = MOST) -> int:
        wanted = f"a whole number from 1 to {most:,}"
        return self._value(key, default, lambda x: type(x) is int and 1 <= x <= most, wanted)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._value(key, default, _is_positive, "a number above 0"))

    def _value(self, key: str, default, fits: Callable[[object], bool], wanted: str):
        value = self.config.get(key)
        value = default if value is None else value
        if not fits(value):
            said = "no" if value is None else f"{reprlib.repr(value)} as"
            raise self.refused(f"{said} {key}; {wanted} was expected")
        return value

    def flag(self, key: str | bool) -> bool:
        if isinstance(key, bool):
            return key
        return self._value(key, False, lambda x: type(x) is bool, "true or false")


def _is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def shape_of(place: str, config: dict) -> LlamaShape:
    """The network of a config.json of transformers. CheckpointError where there is none here that
    computes the same."""
    found, family = _Config(place, config), ARCHITECTURES[architecture_of(config)]
    if problem := next(_other(config), None):
        raise found.refused(problem)
    heads, width = found.whole("num_attention_heads"), found.whole("hidden_size")
    if config.get("head_dim") is None and family.head_dim is None and width % heads:
        raise found.refused(
            f"hidden_size={width}, which is not a multiple of num_attention_heads={heads}, and no"
            " head_dim"
        )
    shape = LlamaShape(
        vocab_size=found.whole("vocab_size", most=MOST_IDS),
        hidden_size=width,
        n_blocks=found.whole("num_hidden_layers", most=MOST_LAYERS),
        n_heads=heads,
        n_kv_heads=found.whole("num_key_value_heads", family.kv_heads or heads),
        head_dim=found.whole("head_dim", family.head_dim or width // heads),
        ffn_size=found.whole("intermediate_size"),
        rms_norm_eps=found.number("rms_norm_eps", 1e-6),
        qk_norm=family.qk_norm,
        qkv_bias=found.flag(family.qkv_bias),
        o_bias=found.flag(family.o_bias),
        mlp_bias=found.flag(family.mlp_bias),
        tied=found.flag("tie_word_embeddings"),
        sliding_window=_window(found, family),
        **_rope(found),
    )
    if problem := next(shape.problems(NAMES), None):
        raise CheckpointError(f"{place}: in config.json {problem}")
    return shape


def _other(config: dict) -> Iterator[str]:
    """What no network here computes."""
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act={reprlib.repr(config['hidden_act'])}; only silu is supported"
    if config.get("quantization_config") is not None:
        yield (
            "a quantization_config: weights of fewer bits are not read; take the model they were"
            " made from"
        )
    if config.get("use_mrope"):
        yield "use_mrope=true; positions of several dimensions are not supported"


def _window(found: _Config, family: Family) -> int | None:
    """Tokens that a layer sees at most; None: no layer is limited."""
    config, kinds = found.config, found.config.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            raise found.refused(f"layer_types={reprlib.repr(kinds)}; known: {', '.join(known)}")
        return found.whole("sliding_window") if "sliding_attention" in kinds else None
    limited = found.flag("use_sliding_window") if family.switched else family.window is not None
    if not limited or config.get("sliding_window", family.window) is None:
        return None
    return found.whole("sliding_window", family.window)


def _rope(found: _Config) -> dict:
    """Fields of LlamaShape. transformers 5 has one dict, rope_parameters; 4 had rope_theta beside
    rope_scaling, whose kind was first called `type`."""
    config = found.config
    given = next((k for k in ("rope_parameters", "rope_scaling") if config.get(k)), None)
    scaling = config[given] if given else {}
    if not isinstance(scaling, dict):
        raise found.refused(f"{given}={reprlib.repr(scaling)}; an object was expected")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise found.refused(
            f"rope_type={reprlib.repr(kind)} in {given}, which is not supported; only"
            f" {', '.join(ROPE_TYPES)}"
        )
    for place in (scaling, config):
        if place.get("partial_rotary_factor", 1) != 1:
            part = reprlib.repr(place["partial_rotary_factor"])
            raise found.refused(f"partial_rotary_factor={part}; only 1 is supported")
    inside, beside = scaling.get("rope_theta"), config.get("rope_theta")
    if None not in (inside, beside) and inside != beside:
        raise found.refused(f"two values of rope_theta: {inside!r} and {beside!r}")
    theta = {} if beside is None else {"rope_theta": beside}
    values = _Config(f"{found.place}, {given}" if given else found.place, scaling | theta)
    made = {"rope_type": kind, "rope_theta": values.number("rope_theta", 10_000.0)}
    for key, field in SCALING[kind].items():
        made[field] = values.whole(key) if key.startswith("original") else values.number(key)
    return made


def recorded_shape(place: str, record: dict) -> LlamaShape:
    """The network that a checkpoint or an export of this project describes by the fields of
    LlamaShape."""
    kinds = {field.name: field.type for field in fields(LlamaShape)}
    odd = [
        name for name, kind in kinds.items() if name not in record or not _fits(record[name], kind)
    ]
    odd += [name for name in record if name not in kinds]
    odd += ["n_blocks"] if not odd and record["n_blocks"] > MOST_LAYERS else []
    if odd:
        problem = ", ".join(f"{name}={reprlib.repr(record.get(name))}" for name in odd[:5])
    else:
        problem = next(LlamaShape(**record).problems(), None)
    if problem is not None:
        raise CheckpointError(f"{place}: its description of the network is damaged: {problem}")
    return LlamaShape(**record)


def _fits(value, kind) -> bool:
    if kind is float:
        return _is_positive(value)
    if kind in (bool, str):
        return isinstance(value, kind)
    if value is None:
        return kind is not int  # but int or None
    return type(value) is int and 1 <= value <= MOST_IDS
