"""mode=demo before its page is served: what is refused, and what the page offers."""

import functools
import re
import socket

import pytest
from conftest import GOLDEN
from networks import CHECKPOINTS
from runs import ends_with_2

import settings
from checkpointing.layouts import read_checkpoint
from modes import demo
from settings.rules import sampling
from settings.tables import step_numbers, step_rules

TOKENIZER = f"data.tokenizer_name_or_path={GOLDEN / 'tokenizer'}"
BLOCKS = GOLDEN / CHECKPOINTS["bd3lm_bs4"]["file"]


def command(path=BLOCKS, *words):
    return ["mode=demo", f"eval.checkpoint_path={path}", TOKENIZER, *words]


@pytest.fixture
def with_gradio(monkeypatch):
    """As if it were installed: nothing here comes so far as to need it."""
    monkeypatch.setattr(sampling, "has_package", lambda name: True)


@functools.cache
def configured(*words):
    return settings.load(command(BLOCKS, *words))


def page_of(name, *words):
    config, found = configured(*words), read_checkpoint(GOLDEN / CHECKPOINTS[name]["file"])
    return demo.build_page(config, found, demo.load_writer(config, found))


def test_without_gradio_the_way_to_it_is_named_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(sampling, "has_package", lambda name: name != "gradio")
    monkeypatch.setattr(demo, "read_checkpoint", None)
    said = ends_with_2(command(), capsys)
    assert "mode=demo: the package gradio is not installed; run pip install -r" in said
    assert "requirements-demo.txt" in said
    assert len(said.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("demo.port=70000", "demo.port=70000 must be at least 0 and at most 65535"),
        ("demo.port=-1", "demo.port=-1 must be at least 0"),
        ("demo.port=web", "demo.port=web must be a whole number"),
        ("demo.host=a..b", "demo.host=a..b, demo.port=7860: no page can be served"),
        ("demo.host=192.0.2.1", "demo.host=192.0.2.1, demo.port=7860: no page can be served"),
        ("demo.host=", "demo.host= is empty: 127.0.0.1 is this machine alone"),
        ("eval.checkpoint_path=no.ckpt", "eval.checkpoint_path=no.ckpt does not exist"),
        ("algo=ar", "holds bamdlm weights"),
    ],
)
def test_what_cannot_be_served_is_one_line(word, expected, capsys, with_gradio):
    said = ends_with_2([*command(), word], capsys)
    assert len(said.strip().splitlines()) == 2, said
    assert re.search(expected, said), said


def test_a_port_in_use_is_said_before_the_checkpoint_is_read(capsys, with_gradio, monkeypatch):
    monkeypatch.setattr(demo, "read_checkpoint", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = ends_with_2(command(BLOCKS, f"demo.port={port}"), capsys)
    assert f"demo.port={port}: no page can be served there (Address already in use)" in said
    assert "demo.port=0 for any that is free" in said


def test_port_0_is_any_that_is_free():
    with demo.listen("127.0.0.1", 0) as one, demo.listen("127.0.0.1", 0) as two:
        assert 0 != one.getsockname()[1] != two.getsockname()[1]


def test_the_page_offers_every_rule_and_every_number_of_the_tables():
    found = {c.field: c for c in page_of("bd3lm_bs4").controls}
    assert found["steps"].names == tuple(step_rules())
    read = {name for entry in step_rules().values() for name in entry.get("reads", ())}
    assert found.keys() == {"steps", "nucleus_p", "seed"} | read | step_numbers().keys()
    for name in read:
        rules = {rule for rule, e in step_rules().items() if name in e.get("reads", ())}
        assert set(found[name].rules) == rules
    assert all(c.about and (c.names or c.limit) for c in found.values())
    assert all(c.read(c.default) == c.default for c in found.values())


def test_each_algorithm_has_what_it_reads():
    numbers = {"temperature", "top_k", "nucleus_p", "seed"}
    assert {c.field for c in page_of("ar").controls} == numbers
    assert {c.field for c in page_of("sedd").controls} == numbers | {"num_steps"}
    whole, part = page_of("mdlm"), page_of("mdlm", "block_size=8", "model.length=64")
    assert {c.field: c.default for c in whole.controls}["window"] == 32
    assert {c.field: c.default for c in part.controls}["window"] == 8
    assert not page_of("ar").can_infill
    assert whole.can_infill


def test_the_page_writes_in_blocks_of_any_size_with_a_note(capsys):
    page = page_of("bd3lm_bs4", "block_size=8")
    assert "block_size=8: the network was trained at 4\n" in capsys.readouterr().out
    assert "algo=bamdlm of block_size=8, texts" in page.about
    assert page.writer.denoise.block_size == page.writer.params.block_size == 8


def test_settings_that_nothing_reads_are_noted(with_gradio):
    words = ["sampling.batch_size=4", "sampling.k=2", "model.n_blocks=3", "trainer.precision=bf16"]
    _, problems, notes = settings.examine(command(BLOCKS, *words, "algo.T=8", "demo.port=0"))
    assert problems == []
    said = {note.partition(" has no effect: mode=demo ")[0] for note in notes}
    assert said == {"sampling.batch_size", "model.n_blocks", "trainer.precision"}


def test_the_page_begins_with_the_settings_of_the_command():
    page = page_of(
        *("bd3lm_bs4", "model.length=24", "sampling.temperature=0.5", "sampling.steps=threshold"),
        *("seed=7", "sampling.prompt=the work"),
    )
    found = {c.field: c.default for c in page.controls}
    assert (found["temperature"], found["steps"], found["seed"]) == (0.5, "threshold", 7)
    assert page.prompt == "the work"
    assert page.length.default == page.length.read(24) == 24
    with pytest.raises(ValueError, match=r"model.length=25 must be at least 1 and at most 24"):
        page.length.read(25)
