"""Weights of published Lightning checkpoints: every key accounted for, or nothing loaded."""

import dataclasses

import pytest
import torch
from checkpoint_helpers import (
    BY_ALGO,
    INFO,
    MANIFEST,
    NAMES,
    close,
    loaded,
    logits,
    network,
    path,
    renamed,
    unchanged_by,
    variant,
)
from conftest import GOLDEN, load, load_json
from networks import loss_at
from torch import nn

from checkpointing.layouts import Checkpoint, CheckpointError, read_checkpoint, resolve
from checkpointing.load import build_backbone_args, load_into, say_untrained, trained_sizes
from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.sedd import ScoreEntropy

LOSSES = load_json("loss/index.json")["cases"]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_checkpoint_gives_the_recorded_logits(name):
    net, checkpoint = loaded(name, use_ema=False)
    recorded = load(f"forward/{name}.safetensors")
    tokens = recorded["input_ids"] if checkpoint.algo == "bamdlm" else recorded["xt"]
    if checkpoint.algo == "ar":
        tokens = recorded["x0"]
    found = logits(net, checkpoint, tokens, recorded.get("processed_sigma"))
    close(found, recorded["backbone_logits"])


def loss_case(name):
    """The first plain training step that was recorded with these weights."""
    return next(
        case
        for case, about in LOSSES.items()
        if about["checkpoint"] == name and about["training"] and not case.startswith("crop")
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_published_checkpoint_gives_the_recorded_loss(name):
    net, checkpoint = loaded(name, use_ema=False)
    case = loss_case(name)
    about, recorded = LOSSES[case], load(f"loss/{case}.safetensors")
    x0, mask_id = recorded["x0"], MANIFEST["mask_index"]
    if checkpoint.algo == "ar":
        loss = Autoregressive(mask_id).loss(net, x0, recorded["attention_mask_in"], training=True)
    else:
        x_t = recorded["model_input"][:, : x0.shape[1]]
        schedule = get_schedule("loglinear")
        loss_mask = recorded["attention_mask_in"].float()
        if checkpoint.algo == "sedd":
            objective = ScoreEntropy(mask_id, schedule)
            loss = loss_at(objective, net, x0, x_t, recorded["t"], loss_mask)
        else:
            block = checkpoint.block_size
            bounds = about["eps_argument"] or about["sampling_eps_buffers"] or (1e-3, 1.0)
            objective = MaskedDiffusion(mask_id, block, schedule)
            t = recorded["t"] if block == x0.shape[1] else recorded["t"][:, ::block]
            interval = tuple(map(float, bounds))
            loss = loss_at(objective, net, x0, x_t, t, loss_mask, interval=interval)
    close(loss.mean.detach(), recorded["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_the_average_is_put_under_the_names_of_the_parameters(name):
    net, checkpoint = loaded(name, use_ema=True)
    recorded = load(f"weights/{name}.safetensors")
    assert [f"backbone.{key}" for key in checkpoint.ema] == INFO[name]["ema_order"]
    for key, value in net.named_parameters():
        assert torch.equal(value, recorded[f"ema.backbone.{key}"])
    assert checkpoint.ema_updates == INFO[name]["ema"]["num_updates"]
    assert checkpoint.ema_decay == INFO[name]["ema"]["decay"]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_checkpoint_tells_about_its_run(name):
    checkpoint, info = read_checkpoint(path(name)), INFO[name]
    assert checkpoint.algo == info["algo"].replace("bd3lm", "bamdlm")
    assert (checkpoint.block_size, checkpoint.length) == (info["block_size"], info["length"])
    assert checkpoint.step == info["global_step"]
    assert checkpoint.interval == (tuple(info["sampling_eps"].values()) or None)
    sizes = build_backbone_args(checkpoint)
    assert sizes["vocab_size"] == info["vocab_size_with_mask"]
    for key in ("hidden_size", "n_blocks", "n_heads", "cond_dim"):
        assert sizes[key] == MANIFEST[key]
    assert sizes["adaln"] == (checkpoint.algo != "ar")


def without_resolvers(value):
    """A configuration less the values that come from resolvers (`${cwd:}`), which are not run."""
    if isinstance(value, dict):
        return {key: without_resolvers(item) for key, item in value.items()}
    return value


def test_interpolations_of_the_authors_config_are_filled_in_and_resolvers_left_alone():
    config = read_checkpoint(path(NAMES[0])).config
    recorded = INFO[NAMES[0]]["config"]
    for section in ("loader", "algo", "model", "training", "optim", "noise"):
        assert config[section] == recorded[section]
    assert config["sampling"]["logdir"] == recorded["sampling"]["logdir"]
    assert config["eval"]["checkpoint_path"] == "${cwd:}/checkpoints/last.ckpt"


def test_a_reference_that_leads_nowhere_or_in_a_circle_stays_as_written():
    config = {"a": "${b}", "b": "${a}", "c": "${no.such}", "d": "${.a} and ${e.f}", "e": {"f": 3}}
    found = resolve(config)
    assert found["c"] == "${no.such}"
    assert found["d"].endswith(" and 3")
    assert found["a"] in ("${a}", "${b}")


def test_the_plain_file_loads_without_a_configuration():
    """hyper_parameters are empty there: sizes come from the shapes, the algorithm from the keys."""
    name = "bd3lm_bs4_plain" if (GOLDEN / "checkpoints/bd3lm_bs4_plain.ckpt").exists() else None
    name = name or next(p.stem for p in (GOLDEN / "checkpoints").glob("*_plain.ckpt"))
    plain, full = read_checkpoint(path(name)), read_checkpoint(path(name.removesuffix("_plain")))
    assert plain.config == {}
    assert plain.algo == "bamdlm"
    assert {**build_backbone_args(full), "dropout": 0.1} == (build_backbone_args(plain))
    assert all(torch.equal(plain.weights[key], full.weights[key]) for key in full.weights)


# Variants of a file that must load too


COMPILED = {
    "the backbone": lambda key: key.replace("backbone.", "backbone._orig_mod."),
    "the module": lambda key: f"_orig_mod.{key}",
    "the blocks": lambda key: key.replace("blocks.0.", "blocks.0._orig_mod."),
}


@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("algo", BY_ALGO)
def test_a_compiled_checkpoint_loads_the_same_weights(what, algo, tmp_path):
    name = BY_ALGO[algo]
    file = variant(tmp_path, name, lambda raw: renamed(raw, COMPILED[what]))
    plain, compiled = read_checkpoint(path(name)), read_checkpoint(file)
    assert list(compiled.weights) == list(plain.weights)
    for use_ema in (False, True):
        net, same = network(plain), network(plain)
        load_into(net, plain, use_ema=use_ema, algo=algo)
        load_into(same, compiled, use_ema=use_ema, algo=algo)
        assert all(
            torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True)
        )


def test_bfloat16_weights_load_and_the_rotation_keeps_its_precision(tmp_path):
    name = BY_ALGO["bamdlm"]

    def halve(raw):
        state = raw["state_dict"].items()
        raw["state_dict"] = {key: value.bfloat16() for key, value in state}
        raw["ema"]["shadow_params"] = [p.bfloat16() for p in raw["ema"]["shadow_params"]]

    half = read_checkpoint(variant(tmp_path, name, halve))
    net, before = network(half), network(half)
    load_into(net, half, use_ema=True, algo="bamdlm")
    recorded = load(f"weights/{name}.safetensors")
    for key, value in net.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, recorded[f"ema.backbone.{key}"].bfloat16().float())
    assert torch.equal(net.rotary_emb.inv_freq, before.rotary_emb.inv_freq)


def test_a_run_without_ema_evaluates_its_weights(tmp_path):
    def strip(raw):
        del raw["ema"]
        raw["hyper_parameters"]["config"]["training"]["ema"] = 0

    checkpoint = read_checkpoint(variant(tmp_path, BY_ALGO["mdlm"], strip))
    net = network(checkpoint)
    load_into(net, checkpoint, use_ema=True, algo="mdlm")
    assert torch.equal(net.vocab_embed.embedding, checkpoint.weights["vocab_embed.embedding"])


def test_a_model_of_one_block_may_be_called_mdlm(tmp_path):
    def one_block(raw):
        config = raw["hyper_parameters"]["config"]
        config["block_size"] = config["model"]["length"]

    checkpoint = read_checkpoint(variant(tmp_path, BY_ALGO["bamdlm"], one_block))
    assert checkpoint.algorithms == ("bamdlm", "mdlm")
    load_into(network(checkpoint), checkpoint, use_ema=False, algo="mdlm")


# Nothing partial


@pytest.mark.parametrize("algo", BY_ALGO)
@pytest.mark.parametrize("other", BY_ALGO)
def test_another_algorithm_is_refused_and_named(algo, other):
    if algo == other:
        return
    checkpoint = read_checkpoint(path(BY_ALGO[algo]))
    net = network(read_checkpoint(path(BY_ALGO[other])))
    for use_ema in (False, True):
        message = unchanged_by(
            net, lambda use=use_ema: load_into(net, checkpoint, use_ema=use, algo=other)
        )
        assert f"holds {algo} weights" in message
        assert f"algo={other}" in message


SIZES = {
    "n_blocks": ({"n_blocks": MANIFEST["n_blocks"] + 1}, "model.n_blocks differs"),
    "fewer blocks": ({"n_blocks": MANIFEST["n_blocks"] - 1}, "model.n_blocks differs"),
    "hidden_size": (
        {"hidden_size": 2 * MANIFEST["hidden_size"]},
        f"model.hidden_size={MANIFEST['hidden_size']} in the file",
    ),
    "vocab_size": ({"vocab_size": MANIFEST["vocab_size"]}, "another vocabulary"),
    "cond_dim": ({"cond_dim": MANIFEST["cond_dim"] + 4}, "model.cond_dim differs"),
    "n_heads": ({"n_heads": 2 * MANIFEST["n_heads"], "hidden_size": None}, "model.n_heads differs"),
    "adaln": ({"adaln": False}, "model.adaln differs"),
}


@pytest.mark.parametrize("what", SIZES)
def test_another_size_is_refused_with_its_cause(what):
    changes, cause = SIZES[what]
    checkpoint = read_checkpoint(path(BY_ALGO["mdlm"]))
    changes = {key: value for key, value in changes.items() if value is not None}
    if what == "n_heads" and MANIFEST["hidden_size"] % (2 * changes["n_heads"]):
        changes = {"n_heads": 1}
    net = network(checkpoint, **changes)
    message = unchanged_by(net, lambda: load_into(net, checkpoint, use_ema=True, algo="mdlm"))
    assert cause in message
    assert ("model.adaln" in message) == (what == "adaln")
    assert "nothing was loaded" in message


@pytest.mark.parametrize(
    ("layout", "config", "sizes"),
    [
        ("lightning", {"block_size": 4, "training": {"block_sizes": {1: 0.5, 4: 0.5}}}, (1, 4)),
        ("lightning", {"block_size": 4, "training": {"block_sizes": None}}, (4,)),
        ("lightning", {"block_size": 4}, (4,)),  # of before there was the setting
        ("hub", {"block_size": 4, "block_sizes": [1, 4]}, (1, 4)),
        ("hub", {"block_size": 4}, (4,)),
        ("lightning", {}, ()),
    ],
)
def test_a_checkpoint_says_at_which_block_sizes_it_was_trained(layout, config, sizes, capsys):
    found = Checkpoint("here", layout, ("bamdlm",), config, weights={})
    assert trained_sizes(found, "bamdlm") == sizes
    assert trained_sizes(found, "mdlm") == ()
    say_untrained(sizes, [4, 16, 16])
    said = capsys.readouterr().out
    named = " and ".join(map(str, sizes))
    assert said == f"block_size=16: the network was trained at {named}\n" * bool(sizes)


@pytest.mark.parametrize("theirs", ["4", {"a": 1}, {0: 1}, 7])
def test_block_sizes_that_are_none_are_refused(theirs):
    config = {"block_size": 4, "training": {"block_sizes": theirs}}
    with pytest.raises(CheckpointError, match="block_sizes"):
        Checkpoint("here", "lightning", ("bamdlm",), config, weights={})


def test_an_error_shows_the_first_ten_keys_of_each_kind():
    checkpoint = read_checkpoint(path(BY_ALGO["bamdlm"]))
    weights = {f"blocks.{i + 7}.x": torch.zeros(1) for i in range(14)}
    weights["vocab_embed.embedding"] = torch.zeros(3, MANIFEST["hidden_size"])
    broken = dataclasses.replace(checkpoint, weights=weights, foreign={"noise.x": torch.zeros(1)})
    net = network(checkpoint)
    message = unchanged_by(net, lambda: load_into(net, broken, use_ema=False, algo="bamdlm"))
    missing = len(net.state_dict()) - 1
    assert f"missing from the file ({missing}): sigma_map.mlp.0.weight" in message
    assert f"and {missing - 10} more" in message
    assert "not in the network (15): blocks.7.x" in message
    assert "of another shape (1): vocab_embed.embedding [3, " in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("use_ema", [False, True])
def test_weights_that_are_not_numbers_are_refused(value, use_ema):
    checkpoint = read_checkpoint(path(BY_ALGO["sedd"]))
    source = checkpoint.ema if use_ema else checkpoint.weights
    source["output_layer.linear.bias"][3] = value
    net = network(checkpoint)
    message = unchanged_by(net, lambda: load_into(net, checkpoint, use_ema=use_ema, algo="sedd"))
    assert "NaN or infinite weights: output_layer.linear.bias" in message


def test_another_rotary_base_is_refused():
    checkpoint = read_checkpoint(path(BY_ALGO["ar"]))
    checkpoint.weights["rotary_emb.inv_freq"][1:] *= 0.9
    net = network(checkpoint)
    message = unchanged_by(net, lambda: load_into(net, checkpoint, use_ema=True, algo="ar"))
    assert "rotary base" in message


# The EMA list


def test_the_ema_list_and_its_names_are_inverse():
    checkpoint = read_checkpoint(path(NAMES[0]))
    shadow = checkpoint.raw["ema"]["shadow_params"]
    listed = list(checkpoint.ema.values())
    assert all(a is b for a, b in zip(listed, shadow, strict=True))


def test_a_compiled_network_takes_weights_too():
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self._orig_mod = net

    checkpoint = read_checkpoint(path(BY_ALGO["ar"]))
    net = network(checkpoint)
    load_into(Wrapped(net), checkpoint, use_ema=False, algo="ar")
    assert torch.equal(net.vocab_embed.embedding, checkpoint.weights["vocab_embed.embedding"])
