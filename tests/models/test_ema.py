"""The average of the weights."""

import pytest
import torch
from conftest import load, load_json

from models.ema import EMA

ALONE = load_json("optim/ema.json")
RECORDED = load("optim/ema.safetensors")
TRAINING = load_json("optim/steps.json")


def parameters(run, step):
    return {n: RECORDED[f"{run}.{step}.{n}"] for n in ("a", "b")}.items()


def aliased(run):
    """Every step of the public recording shows the last value: its tensors share one memory."""
    return all(
        torch.equal(before, after)
        for (_, before), (_, after) in zip(
            parameters(run, "init"), parameters(run, "00"), strict=True
        )
    )


@pytest.mark.parametrize("run", [run for run in ALONE if ALONE[run]["use_num_updates"]])
def test_averages_are_the_recorded_ones_after_every_update(run):
    """Runs without num_updates (a constant decay) are left out: nothing published uses them."""
    if aliased(run):
        pytest.skip("this recording holds the last value at every step; see the training runs")
    ema = EMA(parameters(run, "init"), ALONE[run]["decay"])
    steps = sorted({k.split(".")[1] for k in RECORDED if k.startswith(f"{run}.")} - {"init"})
    for step in steps:
        ema.update(parameters(run, step))
        for n in ("a", "b"):
            recorded = RECORDED[f"{run}.{step}.ema_{n}"]
            torch.testing.assert_close(ema.shadow[n], recorded, rtol=0, atol=1e-6)
    assert ema.num_updates == ALONE[run]["num_updates"]


@pytest.mark.parametrize("run", TRAINING)
def test_averages_follow_the_recorded_training_runs(run):
    """The first entries of every parameter and of its average are recorded after each step."""

    def first(step, kind):
        return {n: torch.tensor(entry["first"]) for n, entry in step[kind].items()}

    start, *steps = TRAINING[run]["steps"]
    ema = EMA(first(start, "params").items(), TRAINING[run]["ema_decay"])
    ema.load(first(start, "ema"), start["ema_num_updates"])
    for step in steps:
        ema.update(first(step, "params").items())
        for n, recorded in first(step, "ema").items():
            torch.testing.assert_close(ema.shadow[n], recorded, rtol=0, atol=1e-6)
        assert ema.num_updates == step["ema_num_updates"]


def weights(value):
    return {"w": torch.full((2,), float(value)), "v": torch.full((3,), float(-value))}


def test_the_decay_warms_up():
    ema = EMA(weights(0).items(), 0.5)
    expected = 0.0
    for n in range(1, 20):
        ema.update(weights(n).items())
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.shadow["w"][0] == pytest.approx(expected)
        assert ema.shadow["v"][0] == pytest.approx(-expected)


def test_the_average_does_not_follow_the_parameter_it_was_made_from():
    model = weights(1)
    ema = EMA(model.items(), 0.9)
    model["w"].fill_(5)
    assert (ema.shadow["w"] == 1).all()


def test_swapping_twice_changes_nothing_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    model = {"w": torch.randn(50, generator=generator).requires_grad_()}
    ema = EMA(model.items(), 0.99)
    ema.update({"w": torch.randn(50, generator=generator)}.items())
    before, average = model["w"].detach().clone(), ema.shadow["w"].clone()
    ema.swap(model.items())
    assert torch.equal(model["w"], average)
    assert torch.equal(ema.shadow["w"], before)
    ema.swap(model.items())
    assert torch.equal(model["w"], before)
    assert torch.equal(ema.shadow["w"], average)


def test_a_loaded_average_continues_where_it_was():
    one, other = EMA(weights(0).items(), 0.9), EMA(weights(8).items(), 0.9)
    for n in range(5):
        one.update(weights(n).items())
    other.load({n: s.clone() for n, s in one.shadow.items()}, one.num_updates)
    for ema in (one, other):
        ema.update(weights(3).items())
    for n in one.shadow:
        assert torch.equal(one.shadow[n], other.shadow[n])


def test_an_average_of_another_model_is_refused():
    ema = EMA(weights(0).items(), 0.9)
    with pytest.raises(ValueError, match=r"differ in 1 parameters, first \['v'\]"):
        ema.load({"w": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match=r"EMA of v has shape \(4,\), the model's is \(3,\)"):
        ema.load({"w": torch.zeros(2), "v": torch.zeros(4)}, 1)
    with pytest.raises(ValueError, match="differ in 1 parameters"):
        ema.update({"w": torch.zeros(2)}.items())


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5])
def test_a_decay_outside_the_unit_interval_is_refused(decay):
    with pytest.raises(ValueError, match=r"training.ema must lie in"):
        EMA(weights(0).items(), decay)
