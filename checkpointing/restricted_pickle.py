"""Reading a checkpoint's pickle without running anything that it names.

A pickle is a program: it names functions and says what to call them with. Here only the names in
the tables below mean anything. Tensors are rebuilt by code of this file; the classes of omegaconf,
transformers and tokenizers that the authors' checkpoints carry become `Inert` objects, which keep
what they were given and call nothing of those libraries; every other name stops the reading with
an error that quotes it. What a pickle is handed, it cannot change.
"""

import pickle
import reprlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch

from checkpointing.bounded_pickle import BoundedUnpickler, checked_key


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the way out."""


# Only ever compared or thrown away, so the name itself stands for them.
TOKENS = {"typing.Any"} | {
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in ("bool", "dict", "float", "int", "list", "long", "str", "unicode")
}

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}

CONTAINERS = {"omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"}
LEAVES = {
    f"omegaconf.nodes.{kind}Node"
    for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
}
MOST_DIMENSIONS = 64  # of a tensor
TOKENIZER_BACKEND = "tokenizers.Tokenizer"

INERT = {
    *CONTAINERS,
    *LEAVES,
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    TOKENIZER_BACKEND,
    "tokenizers.AddedToken",
    "tokenizers.models.Model",
    "transformers.models.bert.tokenization_bert.BertTokenizer",
    "transformers.models.bert.tokenization_bert_fast.BertTokenizerFast",
    "transformers.models.gpt2.tokenization_gpt2.GPT2Tokenizer",
    "transformers.models.gpt2.tokenization_gpt2_fast.GPT2TokenizerFast",
    "transformers.tokenization_utils_base.AddedToken",
    "transformers.tokenization_utils_fast.PreTrainedTokenizerFast",
    "transformers.tokenization_utils_tokenizers.TokenizersBackend",
}

FAILURES = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    struct.error,
    TypeError,
    ValueError,
)


class _FrozenClass(type):
    """A pickle can set attributes on whatever it is handed, classes included: not on these."""

    def __setattr__(cls, name, value):
        raise TypeError(f"a pickle may not change {cls.__name__}")


class _Frozen(metaclass=_FrozenClass):
    __slots__ = ("parts",)

    def __new__(cls, *parts):
        self = object.__new__(cls)
        object.__setattr__(self, "parts", parts)
        return self

    def __setattr__(self, name, value):
        raise TypeError(f"a pickle may not change a {type(self).__name__}")


class Inert(_Frozen):
    """Stands for an object of another library: remembers its name, arguments and state."""

    __slots__ = ("state",)
    origin = ""

    def __new__(cls, *arguments):
        self = super().__new__(cls, *arguments)
        object.__setattr__(self, "state", None)
        return self


class _Function(_Frozen):
    def __call__(self, *arguments):
        return self.parts[0](*arguments)


class _Storage(_Frozen):
    """Type, key and length of a storage that is not read yet."""

    __slots__ = ()


class _Tensor(_Frozen):
    """A tensor that is not built yet: no pickle ever holds a live one to meddle with."""

    __slots__ = ()

    def build(self, read_storage) -> torch.Tensor:
        storage, offset, size, stride = self.parts
        numbers = read_storage(*storage.parts)
        if not all(type(n) is int for n in (offset, *size, *stride)) or len(size) > MOST_DIMENSIONS:
            raise ValueError("the shape of a tensor is no list of whole numbers")
        steps = sorted((step, n) for n, step in zip(size, stride, strict=True) if n > 1)
        last = offset
        for step, n in steps:
            if 0 not in size and 0 <= step <= last - offset:
                raise ValueError(f"a tensor of shape {list(size)} has numbers in several places")
            last += (n - 1) * step
        if min((offset, *size, *stride)) < 0 or (0 not in size and last >= numbers.numel()):
            raise ValueError(
                f"a tensor of shape {list(size)} exceeds its {numbers.numel()} numbers"
            )
        return numbers.as_strided(size, stride, offset)


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without its storage")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _encode(text, encoding):
    if encoding != "latin1":
        raise ValueError(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _ordered_dict(pairs=()):
    return OrderedDict((checked_key(key), value) for key, value in pairs)


FUNCTIONS = {
    "_codecs.encode": _encode,
    "collections.defaultdict": lambda factory=None: {},  # nobody asks these for an absent key
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": lambda size=(): tuple(size),
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad=False, hooks=None: tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
}


class _Unpickler(BoundedUnpickler):
    def find_class(self, module, name):
        full = f"{module}.{name}"
        if full in INERT:
            return _FrozenClass(name, (Inert,), {"__slots__": (), "origin": full})
        if full in FUNCTIONS:
            return _Function(FUNCTIONS[full])
        if full in TOKENS or full in STORAGES:
            return full
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise CheckpointError(
            f"it names {full}, which is not on the list of what a checkpoint may contain (nothing"
            " was run). If you trust its author, ask for a file of tensors and plain containers"
        )

    def persistent_load(self, pid):
        match pid:
            case ("storage", str(kind), str(key), _location, int(numel)) if type(pid) is tuple:
                return _Storage(kind, key, numel)
        raise ValueError(f"unknown kind of stored object {reprlib.repr(pid)}")

    def set_state(self, value, state):
        """That of dicts (an OrderedDict's _metadata) means nothing here."""
        if isinstance(value, Inert):
            object.__setattr__(value, "state", state)
        elif not isinstance(value, dict):
            raise TypeError(f"a pickle may not change a {type(value).__name__}")


def unpickle(
    data: bytes, read_storage: Callable, *, describe: Callable, described: Collection[str] = ()
) -> Any:
    """The value of `data` in plain containers and tensors.

    read_storage(type name, key, length) -> one-dimensional tensor over a whole storage; `describe`
    does it for what lies below the top-level keys `described`. A DictConfig becomes a dict, a
    tokenizer {"class": its name, ...its state}, with the fast tokenizer's JSON as a string.
    """
    value = _Unpickler(data).load()
    apart = {}
    if isinstance(value, dict):
        apart = {key: value.pop(key) for key in described if key in value}
    value = _Plain(read_storage)(value)
    return value | _Plain(describe)(apart) if apart else value


class _Plain:
    """Replaces stand-ins, in dicts and lists in place; what was shared stays shared."""

    def __init__(self, read_storage):
        self.read_storage = read_storage
        self.done: dict[int, tuple] = {}  # id -> (what was seen, kept alive; what it became)

    def __call__(self, value):
        if not isinstance(value, _Frozen | dict | list | tuple):
            return value
        if id(value) not in self.done:
            mutable = isinstance(value, dict | list)
            self.done[id(value)] = value, value if mutable else None  # read if it contains itself
            self.done[id(value)] = value, self.replaced(value)
        return self.done[id(value)][1]

    def replaced(self, value):
        if isinstance(value, dict):
            value.update((key, self(item)) for key, item in list(value.items()))
        elif isinstance(value, list):
            value[:] = [self(item) for item in value]
        elif isinstance(value, tuple):
            return tuple(self(item) for item in value)
        elif isinstance(value, _Tensor):
            return value.build(self.read_storage)
        elif isinstance(value, Inert):
            return self.inert(value)
        else:
            raise ValueError(f"a bare {type(value).__name__}")
        return value

    def inert(self, value: Inert):
        state = value.state
        if value.origin == TOKENIZER_BACKEND and isinstance(state, bytes):
            return state.decode("utf-8")
        if not isinstance(state, dict):
            return {"class": value.origin, "state": self(state)}
        if value.origin in CONTAINERS:
            return self(state["_content"])
        if value.origin in LEAVES:
            return self(state["_val"])
        kept = {key: item for key, item in state.items() if key != "_parent"}
        return {"class": value.origin, **self(kept)}
