"""training.from_pretrained: which keys may be new, coming from which algorithm."""

import pytest
import torch
from checkpoint_helpers import (
    BY_ALGO,
    INFO,
    NAMES,
    network,
    path,
    unchanged_by,
    variant,
)
from conftest import load

from checkpointing.layouts import read_checkpoint
from checkpointing.load import load_pretrained
from models.masks import Causal

CONDITIONING = ("sigma_map.", "adaLN_modulation.")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("algo", BY_ALGO)
def test_exactly_the_stated_keys_are_new_when_finetuning(name, algo):
    checkpoint = read_checkpoint(path(name))
    net = network(read_checkpoint(path(BY_ALGO[algo])))
    from_ar, to_ar = checkpoint.algo == "ar", algo == "ar"
    if (to_ar and not from_ar) or (checkpoint.algo == "bamdlm" != algo):
        message = unchanged_by(net, lambda: load_pretrained(net, checkpoint, algo=algo))
        assert checkpoint.algo in message
        return
    expected = set()
    if algo == "bamdlm" and checkpoint.algo != "bamdlm":
        expected |= {"sampling_eps_min", "sampling_eps_max"}
    if from_ar and not to_ar:
        conditioning = [k for k in net.state_dict() if any(c in k for c in CONDITIONING)]
        expected |= {f"backbone.{key}" for key in conditioning}
    with torch.no_grad():
        for key, value in net.named_parameters():
            if "adaLN_modulation" in key:
                value.add_(1)  # even if the network was not fresh
    found = load_pretrained(net, checkpoint, algo=algo)
    assert set(found.new_keys) == expected
    for key, value in net.state_dict().items():
        if f"backbone.{key}" not in expected:
            assert torch.equal(value, checkpoint.weights[key])
        elif "adaLN_modulation" in key:
            assert not value.any()


@pytest.mark.parametrize("algo", BY_ALGO)
def test_the_average_of_a_finetuned_run_goes_by_name(algo):
    name = BY_ALGO[algo]
    target = algo if algo == "ar" else "bamdlm"
    checkpoint = read_checkpoint(path(name))
    net = network(read_checkpoint(path(BY_ALGO[target])))
    found = load_pretrained(net, checkpoint, algo=target)
    assert list(found.ema) == [key for key, _ in net.named_parameters()]
    assert found.ema_updates == INFO[name]["ema"]["num_updates"]
    for key, value in net.named_parameters():
        assert torch.equal(found.ema[key], checkpoint.ema.get(key, value))


def test_an_ar_network_made_a_block_diffusion_model_computes_what_it_did():
    """Modulations at zero change nothing: its hidden states under the causal rule are the AR's...

    ...but for the gates, which are zero too: every block starts as the identity.
    """
    checkpoint = read_checkpoint(path(BY_ALGO["ar"]))
    net = network(read_checkpoint(path(BY_ALGO["bamdlm"])))
    load_pretrained(net, checkpoint, algo="bamdlm")
    tokens = load(f"forward/{BY_ALGO['ar']}.safetensors")["x0"]
    with torch.no_grad():
        hidden = net.hidden(tokens, attention_mask=Causal())
    assert torch.equal(hidden, net.vocab_embed(tokens))


def test_an_ar_model_with_adaln_brings_its_modulation(tmp_path):
    """model.adaln=True: nothing of the backbone is new then."""

    def disguise(raw):
        raw["hyper_parameters"]["config"]["algo"]["name"] = "ar"
        raw["hyper_parameters"]["config"]["model"]["adaln"] = True

    checkpoint = read_checkpoint(variant(tmp_path, BY_ALGO["mdlm"], disguise))
    assert checkpoint.algo == "ar"
    net = network(checkpoint)
    assert load_pretrained(net, checkpoint, algo="mdlm").new_keys == ()


@pytest.mark.parametrize(
    "key", ["norm1.weight", "sigma_map.mlp.0.bias", "output_layer.linear.bias"]
)
def test_no_other_key_may_be_new(key):
    checkpoint = read_checkpoint(path(BY_ALGO["mdlm"]))
    missing = next(name for name in checkpoint.weights if name.endswith(key))
    del checkpoint.weights[missing]
    net = network(read_checkpoint(path(BY_ALGO["bamdlm"])))
    message = unchanged_by(net, lambda: load_pretrained(net, checkpoint, algo="bamdlm"))
    assert f"missing from the file (1): {missing}" in message
