"""Perplexity of recorded evaluation runs: the same times and masks give the same figures.

`main._ppl_eval` of the reference, weights averaged. What counts into val/nll is recorded batch by
batch; with x_t and t fed in nothing random is left.
"""

import pytest
import torch
from conftest import load, load_json
from networks import (
    CHECKPOINTS,
    LENGTH,
    LOGITS,
    MASK,
    assert_within,
    loss_at,
    recorded,
    recorded_weights,
)

from evaluation.likelihood import LikelihoodMeter
from noise_schedule import EPS, LogLinear
from objectives import clipping
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import EXACT
from objectives.sedd import ScoreEntropy

RUNS = load_json("metrics/ppl_eval.json")["runs"]
BATCHES = load("metrics/ppl_eval.safetensors")
RECORDED = sorted({key.split(".")[0] for key in BATCHES})


def averaged(name):
    net = recorded(name)
    net.load_state_dict(recorded_weights(name, "ema.backbone."), strict=False)
    assert recorded_weights(name, "ema.backbone.").keys() == dict(net.named_parameters()).keys()
    return net


def batches_of(run):
    numbers = sorted({int(key.split(".")[1]) for key in BATCHES if key.startswith(f"{run}.")})
    assert numbers
    for number in numbers:
        prefix = f"{run}.{number}."
        yield {k.removeprefix(prefix): v for k, v in BATCHES.items() if k.startswith(prefix)}


def evaluate(name, net, batch):
    """The loss of one recorded batch, position 0 put back where it is ignored."""
    entry = CHECKPOINTS[name]
    everything = torch.ones(batch["x0"].shape)
    if entry["algo"] == "ar":
        return Autoregressive(MASK).loss(net, batch["x0"], everything, training=False)
    x_t, t = batch["xt_from_q"].clone(), batch["t"]
    x_t[:, 0] = batch["x0"][:, 0]
    if entry["algo"] == "sedd":
        objective = ScoreEntropy(MASK, LogLinear())
        loss_mask = objective.loss_mask(everything, training=False)
        return loss_at(objective, net, batch["x0"], x_t, t, loss_mask)
    size = entry["block_size"]
    objective = MaskedDiffusion(MASK, size, LogLinear())
    loss_mask = objective.loss_mask(everything, training=False)
    t = t if size == LENGTH else t[:, ::size]
    interval = EXACT if (t == 1).all() else (EPS, 1.0)
    return loss_at(objective, net, batch["x0"], x_t, t, loss_mask, interval=interval)


@pytest.mark.parametrize("run", RECORDED)
@torch.no_grad()
def test_evaluation_gives_the_recorded_likelihood(run):
    name, meter = RUNS[run]["checkpoint"], LikelihoodMeter()
    net = averaged(name)
    for batch in batches_of(run):
        loss = evaluate(name, net, batch)
        assert_within(loss.nll, batch["nlls"], LOGITS, run)
        assert torch.equal(loss.loss_mask, batch["token_mask"])
        meter.update(loss.nll, loss.loss_mask)
    found, result = meter.compute(), RUNS[run]["result"]
    assert found.nll == pytest.approx(result["val/nll"], rel=LOGITS)
    assert found.bpd == pytest.approx(result["val/bpd"], rel=LOGITS)
    assert found.ppl == pytest.approx(result["val/ppl"], rel=1e-4)  # exp magnifies nll's 1e-5


@pytest.mark.parametrize("run", [r for r in RECORDED if CHECKPOINTS[r]["algo"] == "bd3lm"])
@torch.no_grad()
def test_the_search_gives_the_reported_interval_the_recorded_variance(run):
    """Position 0 is not counted, and still one of its block's tokens."""
    name = RUNS[run]["checkpoint"]
    net, size = averaged(name), CHECKPOINTS[name]["block_size"]
    interval = EXACT if size == 1 else (EPS, 1)
    search = clipping.Search([interval])
    for batch in batches_of(run):
        search.add([clipping.variance(evaluate(name, net, batch).block_means(size))])
    recorded_figure = RUNS[run]["result"][clipping.name(interval)]
    assert search.means()[0] == pytest.approx(recorded_figure, rel=1e-4)
