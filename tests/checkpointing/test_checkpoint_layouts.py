"""Hub folders: one file, shards, pickled weights; which algorithm they hold."""

import pytest
from checkpoint_helpers import MANIFEST, network
from hub_folders import (
    CONFIG,
    HUB_FOLDER,
    LAYOUTS,
    TENSORS,
    hub_config,
    hub_tensors,
    put,
    same_weights,
)

from checkpointing.layouts import CheckpointError, read_checkpoint
from checkpointing.load import build_backbone_args, load_into


@pytest.mark.parametrize("model_type", ["bd3lm", "bamdlm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hub_folder_loads_in_every_layout(layout, model_type, tmp_path):
    put(tmp_path, {**CONFIG, "model_type": model_type})
    LAYOUTS[layout](tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.algo == "bamdlm"
    assert checkpoint.block_size == CONFIG["block_size"]
    assert checkpoint.interval == read_checkpoint(HUB_FOLDER).interval
    assert len(checkpoint.weights) == len(TENSORS) - 2
    same_weights(checkpoint, TENSORS)


def test_a_single_safetensors_file_is_read_with_its_config():
    same_weights(read_checkpoint(HUB_FOLDER / "model.safetensors"), TENSORS)


@pytest.mark.parametrize("algo", ["mdlm", "sedd", "ar"])
def test_a_published_folder_of_each_algorithm_is_recognised(algo, tmp_path):
    tensors = hub_tensors(algo)
    checkpoint = read_checkpoint(put(tmp_path, hub_config(algo), tensors))
    assert checkpoint.algo == algo
    assert checkpoint.interval is None
    assert checkpoint.length == MANIFEST["length"]
    same_weights(checkpoint, tensors)


def test_a_folder_that_may_be_mdlm_or_sedd_loads_as_either(tmp_path):
    config = hub_config("sedd", time_conditioning=False)
    checkpoint = read_checkpoint(put(tmp_path, config, hub_tensors("sedd")))
    assert checkpoint.algorithms == ("mdlm", "sedd")
    assert checkpoint.algo is None
    for algo in checkpoint.algorithms:
        load_into(network(checkpoint), checkpoint, use_ema=True, algo=algo)


def test_the_interval_of_a_config_counts_unless_it_is_the_published_default(tmp_path):
    """Every published config.json says (0.001, 0.999), whatever the weights were trained with."""
    tensors = {k: v for k, v in TENSORS.items() if not k.startswith("sampling_eps")}
    assert read_checkpoint(put(tmp_path / "a", CONFIG, tensors)).interval is None
    changes = {"sampling_eps_min": 0.3, "sampling_eps_max": 0.8}
    assert read_checkpoint(put(tmp_path / "b", {**CONFIG, **changes}, tensors)).interval == (
        0.3,
        0.8,
    )


def test_a_published_config_may_state_the_default_of_its_class(tmp_path):
    """cond_dim 129 is what BD3LMConfig says when nobody says anything."""
    sizes = build_backbone_args(
        read_checkpoint(put(tmp_path, {**CONFIG, "cond_dim": 129}, TENSORS))
    )
    assert sizes["cond_dim"] == CONFIG["cond_dim"]


def test_sizes_come_from_the_weights_and_must_agree_with_the_config(tmp_path):
    for key, value in (("hidden_dim", 64), ("n_blocks", 7), ("n_heads", 1), ("vocab_size", 9)):
        checkpoint = read_checkpoint(put(tmp_path / key, {**CONFIG, key: value}, TENSORS))
        with pytest.raises(CheckpointError, match=f"contradicts itself: it states .* {value} but"):
            build_backbone_args(checkpoint)
