"""A checkpoint writes in three lines."""

import pytest
import torch
from conftest import GOLDEN
from networks import CHECKPOINTS, MANIFEST

from checkpointing import torch_file
from checkpointing.layouts import Checkpoint
from evaluation.judge import load_judge
from noise_schedule import get_schedule
from objectives.algorithms import build_objective
from sampling.notebook import load, objective_settings

TOKENIZER = str(GOLDEN / "tokenizer")


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_every_recorded_checkpoint_writes(name):
    writer = load(GOLDEN / CHECKPOINTS[name]["file"], tokenizer=TOKENIZER, num_steps=4)
    out = writer.generate(["the work", "any"], nucleus_p=0.9)
    assert out.texts[0].startswith("<|endoftext|>the work")
    assert out.texts[1].startswith("<|endoftext|>any")
    assert {len(s.tokens) for s in out.samples} == {MANIFEST["length"]}
    assert all(0 < score.entropy < 4 for score in out.scores)
    assert writer.generate("any", seed=2).texts != writer.generate("any", seed=3).texts


def test_an_exported_folder_writes_longer_than_it_was_trained():
    writer = load(GOLDEN / "hf_export", tokenizer=TOKENIZER)
    (sample,) = writer.generate(length=2 * MANIFEST["length"]).samples
    assert sample.nfe == 2 * MANIFEST["length"] - 1
    assert writer.params.kv_cache


def test_a_block_size_may_divide_neither_the_length_of_training_nor_1024():
    made = load(GOLDEN / "hf_export", tokenizer=TOKENIZER, block_size=3)
    (sample,) = made.generate(length=MANIFEST["length"] // 3 * 6).samples
    assert made.params.context_size % 3 == 0
    assert made.params.context_size > MANIFEST["length"] - 3
    assert (sample.tokens != made.tokenizer.mask_id).all()


def test_any_block_size_writes_and_is_named_where_it_was_not_trained(capsys):
    """The recorded network was trained at 4. Asked at 8 it writes what it does where it is loaded
    at 8, with and without the cache."""
    path = GOLDEN / CHECKPOINTS["bd3lm_bs4"]["file"]
    note = "block_size=8: the network was trained at 4\n"
    writer = load(path, tokenizer=TOKENIZER, temperature=0.0, steps="confidence")
    assert "block_size" not in capsys.readouterr().out
    ours = writer.generate("the work", block_size=8)
    assert capsys.readouterr().out == note
    wide = load(path, tokenizer=TOKENIZER, block_size=8)
    assert capsys.readouterr().out == note
    for cache in (True, False):
        same = {"temperature": 0.0, "steps": "confidence", "kv_cache": cache}
        assert wide.generate("the work", **same).texts == ours.texts
    assert ours.texts != writer.generate("the work").texts
    assert wide.scorer.block_size == 8
    assert len(writer.generate(block_size=5, length=40).samples[0].tokens) == 40


def test_gaps_are_filled_and_a_judge_may_be_asked():
    writer = load(GOLDEN / CHECKPOINTS["mdlm"]["file"], tokenizer=TOKENIZER)
    judge = load_judge(str(GOLDEN / "judge"))
    out = writer.generate("the [MASK] work", infill=True, judge=judge)
    assert out.texts[0].startswith("<|endoftext|>the")
    assert out.texts[0].endswith(" work")
    assert out.scores[0].perplexity > 1


def test_the_schedule_is_the_one_of_the_training():
    run = {"noise": {"type": "cosine"}, "algo": {"mdlm_loss_scale": False}}
    export = {"noise": "loglinear", "mdlm_loss_scale": True}
    for layout, config, expected in (
        ("lightning", run, ("cosine", False)),
        ("hub", export, ("loglinear", True)),
        ("hub", {"noise": "square"}, ("square", False)),
        ("lightning", {}, ("loglinear", False)),
    ):
        found = Checkpoint("here", layout, ("sedd",), config, weights={})
        assert objective_settings(found, 3, 1).schedule == get_schedule(*expected)


@pytest.mark.parametrize("timed", [True, False])
def test_sedd_is_told_the_noise_level_as_in_its_training(timed):
    run = {"algo": {"time_conditioning": timed}}
    for layout, config in (("lightning", run), ("hub", run["algo"])):
        found = Checkpoint("here", layout, ("sedd",), config, weights={})
        objective = build_objective("sedd", objective_settings(found, 3, 1))
        assert objective.time_conditioning == timed


def test_averages_are_used_unless_told_otherwise():
    path = GOLDEN / CHECKPOINTS["ar"]["file"]
    averaged = load(path, tokenizer=TOKENIZER).denoise.backbone.output_layer.linear.weight
    raw = load(path, tokenizer=TOKENIZER, use_ema=False).denoise.backbone.output_layer.linear.weight
    assert not torch.equal(averaged, raw)


def test_raw_weights_are_not_taken_for_averages(tmp_path):
    """Refused as by a command line; use_ema=False takes them."""
    with (GOLDEN / CHECKPOINTS["ar"]["file"]).open("rb") as file:
        raw = torch_file.load(file, "ar")
    del raw["ema"]
    torch.save(raw, tmp_path / "raw.ckpt")
    with pytest.raises(ValueError, match=r"raw.ckpt has no averaged weights .*use_ema=False"):
        load(tmp_path / "raw.ckpt", tokenizer=TOKENIZER)
    assert load(tmp_path / "raw.ckpt", tokenizer=TOKENIZER, use_ema=False).generate("any").texts


def test_what_the_file_does_not_fit_is_said(tmp_path):
    with pytest.raises(ValueError, match="give the one it was trained with as tokenizer="):
        load(GOLDEN / CHECKPOINTS["ar"]["file"], tokenizer="text8")
    with pytest.raises(ValueError, match="cannot be used here"):
        load(GOLDEN / CHECKPOINTS["ar"]["file"], tokenizer=TOKENIZER, algo="mdlm", block_size=4)
    with pytest.raises(ValueError):
        load(tmp_path / "none.ckpt", tokenizer=TOKENIZER)


def test_options_that_there_are_not_or_that_cannot_be_are_named():
    path = GOLDEN / CHECKPOINTS["mdlm"]["file"]
    with pytest.raises(ValueError, match="no option warmth; the options are length, "):
        load(path, tokenizer=TOKENIZER, warmth=0.7)
    writer = load(path, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="no option max_length, top_p; the options are length, "):
        writer.generate("any", top_p=0.9, max_length=9)
    with pytest.raises(ValueError, match="nucleus_p=0 must be in"):
        writer.generate("any", nucleus_p=0)
    for rule in ("var_length", "reject_low_entropy"):
        with pytest.raises(ValueError, match=f"{rule}=True has no place beside sampling.infill"):
            writer.generate("the [MASK] work", infill=True, **{rule: True})
    ar = load(GOLDEN / CHECKPOINTS["ar"]["file"], tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="not by algo=ar"):
        ar.generate("the [MASK] work", infill=True)
