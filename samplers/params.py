"""Every number of a sampling run, and what must hold between them. Imports no torch, so that the
command line is checked with it at once."""

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

CONTEXT_TOKENS = 1024  # that a sampler sees, where the checkpoint does not say its length


def whole_blocks(tokens: int, size: int) -> int:
    """The largest multiple of `size` up to `tokens`, but one block at least."""
    return max(tokens - tokens % size, size)


# the limits of numbers: comparisons of `operator` that must hold. settings/ reads them from here
RANGES = {
    "at least 0": {"ge": 0},
    "at least 1": {"ge": 1},
    "in (0, 1]": {"gt": 0, "le": 1},
    "in [0, 1]": {"ge": 0, "le": 1},
    "in [0, 100]": {"ge": 0, "le": 100},
}


def in_range(limit: str, value: float) -> bool:
    """Whether the limit, a key of RANGES, holds."""
    return all(getattr(operator, name)(value, bound) for name, bound in RANGES[limit].items())


def rule_number(*, default: float, limit: str, doc: str, if_read: bool = True):
    """A field for a number that a step rule reads; it makes the setting sampling.NAME.

    settings/ reads the type and these literals from the source, for the help and the checks.
    limit: a key of RANGES. if_read: the number is part of a run's name only where the step rule
    reads it and it is not the default, so that a new number leaves the names of older runs as they
    are.
    """
    about = {"limit": limit, "doc": doc, "if_read": if_read, "if_changed": if_read}
    return field(default=default, metadata=about)


def number(*, default: float, limit: str, doc: str):
    """A field for a number that every step rule obeys; it makes the setting sampling.NAME. It is
    part of a run's name only where it is not the default. Else as rule_number."""
    return field(default=default, metadata={"limit": limit, "doc": doc, "if_changed": True})


class Warp(NamedTuple):
    """What is done to a distribution before a token is drawn from it, in this order. The defaults
    leave it as it is. See SamplingParams and warping.py."""

    temperature: float = 1.0
    top_k: int = 0
    nucleus_p: float = 1.0


def linear(t):
    """p(t) = t, the chance of the loglinear schedule: the default of `move_chance`."""
    return t


@dataclass(frozen=True)
class SamplingParams:
    """Every number of a sampling run. Names in messages are those of the command line."""

    length: int  # tokens of a text, the prompt included
    bos_id: int
    eos_id: int
    seed: int = 1
    batch_size: int = 1  # texts made side by side
    block_size: int = 1  # bamdlm: S
    # bamdlm: a multiple of S where it is less than `length`
    context_size: int = CONTEXT_TOKENS  # bamdlm, ar: visible tokens, the block included
    window: int = 1024  # mdlm: tokens of a window
    steps: str = "first_hitting"  # the rule: a name of steps.STEPS
    num_steps: int = 0  # T, per block or window: ancestral, remask and sedd
    k: int = rule_number(
        default=1,
        limit="at least 1",
        doc="tokens that steps=confidence and low_confidence reveal in a step",
        if_read=False,
    )
    confidence: str = "probability"  # confidence: a name of steps.CONFIDENCES
    threshold: float = rule_number(
        default=0.9,
        limit="in (0, 1]",
        doc="least probability of a token that steps=threshold reveals; one is always revealed",
        if_read=False,
    )
    remask_eta: float = rule_number(
        default=0.02,
        limit="in [0, 1]",
        doc="largest probability with which steps=remask masks a revealed token again",
        if_read=False,
    )
    order_temperature: float = rule_number(
        default=0.0,
        limit="at least 0",
        doc="for steps=confidence: draw positions by exp(confidence / this); 0: take the surest",
    )
    entropy_bound: float = rule_number(
        default=0.1,
        limit="at least 0",
        doc="nats of entropy that steps=entropy_bounded reveals in a step, beside the largest",
    )
    temperature: float = number(
        default=1.0,
        limit="in [0, 100]",
        doc="divides the logits before a token is drawn; 0: always the likeliest token",
    )
    top_k: int = number(
        default=0,
        limit="at least 0",
        doc="draw from this many of the likeliest tokens, before sampling.nucleus_p; 0: from all",
    )
    corrector: int = number(
        default=0,
        limit="at least 0",
        doc="tokens of a finished block, the least probable, that are masked and filled once more",
    )
    nucleus_p: float = 1.0
    dtype: str = "float32"  # of the draw: float32 (right in the tails) or float64 (all V numbers)
    kv_cache: bool = False
    var_length: bool = False  # end at EOS or low entropy, and cut
    reject_low_entropy: bool = False  # the reference's rule: up to 10 tries
    move_chance: Callable = linear  # noise: p(t), for ancestral and remask

    @property
    def warp(self) -> Warp:
        return Warp(self.temperature, self.top_k, self.nucleus_p)

    def changed(self, also: Iterable[str] = (), /, **changes) -> "SamplingParams":
        """With other values. ValueError for a name that is no setting; it lists those there are,
        after `also`, what the caller takes beside them."""
        known = [field.name for field in fields(self)]
        if unknown := sorted(changes.keys() - known):
            raise ValueError(
                f"there is no option {', '.join(unknown)}; the options are"
                f" {', '.join([*also, *known])}"
            )
        return replace(self, **changes)

    def problems(
        self, algo: str, can: Collection[str], reads: Collection[str], infill: bool = False
    ) -> Iterator[str]:
        """One sentence for each value that cannot be. algo, can: the sampler's name and what it
        can, see Sampler; reads: the fields that the step rule reads; infill: gaps are filled."""
        yield from self._outside()
        reads = reads if "steps" in can else ()
        if (algo == "sedd" or "num_steps" in reads) and self.num_steps < 1:
            what = "algo=sedd" if algo == "sedd" else f"sampling.steps={self.steps}"
            yield (
                f"algo.T={self.num_steps}: {what} takes algo.T steps: set algo.T=64, or more for"
                " finer ones (the paper has 1000 for sedd and 5000 else)"
            )
        yield from self._lengths(algo)
        size = self.window if algo == "mdlm" else self.block_size
        for name in ("k",) * ("k" in reads) + ("corrector",) * ("corrector" in can):
            if (value := getattr(self, name)) > size:
                yield f"sampling.{name}={value} is more than the block_size={size} of a block"
        if self.corrector and "corrector" not in can:
            yield (
                f"sampling.corrector={self.corrector} fills tokens of finished blocks once more,"
                f" which bamdlm writes, not algo={algo}: set sampling.corrector=0"
            )
        if self.kv_cache and "cache" not in can:
            yield f"sampling.kv_cache=True is exact for bamdlm and ar only, not for algo={algo}"
        if self.var_length and self.reject_low_entropy:
            yield (
                "sampling.reject_low_entropy=True draws again what sampling.var_length=True cuts:"
                " choose one"
            )
        for name in ("var_length", "reject_low_entropy"):
            if infill and getattr(self, name):
                yield (
                    f"sampling.{name}=True has no place beside sampling.infill=True, where the"
                    " length is given: leave one of them out"
                )
        if infill and "infill" not in can:
            yield f"sampling.infill=True is offered by bamdlm and mdlm, not by algo={algo}"

    def _outside(self) -> Iterator[str]:
        """Values that no other value makes possible."""
        limited = [
            ("model.length", self.length, "at least 1"),
            ("sampling.batch_size", self.batch_size, "at least 1"),
            ("block_size", self.block_size, "at least 1"),
            ("sampling.context_size", self.context_size, "at least 1"),
            ("sampling.nucleus_p", self.nucleus_p, "in (0, 1]"),
        ]
        for each in fields(self):
            if limit := each.metadata.get("limit"):
                limited.append((f"sampling.{each.name}", getattr(self, each.name), limit))
        for name, value, limit in limited:
            if not in_range(limit, value):
                yield f"{name}={value} must be {limit}"

    def _lengths(self, algo: str) -> Iterator[str]:
        if algo == "bamdlm" and self.block_size > 0:
            if self.length % self.block_size:
                yield f"block_size={self.block_size} does not divide model.length={self.length}"
            if self.length > self.context_size and self.context_size % self.block_size:
                yield (
                    f"sampling.context_size={self.context_size} is not a multiple of"
                    f" block_size={self.block_size}"
                )
        if algo == "mdlm" and self.window < 2:
            yield f"block_size={self.window}: the windows of algo=mdlm need at least 2 tokens"
