"""Figures of a set of texts: by hand, and their errors by drawing again."""

import math

import pytest
import torch

from evaluation.judge import TextScore
from evaluation.quality import (
    Figure,
    diversity,
    ended,
    mean,
    ngrams,
    perplexity,
)


def test_diversity_by_hand():
    texts = [[1, 2, 1, 2, 1], [1, 2, 3]]
    one, two, _, four, _, six = ngrams(texts, 6)
    assert one.distinct == 3 / 8
    assert two.distinct == 3 / 6  # 12 21 12 21 | 12 23
    assert four.distinct == 2 / 2
    assert math.isnan(six.distinct)
    *_, four = ngrams([[1, 2, 3, 4, 1, 2, 3, 4], [7] * 10, [1, 2, 3]], 4)
    assert four.repetition == pytest.approx([1 / 5, 6 / 7])  # the third has no n-gram
    assert ended([[0, 1, 0], [0, 1], [0]], eos_id=0) == 1 / 3
    found = diversity([torch.tensor(x) for x in texts], eos_id=3)
    assert found["distinct_2"].value == 1 / 2
    assert found["repetition"] == Figure(0.0)
    assert found["ended_by_eos"].value == 1 / 2


def test_ngrams_of_large_vocabularies_are_told_apart():
    """Against sets of tuples."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, (n,), generator=generator) * 49_999 for n in (0, 3, 200, 700)]
    for n, found in enumerate(ngrams(texts, 6), 1):
        grams = [[tuple(x[i : i + n].tolist()) for i in range(len(x) - n + 1)] for x in texts]
        every = [gram for of_text in grams for gram in of_text]
        assert found.distinct == len(set(every)) / len(every)
        expected = [1 - len(set(of_text)) / len(of_text) for of_text in grams if of_text]
        assert found.repetition == expected


def test_a_set_of_nothing_has_no_figure():
    found = diversity([], eos_id=0)
    assert all(math.isnan(figure.value) for figure in found.values())
    assert math.isnan(perplexity([TextScore(None, 3, 1.0)]).value)
    assert str(Figure(0.5)) == "0.5000"
    assert str(Figure(1234.5, 6.78)) == "1,234.50 ± 6.78"


def test_the_error_of_a_mean_is_the_usual_one():
    found = mean([1.0, 2.0, 4.0])
    assert found.value == pytest.approx(7 / 3)
    assert found.error == pytest.approx(math.sqrt(7 / 3 / 3))
    assert math.isnan(mean([1.0]).error)


def test_perplexity_errs_as_much_as_drawn_sets_differ():
    """Texts of different lengths, whose nats depend on the length: a ratio of sums."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (400, 80), generator=generator)
    nats = tokens * (2 + 0.01 * tokens + 0.3 * torch.randn(400, 80, generator=generator))
    found = [
        perplexity([TextScore(float(s), int(c), 0.0) for s, c in zip(ss, cc, strict=True)])
        for ss, cc in zip(nats, tokens, strict=True)
    ]
    values = torch.tensor([each.value for each in found])
    errors = torch.tensor([each.error for each in found])
    # 400 sets tell their deviation within 3.5 %, and 80 texts theirs within 8 %
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.1)
    scores = [TextScore(3.0, 2, 0.0), TextScore(5.0, 4, 0.0), TextScore(0.0, 0, 0.0)]
    assert perplexity(scores).value == pytest.approx(math.exp((3 + 5) / (2 + 4)), rel=1e-12)
    # jackknife of a ratio of two texts
    assert perplexity(scores).error > 0
