"""What a set of texts is worth, each figure with its standard error over texts.

Texts are token ids. All figures but distinct-n are means over texts or ratios of sums over them;
distinct-n falls as texts are added, so only sets of the same size can be compared.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow  # numbers things faster than numpy, which sorts them
import torch

from evaluation.judge import Judge, TextScore
from evaluation.likelihood import of_rows

NGRAMS = 4  # distinct-1 .. 4; repetition is that of 4-grams

Ids = Sequence[int] | torch.Tensor


@dataclass(frozen=True)
class Figure:
    """`error`: one standard error; nan where one text says nothing of it."""

    value: float
    error: float = math.nan

    def __str__(self) -> str:
        digits = 4 if abs(self.value) < 1 else 3 if abs(self.value) < 10 else 2
        shown = f"{self.value:,.{digits}f}"
        return shown if math.isnan(self.error) else f"{shown} ± {self.error:,.{digits}f}"

    def as_dict(self) -> dict[str, float | None]:
        return {"value": number(self.value), "error": number(self.error)}


def number(value: float) -> float | None:
    """As JSON has it: nan is none."""
    return None if math.isnan(value) else value


def mean(values: Sequence[float]) -> Figure:
    """Of independent values; nan where there are none."""
    values = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Figure(float(values.mean()) if count else math.nan, error)


def perplexity(scores: Sequence[TextScore]) -> Figure:
    """Over the tokens of all texts that were judged: exp of a ratio of sums, whose error is that of
    the ratio (n / (n - 1), see likelihood.py) times the perplexity."""
    judged = [s for s in scores if s.nll is not None and s.tokens]
    if not judged:
        return Figure(math.nan)
    nll = torch.tensor([[s.nll] for s in judged], dtype=torch.float64)
    found = of_rows(nll, torch.tensor([s.tokens for s in judged]), sampled=False)
    return Figure(found.ppl, found.ppl_error)


@dataclass(frozen=True)
class Ngrams:
    """All n-grams of a set of texts. `number` int64 [M]: equal where they are equal;
    `text` int64 [M]: which of the `texts` each stands in."""

    number: np.ndarray
    text: np.ndarray
    texts: int

    @property
    def distinct(self) -> float:
        """Distinct-n (Li et al., arXiv:1510.03055): different n-grams of all texts together,
        divided by their n-grams. nan where there is none."""
        different = len(pyarrow.array(self.number).unique())
        return different / len(self.number) if len(self.number) else math.nan

    @property
    def repetition(self) -> list[float]:
        """The share of each text's n-grams that stood in it before; texts of none are left out."""
        width = self.number.max(initial=0) + 1
        new = pyarrow.array(self.text * width + self.number).unique().to_numpy() // width
        every, new = (np.bincount(x, minlength=self.texts).tolist() for x in (self.text, new))
        return [1 - b / a for a, b in zip(every, new, strict=True) if a]


def ngrams(texts: Sequence[Ids], most: int) -> Iterator[Ngrams]:
    """Those of 1, 2 … `most` tokens."""
    ids = [np.asarray(x, dtype=np.int64) for x in texts]
    flat = np.concatenate([np.empty(0, np.int64), *ids])
    owner = np.repeat(np.arange(len(ids)), [len(x) for x in ids])
    number, width = flat, flat.max(initial=0) + 1
    for n in range(1, most + 1):
        if n > 1:  # numbered from 0 first, so that no product is too large
            found = pyarrow.array(number).dictionary_encode().indices.to_numpy()
            number = found[:-1].astype(np.int64) * width + flat[n - 1 :]
        inside = owner[: len(number)] == owner[n - 1 :]
        yield Ngrams(number[inside], owner[n - 1 :][inside], len(ids))


def ended(texts: Sequence[Ids], eos_id: int) -> float:
    """The share of texts that end with EOS."""
    found = [len(x) > 1 and int(x[-1]) == eos_id for x in texts]
    return sum(found) / len(found) if found else math.nan


def judged(judge: Judge, texts: Sequence[str]) -> dict[str, Figure]:
    """{name: figure} of a set of texts, in the tokens of a judge."""
    ids = judge.tokenize(texts)
    scores = judge.score_tokens(ids)
    return {
        "texts": Figure(len(texts)),
        "gen_ppl": perplexity(scores),
        "entropy": mean([score.entropy for score in scores]),
        "length": mean([score.tokens for score in scores]),
        **diversity(ids, judge.eos_id),
    }


def diversity(texts: Sequence[Ids], eos_id: int) -> dict[str, Figure]:
    """{name: figure} of a set of texts, without a judge."""
    found = list(ngrams(texts, NGRAMS))
    return {
        **{f"distinct_{n}": Figure(each.distinct) for n, each in enumerate(found, 1)},
        "repetition": mean(found[-1].repetition),
        "ended_by_eos": Figure(ended(texts, eos_id)),
    }
