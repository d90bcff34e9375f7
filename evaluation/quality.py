"""What a set of texts is worth, each figure with its standard error over texts.

Texts are token ids. All figures but distinct-n are means over texts or ratios of sums over them;
distinct-n falls as texts are added, so only sets of the same size can be compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evaluation.judge import TextScore
from evaluation.likelihood import LikelihoodMeter

NGRAMS = (1, 2, 3, 4)
REPEATED = 4  # tokens of the n-grams that `repetition` looks for

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
    meter = LikelihoodMeter()
    sums = ([s.nll for s in judged], [s.tokens for s in judged])
    meter.add(*(torch.tensor(each, dtype=torch.float64) for each in sums))
    found = meter.compute()
    return Figure(found.ppl, found.ppl_error)


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    ids = torch.as_tensor(ids).tolist()
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[Ids], n: int) -> float:
    """Distinct-n (Li et al., arXiv:1510.03055): different n-grams of all texts together, divided by
    their n-grams. nan where there is no n-gram."""
    found = [gram for ids in texts for gram in ngrams(ids, n)]
    return len(set(found)) / len(found) if found else math.nan


def repetition(ids: Ids, n: int = REPEATED) -> float:
    """The share of a text's n-grams that stood in it before. nan where it has none."""
    found = ngrams(ids, n)
    return 1 - len(set(found)) / len(found) if found else math.nan


def ended(texts: Sequence[Ids], eos_id: int) -> float:
    """The share of texts that end with EOS."""
    return sum(len(x) > 1 and x[-1] == eos_id for x in texts) / len(texts) if texts else math.nan


def diversity(texts: Sequence[Ids], eos_id: int) -> dict[str, Figure]:
    """{name: figure} of a set of texts, without a judge."""
    repeated = [r for r in map(repetition, texts) if not math.isnan(r)]
    return {
        **{f"distinct_{n}": Figure(distinct(texts, n)) for n in NGRAMS},
        "repetition": mean(repeated),
        "ended_by_eos": Figure(ended(texts, eos_id)),
    }
