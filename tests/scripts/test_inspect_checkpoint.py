"""scripts/inspect_checkpoint.py tells what is inside."""

import pytest
import torch
from checkpoint_helpers import BY_ALGO, INFO, MANIFEST, NAMES, path, variant
from conftest import GOLDEN

from scripts import inspect_checkpoint


def shown(capsys, *arguments):
    code = inspect_checkpoint.main([str(a) for a in arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[:18].strip(): line[18:] for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_it_tells_layout_algorithm_sizes_steps_average_interval_and_keys(name, capsys):
    code, facts = shown(capsys, path(name))
    info = INFO[name]
    assert code == 0
    assert facts["layout"] == "Lightning checkpoint"
    assert facts["algorithm"] == info["algo"].replace("bd3lm", "bamdlm")
    assert facts["block size"] == str(info["block_size"])
    assert facts["optimizer steps"] == str(info["global_step"])
    assert f"hidden_size {MANIFEST['hidden_size']}" in facts["network"]
    assert f"{info['ema']['num_updates']} updates" in facts["average (EMA)"]
    bounds = info["sampling_eps"].values()
    assert facts["clipped interval"].startswith(f"{min(bounds):.6g} to" if bounds else "none")
    count = len([key for key in info["state_dict_keys"] if key.startswith("backbone.")])
    assert facts["keys"] == f"{count} of the network"
    assert facts["finite"] == "all weights"


def test_it_names_the_block_sizes_of_a_network_of_several(capsys, tmp_path):
    def of_several(raw):
        config = raw["hyper_parameters"]["config"]
        config["training"] = dict(config["training"]) | {"block_sizes": {1: 0.5, 4: 0.5}}

    _, facts = shown(capsys, variant(tmp_path, BY_ALGO["bamdlm"], of_several))
    assert facts["block size"].endswith(" (trained at 1 and 4)")


def test_it_reads_hub_folders(capsys):
    code, facts = shown(capsys, GOLDEN / "hf_export")
    assert code == 0
    assert facts["layout"] == "hub folder"
    assert facts["average (EMA)"] == "the weights are averages already"


def test_it_lists_keys_and_the_configuration(capsys):
    inspect_checkpoint.main([str(path(NAMES[0])), "--keys", "--config"])
    out = capsys.readouterr().out
    for key in INFO[NAMES[0]]["state_dict_keys"]:
        assert key in out or key.startswith("sampling_eps")
    assert '"parameterization": "subs"' in out


def test_it_names_what_is_broken(capsys, tmp_path):
    def break_it(raw):
        raw["state_dict"]["backbone.output_layer.linear.bias"][0] = torch.nan
        raw["ema"]["shadow_params"].pop()

    _, facts = shown(capsys, variant(tmp_path, BY_ALGO["mdlm"], break_it))
    assert facts["finite"] == "NO: output_layer.linear.bias"
    assert facts["average (EMA)"].startswith("broken: the EMA has")
    assert inspect_checkpoint.main([str(tmp_path / "none.ckpt")]) == 2
    assert "does not exist" in capsys.readouterr().err
