"""The masking schedules: recordings, and the relations between their three quantities."""

import math

import pytest
import torch
from conftest import load

from noise_schedule import (
    EPS,
    SCHEDULES,
    SIGMA_MAX,
    NoiseLevel,
    Power,
    ScaledLogLinear,
    get_schedule,
)

ALL = {**SCHEDULES, "mdlm_loss_scale": ScaledLogLinear()}
CLAMPED = [name for name in ALL if isinstance(ALL[name], Power)]
RECORDED = ("loglinear", "cosine", "square", "square_root", "log")


@pytest.fixture(scope="module")
def golden():
    return load("noise/noise.safetensors")


@pytest.mark.parametrize("name", ALL)
def test_weight_is_the_log_derivative_of_p(name):
    t = torch.linspace(0.001, 1, 400, dtype=torch.float64, requires_grad=True)
    level = ALL[name](t)
    (slope,) = torch.autograd.grad(level.p.sum(), t)
    torch.testing.assert_close(level.weight, slope / level.p)


@pytest.mark.parametrize("name", CLAMPED)
def test_where_p_is_clamped_it_is_constant_and_weighs_nothing(name):
    schedule = ALL[name]
    clamped = torch.linspace(0, 0.999, 20, dtype=torch.float64) * EPS ** (1 / schedule.exponent)
    level = schedule(clamped[1:])
    assert (level.p == EPS).all()
    assert (level.weight == 0).all()


@pytest.mark.parametrize("name", CLAMPED)
def test_a_clamped_schedule_is_finite_at_time_zero(name):
    level = ALL[name](torch.zeros(1))
    assert level.p == pytest.approx(EPS)
    assert level.weight == 0


@pytest.mark.parametrize("name", ALL)
def test_p_rises_to_one_and_weight_is_never_negative(name):
    level = ALL[name](torch.linspace(0.001, 1, 500))
    assert (level.p.diff() >= 0).all()
    assert (level.p > 0).all()
    top = 1 - EPS if name == "mdlm_loss_scale" else 1
    assert level.p[-1] == pytest.approx(top, abs=1e-6)
    assert (level.p <= 1).all()
    assert (level.weight >= 0).all()


@pytest.mark.parametrize("name", RECORDED)
def test_p_is_as_recorded(golden, name):
    torch.testing.assert_close(
        SCHEDULES[name](golden["t"]).p, golden[f"{name}.move_chance"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "cosine"])
def test_weight_is_the_recorded_one_without_its_sign(golden, name):
    """Left out are the mended faults: t = 0 (inf in the reference), cosine everywhere (next test)
    and the clamped points of `square`, whose slope the reference does not clamp."""
    ours = SCHEDULES[name](golden["t"])
    sound = golden["t"] > 0
    if name in CLAMPED:
        sound &= ours.p > EPS
    recorded = -golden[f"{name}.loss_scaling"]
    torch.testing.assert_close(ours.weight[sound], recorded[sound], rtol=1e-5, atol=1e-6)


def test_the_recorded_cosine_weight_has_eps_twice(golden):
    """Mended: the reference divides by 1 - (1 - eps) cos + eps instead of by p."""
    t = golden["t"].double()
    angle = t * math.pi / 2
    faulty = (1 - EPS) * torch.sin(angle) * (math.pi / 2) / (1 - (1 - EPS) * torch.cos(angle) + EPS)
    torch.testing.assert_close(
        faulty, -golden["cosine.loss_scaling"].double(), rtol=2e-4, atol=1e-5
    )
    ours = SCHEDULES["cosine"](t)
    torch.testing.assert_close(ours.weight * ours.p / (ours.p + EPS), faulty)


def test_the_scaled_schedule_is_the_recorded_total_noise_and_rate(golden):
    inside = golden["t"] > 0
    ours = ScaledLogLinear()(golden["t"][inside])
    total, rate = (golden[f"loglinear.{k}"][inside].double() for k in ("total_noise", "rate_noise"))
    torch.testing.assert_close(ours.p.double(), -torch.expm1(-total), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.weight.double(), rate / torch.expm1(total), rtol=1e-4, atol=0)
    assert pytest.approx(float(golden["loglinear.sigma_max"]), rel=1e-5) == SIGMA_MAX


def test_sigma_is_as_recorded(golden):
    """The reference's float32 log(1 - p) loses digits at p = 1e-7; hence the absolute 1e-6."""
    p = golden["sigma_from_p.p"]
    sigma = NoiseLevel(p=p, weight=p).sigma
    torch.testing.assert_close(sigma, golden["sigma_from_p.sigma"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_sigma_turns_back_into_p_up_to_its_limit(name):
    level = ALL[name](torch.linspace(0.01, 1, 100, dtype=torch.float64))
    torch.testing.assert_close(-torch.expm1(-level.sigma), level.p.clamp(max=1 - EPS))


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"noise must be one of .*cosine.*got 'cos'"):
        get_schedule("cos")


def test_the_scale_of_mdlm_belongs_to_the_loglinear_schedule():
    assert get_schedule("loglinear", mdlm_loss_scale=True) == ScaledLogLinear()
    with pytest.raises(ValueError, match="mdlm_loss_scale belongs to noise=loglinear"):
        get_schedule("cosine", mdlm_loss_scale=True)
