"""Likelihood metrics: the published figures, and the error of the estimate."""

import math

import pytest
import torch
from conftest import load_json

from evaluation.likelihood import LikelihoodMeter, draw_error, of_rows


def test_nll_bpd_and_ppl_are_the_recorded_ones():
    recorded = load_json("metrics/nll.json")
    meter = LikelihoodMeter()
    for update in recorded["updates"]:
        meter.update(torch.tensor(update["values"]), torch.tensor(update["weights"]))
        found = meter.compute()
        assert found.nll == pytest.approx(update["after"]["nll"], rel=1e-5)
        assert found.bpd == pytest.approx(update["after"]["bpd"], rel=1e-5)
        assert found.ppl == pytest.approx(update["after"]["ppl"], rel=1e-5)


def test_a_nan_is_reported_and_not_dropped():
    """The authors' metric (torchmetrics) drops NaN and reports a perplexity of the rest."""
    meter = LikelihoodMeter()
    meter.update(torch.tensor([[1.0, math.nan]]), torch.ones(1, 2))
    assert math.isnan(meter.compute().nll)


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    generator = torch.Generator().manual_seed(0)
    estimates, errors = [], []
    for _ in range(400):
        meter = LikelihoodMeter()
        rows = torch.rand(50, 1, generator=generator) * 2  # what the tokens of a row share
        nll = rows + torch.rand(50, 8, generator=generator)
        loss_mask = (torch.rand(50, 8, generator=generator) < 0.7).float()
        meter.update(nll * loss_mask, loss_mask)
        estimates.append(meter.compute().nll)
        errors.append(meter.compute().nll_error)
    spread = torch.tensor(estimates).std().item()
    # the relative error of a standard deviation over 400 draws is 3.5 %; 4 of those
    assert torch.tensor(errors).mean().item() == pytest.approx(spread, rel=0.14)


def test_nothing_to_evaluate_is_an_error():
    meter = LikelihoodMeter()
    meter.update(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no token to evaluate"):
        meter.compute()


@pytest.mark.parametrize("draws", [2, 3, 8])
def test_the_draws_own_error_is_the_spread_of_repeated_draws(draws):
    """Also with two: the spread is over n - 1. The data are the same each time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 9
    drawn = torch.randn(2000, 40, draws, generator=generator, dtype=torch.float64) * 2
    found = torch.tensor([draw_error(rows + noise) for noise in drawn]).square().mean().sqrt()
    assert float(found) == pytest.approx(2 * math.sqrt(40 / draws), rel=0.02)
    spread = (rows + drawn).mean(2).sum(1).std()
    assert float(found) == pytest.approx(float(spread), rel=0.07)


def test_the_error_over_rows_holds_that_of_the_draws():
    """No data differ: all that is left is the draws."""
    generator = torch.Generator().manual_seed(0)
    nll = 5 + torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    found = of_rows(nll, torch.full((4000,), 7), sampled=True)
    assert found.nll_error == pytest.approx(math.sqrt(1 / 2 / 4000) / 7, rel=0.05)
    assert found.draw_error == pytest.approx(found.nll_error, rel=0.05)
    assert of_rows(nll, torch.full((4000,), 7), sampled=False).draw_error == 0
    assert math.isnan(of_rows(nll[:, :1], torch.full((4000,), 7), sampled=True).draw_error)


def test_the_error_of_two_rows_is_by_hand():
    """Mean 2, deviations 1 and 1: the variance of the mean is (1 + 1) / (2 - 1) / 2."""
    found = of_rows(torch.tensor([[1.0], [3.0]]).double(), torch.tensor([1, 1]), sampled=False)
    assert found.nll_error == pytest.approx(1)
