"""Checkpoints with contents of wrong kinds, shapes and numbers: whoever reads them says so."""

import copy

import pytest
import torch
from runs import ALGORITHMS, run, tiny
from tools import refused

import settings
from checkpointing.layouts import read_checkpoint
from checkpointing.load import build_backbone_args
from modes import build, build_data
from scripts import inspect_checkpoint
from training.resuming import check_resumable
from training.trainer import build_trainer, newest_complete

pytestmark = pytest.mark.filterwarnings("ignore")
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(the words of a run of two steps, its last checkpoint in plain containers)"""
    folder = tmp_path_factory.mktemp("good")
    words = [*tiny(folder), *ALGORITHMS["bamdlm"], "trainer.max_steps=2"]
    words.append("trainer.enable_progress_bar=false")
    code, text = run([*words, f"checkpointing.save_dir={folder / 'run'}"], folder / "log")
    assert code == 0, text
    return words, torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def run_of_it(good):
    """(module, trainer) of the same run."""
    config = settings.load(good[0])
    tokenizer = build_data.build_tokenizer(config)
    module = build.build_module(config, build.build_backbone(config, tokenizer, None), tokenizer)
    return module, build_trainer(config, loggers=[])


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- what can be wrong with the contents ------------------------------------------------------


def at(*keys, put):
    """A change of the value at a path of keys; `put`: the new one, or a function of the old."""

    def change(raw):
        node = raw
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = put(node[keys[-1]]) if callable(put) else put

    return change


def without(*keys):
    def change(raw):
        node = raw
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return change


ADAM = ("optimizer_states", 0)
STATE = (*ADAM, "state")
GROUPS = (*ADAM, "param_groups")
WEIGHT = "backbone.blocks.0.mlp.0.weight"
CONFIG = ("hyper_parameters", "config")


def expanded(value):
    return torch.zeros(1).expand(value.shape)


RESUMED = {
    "a moment of another shape": (at(*STATE, 0, "exp_avg", put=torch.zeros(3)), "optimizer"),
    "a moment that is too large": (
        at(*STATE, 1, "exp_avg_sq", put=lambda x: torch.zeros(4096, 4096)),
        "optimizer",
    ),
    "an empty moment": (at(*STATE, 0, "exp_avg", put=torch.zeros(0)), "optimizer"),
    "a moment of stride 0": (at(*STATE, 0, "exp_avg", put=expanded), "several places"),
    "moments that overlap": (
        at(
            *STATE,
            0,
            "exp_avg",
            put=lambda x: torch.zeros(x.numel() + 9).as_strided(x.shape, (1, 1)),
        ),
        "several places",
    ),
    "a transposed moment": (
        at(*STATE, 0, "exp_avg", put=lambda x: torch.zeros(*x.shape[::-1]).t()),
        "optimizer",
    ),
    "whole moments": (at(*STATE, 0, "exp_avg", put=lambda x: x.long()), "optimizer"),
    "complex moments": (at(*STATE, 0, "exp_avg", put=lambda x: x.bool()), "optimizer"),
    "half a moment": (at(*STATE, 0, "exp_avg", put=lambda x: x.half()), "optimizer"),
    "a moment of text": (at(*STATE, 0, "exp_avg", put="text"), "optimizer"),
    "no moment": (without(*STATE, 0, "exp_avg"), "optimizer"),
    "moments of a list": (at(*STATE, 0, put=[1, 2]), "optimizer"),
    "a moment of nobody": (at(*STATE, 0, "max_exp_avg_sq", put=torch.zeros(2)), "optimizer"),
    "a step of text": (at(*STATE, 0, "step", put="2"), "optimizer"),
    "steps in a row": (at(*STATE, 0, "step", put=torch.zeros(4)), "optimizer"),
    "a parameter more": (at(*STATE, put=lambda s: {**s, 999: s[0]}), "optimizer"),
    "a parameter of text": (at(*STATE, put=lambda s: {**s, "x": s[0]}), "optimizer"),
    "a parameter less": (without(*STATE, 0), "optimizer"),
    "states of a list": (at(*STATE, put=[]), "optimizer"),
    "no states": (without(*STATE), "optimizer"),
    "no optimizer": (without("optimizer_states"), "optimizer"),
    "an optimizer of a dict": (at("optimizer_states", put={}), "optimizer"),
    "an optimizer of text": (at("optimizer_states", put=["Adam"]), "optimizer"),
    "two optimizers": (at("optimizer_states", put=lambda x: x * 2), "optimizer"),
    "groups of text": (at(*GROUPS, put="groups"), "optimizer"),
    "no groups": (at(*GROUPS, put=[]), "optimizer"),
    "two groups": (at(*GROUPS, put=lambda g: g * 2), "optimizer"),
    "a group of a list": (at(*GROUPS, 0, put=[1]), "optimizer"),
    "a group of fewer": (at(*GROUPS, 0, "params", put=[0, 1]), "optimizer"),
    "a group of one twice": (at(*GROUPS, 0, "params", put=lambda p: [0] * len(p)), "optimizer"),
    "a group of names": (at(*GROUPS, 0, "params", put=lambda p: list(map(str, p))), "optimizer"),
    "a rate of text": (at(*GROUPS, 0, "lr", put="0.1"), "optimizer"),
    "a rate of NaN": (at(*GROUPS, 0, "lr", put=float("nan")), "optimizer"),
    "a rate of 5 000 digits": (at(*GROUPS, 0, "lr", put=10**5000), "128 bits"),
    "three betas": (at(*GROUPS, 0, "betas", put=(0.9, 0.9, 0.9)), "optimizer"),
    "betas of text": (at(*GROUPS, 0, "betas", put="ab"), "optimizer"),
    "no rate": (without(*GROUPS, 0, "lr"), "optimizer"),
    "another optimizer": (at(*GROUPS, 0, put=lambda g: {**g, "amsgrad": True}), "optimizer"),
    "capturable": (at(*GROUPS, 0, "capturable", put="yes"), "optimizer"),
    "a step of text in the file": (at("global_step", put="2"), "global_step"),
    "a step of a list": (at("global_step", put=[2]), "global_step"),
    "a step below zero in the file": (at("global_step", put=-2), "global_step"),
    "half a step": (at("global_step", put=1.5), "global_step"),
    "a step of True": (at("global_step", put=True), "global_step"),
    "no step": (without("global_step"), "global_step"),
    "a step of 5 000 digits": (at("global_step", put=10**5000), "128 bits"),
    "an epoch of text": (at("epoch", put="0"), "epoch"),
    "no epoch": (without("epoch"), "epoch"),
    "loops of text": (at("loops", put="loops"), "loops"),
    "no loops": (without("loops"), "loops"),
    "empty loops": (at("loops", put={}), "loops"),
    "a loop of a list": (at("loops", "fit_loop", put=[]), "loops"),
    "counters of text": (
        at("loops", "fit_loop", "epoch_loop.batch_progress", put="x"),
        "loops",
    ),
    "totals of text": (
        at("loops", "fit_loop", "epoch_loop.val_loop.batch_progress", "total", put="x"),
        "loops",
    ),
    "callbacks of a list": (at("callbacks", put=[1]), "callbacks"),
    "a callback of text": (
        at("callbacks", put=lambda c: dict.fromkeys(c, "state")),
        "callbacks",
    ),
    "schedules of text": (at("lr_schedulers", put="x"), "lr_schedulers"),
    "a schedule of text": (at("lr_schedulers", put=["x"]), "lr_schedulers"),
    "two schedules": (at("lr_schedulers", put=lambda x: x * 2), "lr_schedulers"),
    "a schedule of another kind": (
        at("lr_schedulers", 0, "last_epoch", put="text"),
        "lr_schedulers",
    ),
    "a schedule without base": (at("lr_schedulers", 0, "base_lrs", put=[]), "lr_schedulers"),
    "the authors' schedule alone": (
        at("lr_schedulers", put=[{"base_values": 3}]),
        "lr_schedulers",
    ),
    "a version of a list": (at("pytorch-lightning_version", put=[2]), "version"),
    "a strange version": (at("pytorch-lightning_version", put="two.zero"), "version"),
    "no version": (without("pytorch-lightning_version"), "version"),
    "a bound of text": (at("sampling_eps_min", put="0"), "sampling_eps"),
    "bounds in a row": (at("sampling_eps_min", put=torch.zeros(3)), "sampling_eps"),
    "a bound of NaN": (at("sampling_eps_max", put=torch.tensor(torch.nan)), "sampling_eps"),
    "no bound": (without("sampling_eps_min"), "sampling_eps"),
    "a sampler of a list": (at("sampler", put=[1]), "sampler"),
    "a place of text": (at("sampler", "examples_seen", put="8"), "examples_seen"),
    "a place below zero": (at("sampler", "examples_seen", put=-8), "examples_seen"),
    "settings of a list": (at("hyper_parameters", put=[1]), "settings"),
    "settings of text": (at(*CONFIG, put="settings"), "settings"),
    "no settings": (without("hyper_parameters"), "settings"),
    "an average of text": (at("ema", put="average"), "ema"),
    "an average of other shapes": (
        at("ema", "shadow_params", put=lambda s: [torch.zeros(2)] * len(s)),
        "EMA does not fit",
    ),
    "an average of words": (
        at("ema", "shadow_params", put=lambda s: ["x"] * len(s)),
        "EMA",
    ),
    "a short average": (at("ema", "shadow_params", put=lambda s: s[:2]), "EMA has 2 tensors"),
    "an average of whole numbers": (
        at("ema", "shadow_params", put=lambda s: [x.long() for x in s]),
        "EMA",
    ),
    "a decay of text": (at("ema", "decay", put="0.9"), "ema"),
    "updates of text": (at("ema", "num_updates", put="2"), "ema"),
    "updates below zero": (at("ema", "num_updates", put=-11), "ema"),
}

NUMBERS = {  # which only the file's own numbers tell
    "a step of NaN": (at(*STATE, 0, "step", put=torch.tensor(torch.nan)), "counts nan steps"),
    "a step below zero": (at(*STATE, 0, "step", put=torch.tensor(-2.0)), "counts -2.0 steps"),
}

READ = {
    "a name of escape sequences": (at("state_dict", ESCAPE, put=torch.zeros(2)), "not in the net"),
    "half a pair in a name": (at("state_dict", "\ud800", put=torch.zeros(2)), "not in the network"),
    "weights of a list": (at("state_dict", put=[1]), "state_dict"),
    "a weight of text": (at("state_dict", WEIGHT, put="text"), "not tensors"),
    "a name of a number": (at("state_dict", 3, put=torch.zeros(2)), "3"),
    "a weight of stride 0": (at("state_dict", WEIGHT, put=expanded), "several places"),
    "a weight of 2^50 numbers": (
        at("state_dict", WEIGHT, put=lambda x: torch.zeros(1).expand(1 << 25, 1 << 25)),
        "several places",
    ),
    "a vocabulary of 2^40": (
        at("state_dict", "backbone.vocab_embed.embedding", put=torch.zeros(1).expand(1 << 40, 16)),
        "several places",
    ),
    "complex weights": (at("state_dict", WEIGHT, put=lambda x: x.long()), "not floating point"),
    "an interval of text": (at("state_dict", "sampling_eps_min", put="x"), "tensors"),
    "an interval of NaN": (
        at("state_dict", "sampling_eps_min", put=torch.tensor(torch.nan)),
        "sampling_eps",
    ),
    "an algorithm of a list": (at(*CONFIG, "algo", "name", put=["ar"]), "algo"),
    "a block of text": (at(*CONFIG, "block_size", put="four"), "block_size"),
    "a length of a list": (at(*CONFIG, "model", "length", put=[16]), "length"),
    "a width of text": (at(*CONFIG, "model", "hidden_size", put="wide"), "hidden_size"),
}


def saved(raw: dict, change) -> str:
    raw = copy.deepcopy(raw)
    change(raw)
    torch.save(raw, "x.ckpt")
    return "x.ckpt"


def test_a_file_without_its_step_gives_way_to_one_with_it(good, tmp_path):
    words, raw = good
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    torch.save(raw, folder / "step=2.ckpt")
    torch.save({k: v for k, v in raw.items() if k != "global_step"}, folder / "last.ckpt")
    config = settings.load([*words, f"checkpointing.save_dir={tmp_path / 'run'}"])
    assert newest_complete(config.checkpointing).source == f"{folder}/step=2.ckpt"


def test_what_is_right_is_right(good, run_of_it):
    check_resumable(read_checkpoint(saved(good[1], lambda raw: None)), *run_of_it)


@pytest.mark.parametrize(("change", "message"), RESUMED.values(), ids=RESUMED)
def test_no_run_goes_on_from_it(change, message, good, run_of_it):
    path = saved(good[1], change)
    refused(lambda: check_resumable(read_checkpoint(path), *run_of_it), path, message)


THROUGH = ("a moment of another shape", "a step of NaN", "a step of text", "empty loops")


@pytest.mark.usefixtures("_launch_folder")
@pytest.mark.parametrize("what", THROUGH)
def test_the_command_line_says_it(what, good):
    change, message = (RESUMED | NUMBERS)[what]
    path = saved(good[1], change)
    more = ["checkpointing.save_dir=run", f"checkpointing.resume_ckpt_path={path}"]
    writes = ["run", "run/*"] if what in NUMBERS else []
    said = refused([*good[0], "trainer.max_steps=4", *more], message, writes=writes)
    assert "resumed" in said


@pytest.mark.parametrize(("change", "message"), READ.values(), ids=READ)
def test_nothing_reads_it(change, message, good, run_of_it):
    path = saved(good[1], change)

    def read():
        checkpoint = read_checkpoint(path)
        build_backbone_args(checkpoint)
        build.load_into(run_of_it[0].backbone, checkpoint, use_ema=True, algo="bamdlm")

    refused(read, path, message)


PRINTED = {
    "a corpus of escape sequences": (at(*CONFIG, "data", "train", put=ESCAPE), ""),
    "a key of escape sequences": (at(ESCAPE, put=1), ""),
    "half a pair in a key": (at("\ud800", put=1), ""),
}


@pytest.mark.parametrize("what", [*RESUMED, *READ, *PRINTED])
def test_the_inspector_says_what_it_can(what, good, capsys):
    change, _ = (RESUMED | READ | PRINTED)[what]
    code = inspect_checkpoint.main([saved(good[1], change), "--keys", "--config"])
    said = capsys.readouterr()
    assert code == 0 or (code == 2 and len(said.err.splitlines()) == 1)
    assert all(each.isprintable() or each in " \n" for each in said.out + said.err)
