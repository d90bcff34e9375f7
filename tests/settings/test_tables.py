"""The tables that the settings read from source are those that the code uses."""

import importlib
import re
from dataclasses import fields
from functools import partial

import pytest

from data.corpora import CORPORA
from models.attention import BACKENDS
from noise_schedule import SCHEDULES
from objectives.algorithms import get_algorithm
from samplers.params import RANGES, SamplingParams, in_range
from samplers.steps import CONFIDENCES, STEPS
from samplers.writing import SAMPLERS
from settings import tables
from settings.keys import LEAVES, choices, groups
from settings.limits import BY_WORDS
from settings.page import PAGE, page
from settings.sections.inference import _step_number
from training.logged import LOGGED
from training.lr_schedules import LR_SCHEDULES

TABLES = [
    (tables.schedules, SCHEDULES),
    (tables.step_rules, STEPS),
    (tables.confidences, CONFIDENCES),
    (tables.attention_backends, BACKENDS),
    (tables.lr_schedules, LR_SCHEDULES),
    (tables.known_corpora, CORPORA),
    (tables.logged_figures, LOGGED),
]


@pytest.mark.parametrize(
    ("read", "imported"),
    TABLES,
    ids=lambda value: value.args[1] if isinstance(value, partial) else "",
)
def test_a_table_read_from_source_is_the_one_imported(read, imported):
    assert list(read()) == list(imported)
    for name, keywords in read().items():
        for keyword, value in keywords.items():
            if keyword in vars(imported[name]):  # else the entry is made by a function
                assert getattr(imported[name], keyword) == value


def test_the_numbers_of_step_rules_are_the_settings_of_that_name():
    found = {field.name: field for field in fields(SamplingParams) if field.metadata}
    assert tables.step_numbers().keys() == found.keys() >= {"k", "threshold", "remask_eta"}
    for name, field in found.items():
        leaf = LEAVES[f"sampling.{name}"]
        assert (leaf.hint, leaf.default, leaf.doc, leaf.limit.words) == (
            field.type,
            field.default,
            field.metadata["doc"],
            field.metadata["limit"],
        )
        for value in (-1, 0, 0.5, 1, 1.5, 2):
            assert leaf.limit.holds(value) == in_range(leaf.limit.words, value)


def test_a_type_or_limit_of_a_step_number_that_is_unknown_is_named():
    number = {"type": "int", "limit": "at least 1", "doc": "", "default": 1}
    assert set(BY_WORDS) == set(RANGES)
    for change, named in (
        ({"type": "str"}, "the type of jump must be one of 'int', 'float', got 'str'"),
        ({"limit": "odd"}, "the limit of jump must be one of 'at least 0', .* got 'odd'"),
    ):
        with pytest.raises(ValueError, match=named):
            _step_number("jump", number | change)


def test_literal_keywords_are_read_and_others_left_out():
    assert tables.known_corpora()["text8-crop"]["windows"]
    assert "archive" not in tables.known_corpora()["lm1b"]
    assert tables.schedules()["square"] == {}


def test_the_algorithms_are_those_of_the_objectives_with_every_literal_field():
    for name, entry in tables.algorithms().items():
        theirs = vars(get_algorithm(name)) | {"can": SAMPLERS[entry["writes"]].can}
        assert entry == {field: value for field, value in theirs.items() if field != "build"}
    assert set(tables.algorithms()) | {"bd3lm"} == set(choices("algo"))


def test_a_mode_is_a_file_with_a_function_prepare():
    modes = tables.modes()
    assert next(iter(modes)) == "train"
    assert modes.keys() >= {"train", "ppl_eval", "sample_eval", "plan", "prepare"}
    for name, line in modes.items():
        assert callable(importlib.import_module(f"modes.{name}").prepare)
        assert line[0].islower()


def test_what_is_no_literal_table_is_refused():
    with pytest.raises(ValueError, match=r"settings/limits.py: SEED must be a literal dict"):
        tables.table("settings/limits.py", "SEED")
    with pytest.raises(ValueError, match=r"settings/limits.py: NOWHERE must be a literal dict"):
        tables.table("settings/limits.py", "NOWHERE")


def test_every_schedule_has_its_file_of_settings():
    assert set(choices("noise")) == set(LEAVES["noise.type"].limit.names)


def test_the_page_of_settings_is_the_one_made_from_the_schema():
    """Where this fails: python -m settings.page. What a new entry adds may still be missing."""
    names = {name for group in groups() for name in choices(group)} | set(tables.modes())
    names |= {name for leaf in LEAVES.values() if leaf.limit for name in leaf.limit.names}
    written, made = PAGE.read_text(encoding="utf-8"), page()
    added = [rf"(?<![\w-])`?{name}`?, |, `?{name}`?(?![\w-])" for name in map(re.escape, names)]
    added += [rf"- `mode={name}`.*\n" for name in tables.modes()]
    added += [rf"\| `sampling.{name}` .*\n" for name in tables.step_numbers()]
    added += [rf"\| `{re.escape(name)}` \| .*\n" for name in tables.logged_figures()]
    for pattern in added:
        if not re.search(pattern, written):
            made = re.sub(pattern, "", made)
    assert written == made
