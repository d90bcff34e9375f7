"""A row of the CSV belongs to the weights, settings and judge it was made with."""

from dataclasses import fields, make_dataclass, replace

import pytest
import torch

import settings
from checkpointing.layouts import Checkpoint
from modes.sample_eval import sampling_run_id
from modes.sampling_params import sampling_params
from samplers.params import SamplingParams, rule_number
from samplers.steps import STEPS

WANTED = SamplingParams(length=8, bos_id=0, eos_id=0)


def weights(**changes):
    return {"a": torch.arange(40.0), "b": torch.ones(2, 3)} | changes


def name(words=(), made=None, ema=None, wanted=WANTED, source="run/last.ckpt"):
    checkpoint = Checkpoint(source, "lightning", ("bamdlm",), {}, made or weights(), ema=ema)
    return sampling_run_id(settings.load(["mode=sample_eval", *words]), checkpoint, wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"made": weights(b=torch.zeros(2, 3))},
        {"ema": weights()},
        {"wanted": SamplingParams(length=8, bos_id=0, eos_id=0, seed=2)},
        {"words": ["eval.disable_ema=true"]},
        {"words": ["eval.gen_ppl_eval_model_name_or_path=null"]},
        {"words": ["sampling.prompt=Once"]},
    ],
    ids=lambda change: "-".join(change),
)
def test_another_row_has_another_run(change):
    assert name(**change) != name()


@pytest.mark.parametrize(
    "same",
    [
        {"source": "elsewhere/last.ckpt"},
        {"words": ["sampling.num_sample_batches=3"]},
        {"wanted": SamplingParams(length=8, bos_id=0, eos_id=0, batch_size=4)},
    ],
    ids=lambda change: "-".join(change),
)
def test_the_same_rows_belong_to_one_run(same):
    assert name(**same) == name()


def test_a_step_rule_reads_numbers_that_are_settings():
    """The command line, the report and the run id find them by name."""
    known = {field.name for field in fields(SamplingParams)}
    config = settings.load(["mode=sample_eval", "sampling.k=3", "algo.T=5"])
    params = sampling_params(config, bos_id=0, eos_id=0)
    assert (params.k, params.num_steps) == (3, 5)
    for rule in STEPS.values():
        assert set(rule.reads) <= known
        assert set(rule.reads) - {"num_steps"} <= vars(config.sampling).keys()


def test_a_new_number_leaves_the_names_of_older_runs(monkeypatch):
    """It is part of the name only where the step rule reads it and it is not the default."""
    jump = rule_number(default=3, limit="at least 1", doc="tokens passed over")
    later = make_dataclass("Later", [("jump", int, jump)], bases=(SamplingParams,), frozen=True)
    wanted = later(length=8, bos_id=0, eos_id=0)
    assert name(wanted=wanted) == name(wanted=replace(wanted, jump=4)) == name()
    monkeypatch.setitem(STEPS, wanted.steps, replace(STEPS[wanted.steps], reads=("jump",)))
    assert name(wanted=wanted) == name() != name(wanted=replace(wanted, jump=4))
    assert list(wanted.problems("bamdlm", ("steps",), ())) == []
    assert list(replace(wanted, jump=0).problems("bamdlm", ("steps",), ())) == [
        "sampling.jump=0 must be at least 1"
    ]


@pytest.mark.parametrize(
    "field",
    [f for f in fields(SamplingParams) if f.metadata.get("if_changed")],
    ids=lambda f: f.name,
)
def test_a_number_added_later_is_part_of_the_name_where_it_is_not_the_default(field):
    readers = [rule for rule in STEPS if field.name in STEPS[rule].reads]
    wanted = replace(WANTED, steps=readers[0] if readers else WANTED.steps)
    assert name(wanted=replace(wanted, **{field.name: 0.5})) != name(wanted=wanted)


def test_the_name_of_a_run_stays_over_versions_of_the_code():
    """A CSV that an older version began is completed, not begun again."""
    assert name(words=["trainer.precision=32"]) == "b602e53edc9d"
