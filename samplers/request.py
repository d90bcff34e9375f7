"""What a sampler is given for each text, and what it gives back."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TextRequest:
    """One text to write. `tokens`: what is given, BOS included; its mask tokens are filled."""

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
    # float32 [B, L]: of each token when it was drawn, by the network itself; NaN: none was drawn
    log_probs: Tensor
