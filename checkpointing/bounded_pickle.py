"""Reading a pickle step by step, within bounds: of time, of memory, and of what may be a key.

A pickle of a few bytes can ask for all the memory there is, or for a hash that takes for ever. Each
bound is some ten times of what the files of this field need.
"""

import io
import pickle
from collections.abc import Callable

MOST_BYTES = 16 << 20  # the authors' pickles have 54 kB; with a large tokenizer they have some MB
MOST_CONTAINERS = 1_000_000  # nine for each tensor
MOST_BITS = 128  # of a whole number; transformers writes 10^30 for no limit
MOST_KEY_BITS = 60  # from 61 on, numbers can be chosen whose hashes are the same

FORBIDDEN = (
    # these fetch an object from a process-wide table, or from outside, instead of by name
    "EXT1",
    "EXT2",
    "EXT4",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
    # these make sets, or take as much memory as a number says
    "EMPTY_SET",
    "ADDITEMS",
    "FROZENSET",
    "BYTEARRAY8",
)
MAKING = (  # a container, or the place for one
    "MARK",
    "LIST",
    "DICT",
    "EMPTY_LIST",
    "EMPTY_DICT",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "REDUCE",
)
NUMBERS = ("INT", "LONG", "LONG1", "LONG4")


def checked_key(key):
    """A key of a dict: text, a number, or several texts (a merge of a tokenizer). The hash of
    tuples in tuples may take for ever, or more stack than there is."""
    texts = isinstance(key, tuple) and all(isinstance(part, str) for part in key)
    if not texts and not isinstance(key, str | int | float | bytes | None):
        raise ValueError(f"a dict with a key of type {type(key).__name__}")
    if isinstance(key, int) and key.bit_length() > MOST_KEY_BITS:
        raise ValueError(f"a dict with a key of {key.bit_length()} bits")
    return key


def _code(name: str) -> int:
    return getattr(pickle, name)[0]


def _forbidden(name: str) -> Callable:
    def stop(reader):
        raise ValueError(f"its pickle uses {name}, which torch.save never writes")

    return stop


def _counted(step: Callable) -> Callable:
    def make(reader):
        reader.made += 1
        if reader.made > MOST_CONTAINERS:
            raise ValueError(f"its pickle makes more than {MOST_CONTAINERS:,} containers")
        step(reader)

    return make


def _short(step: Callable) -> Callable:
    def read(reader):
        step(reader)
        if reader.stack[-1].bit_length() > MOST_BITS:
            raise ValueError(f"it holds a whole number of more than {MOST_BITS} bits")

    return read


def _steps(own: dict[str, Callable]) -> dict[int, Callable]:
    """What each opcode does; own: where it is not what Python does."""
    usual = pickle._Unpickler.dispatch
    own = own | {name: _short(usual[_code(name)]) for name in NUMBERS}
    own |= {name: _counted(own.get(name, usual[_code(name)])) for name in MAKING}
    own |= {name: _forbidden(name) for name in FORBIDDEN}
    return usual | {_code(name): step for name, step in own.items()}


class BoundedUnpickler(pickle._Unpickler):
    """Python's own in Python: each step can be watched, and its memo holds what is there, while
    that of the one in C takes as much memory as the largest index in the file says."""

    made = 0  # containers

    def __init__(self, data: bytes):
        """data: MOST_BYTES at most."""
        super().__init__(io.BytesIO(data))

    def set_state(self, value, state) -> None:
        """BUILD: the state of an object that the pickle has made."""
        raise NotImplementedError

    def _build(self):
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    def _set_item(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key], [value])

    def _set_items(self):
        items = self.pop_mark()
        self._put(items[::2], items[1::2])

    def _dict(self):
        items = self.pop_mark()
        self.append({})
        self._put(items[::2], items[1::2])

    def _put(self, keys, values):
        if not isinstance(self.stack[-1], dict):
            raise TypeError(f"a {type(self.stack[-1]).__name__} has no keys")
        self.stack[-1].update(zip(map(checked_key, keys), values, strict=True))

    dispatch = _steps(
        {"BUILD": _build, "SETITEM": _set_item, "SETITEMS": _set_items, "DICT": _dict}
    )
