"""What a sampling run is asked for, and what it gives back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

from torch import Tensor

from .steps import CONFIDENCES, STEPS

READ_BY = {
    "confidence": ("k", "confidence"),
    "threshold": ("threshold",),
    "remask": ("remask_eta",),
}


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
    context_size: int = 1024  # bamdlm (a multiple of S), ar: visible tokens, the block included
    window: int = 1024  # mdlm: tokens of a window
    steps: str = "first_hitting"  # the rule: a name of STEPS
    num_steps: int = 0  # T, per block or window: ancestral, remask and sedd
    k: int = 1  # confidence: k
    confidence: str = "probability"  # confidence and threshold: a name of CONFIDENCES
    threshold: float = 0.9
    remask_eta: float = 0.02  # remask: largest chance that a token seen is hidden again in one step
    nucleus_p: float = 1.0
    dtype: str = "float32"  # of the draw: float32 (right in the tails) or float64 (all V numbers)
    kv_cache: bool = False
    var_length: bool = False  # end at EOS or low entropy, and cut
    reject_low_entropy: bool = False  # the reference's rule: up to 10 tries
    move_chance: Callable = linear  # noise: p(t), for ancestral and remask

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

    def of_steps(self) -> dict:
        """The numbers that the step rule reads, beside num_steps."""
        return {name: getattr(self, name) for name in READ_BY.get(self.steps, ())}

    def check(self, algo: str, infill: bool = False) -> None:
        problems = list(self.problems(algo, infill))
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self, algo: str, infill: bool = False):
        """One sentence per setting that cannot be."""
        for name, value in (
            ("model.length", self.length),
            ("sampling.batch_size", self.batch_size),
            ("block_size", self.block_size),
            ("sampling.context_size", self.context_size),
            ("sampling.k", self.k),
        ):
            if value < 1:
                yield f"{name}={value} must be at least 1"
        if not 0 < self.nucleus_p <= 1:
            yield f"sampling.nucleus_p={self.nucleus_p} must be in (0, 1]"
        if self.dtype not in ("float32", "float64"):
            yield f"sampling.dtype={self.dtype!r} must be float32 or float64"
        if self.steps not in STEPS:
            yield f"sampling.steps={self.steps!r} must be one of {sorted(STEPS)}"
        if self.confidence not in CONFIDENCES:
            yield f"sampling.confidence={self.confidence!r} must be one of {sorted(CONFIDENCES)}"
        if not 0 < self.threshold <= 1:
            yield f"sampling.threshold={self.threshold} must be in (0, 1]"
        if not 0 <= self.remask_eta <= 1:
            yield f"sampling.remask_eta={self.remask_eta} must be in [0, 1]"
        stepped = algo == "sedd" or (
            algo in ("bamdlm", "mdlm") and self.steps in ("ancestral", "remask")
        )
        if stepped and self.num_steps < 1:
            yield (
                f"algo.T={self.num_steps} gives no sampling steps: set algo.T"
                " (the paper uses 5000, sedd 1000)"
                + ("" if algo == "sedd" else ", or sampling.first_hitting=true, which needs none")
            )
        if algo == "bamdlm" and self.block_size > 0:
            for name, value in (
                ("model.length", self.length),
                ("sampling.context_size", self.context_size),
            ):
                if value % self.block_size:
                    yield f"{name}={value} is not a multiple of block_size={self.block_size}"
        if algo == "mdlm" and self.window < 2:
            yield f"the window of mdlm has {self.window} tokens, not 2 or more: set block_size"
        if self.kv_cache and algo not in ("bamdlm", "ar"):
            yield f"sampling.kv_cache=true is exact for bamdlm and ar only, not for algo={algo}"
        if self.var_length and self.reject_low_entropy:
            yield (
                "sampling.reject_low_entropy=true redraws what sampling.var_length=true would cut:"
                " choose one"
            )
        if infill and (self.var_length or self.reject_low_entropy):
            rule = "var_length" if self.var_length else "reject_low_entropy"
            yield (
                f"sampling.{rule}=true has no place in infilling, whose length is given:"
                " leave it out"
            )
        if infill and algo == "ar":
            yield "algo=ar cannot fill gaps: it sees no token behind them; use mdlm or bamdlm"


@dataclass(frozen=True)
class TextRequest:
    """One text to write. `tokens`: what is given, BOS included; mask tokens in it are to be
    filled.
    """

    row: int  # names the random stream
    tokens: tuple[int, ...]
    total: int | None = None  # tokens of the text; None: params.length. Infilling: len(tokens)


@dataclass(frozen=True)
class Sample:
    row: int
    tokens: Tensor  # int64 [n], on the CPU
    nfe: int  # network evaluations this text needed
    stopped: str  # "length", "eos" or "entropy"
    given: int  # tokens of the request
    written: int  # tokens that the sampler wrote and kept
    tries: int = 1  # 1 + rejected ones
    rejected: bool = False  # the last allowed try was of low entropy too


@dataclass(frozen=True)
class Frame:
    """The texts being written, after one evaluation."""

    rows: list[int]
    before: Tensor  # int64 [B, L], on the CPU: what the evaluation was asked about
    tokens: Tensor  # the same after it; mask tokens where nothing is written yet
    nfe: int  # evaluations so far
