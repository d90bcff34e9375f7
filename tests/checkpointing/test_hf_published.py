"""The recorded hub folder, natively and by the transformers class: the recorded outputs."""

import torch
from checkpoint_helpers import close, network
from conftest import GOLDEN, load, load_json

from checkpointing.layouts import read_checkpoint
from checkpointing.load import load_into
from models.hf import BD3LM
from models.masks import BlockCausal

GOLDEN_CONFIG = load_json("hf_export/config.json")
RECORDED = load("hf_export/golden.safetensors")


def golden_network():
    checkpoint = read_checkpoint(GOLDEN / "hf_export")
    net = network(checkpoint)
    load_into(net, checkpoint, use_ema=True, algo="bamdlm")
    return net, checkpoint


def test_the_published_folder_loads_natively_and_gives_the_recorded_logits():
    net, checkpoint = golden_network()
    assert checkpoint.algo == "bamdlm"
    assert checkpoint.length == GOLDEN_CONFIG["model_length"]
    mask = BlockCausal(checkpoint.block_size)
    with torch.no_grad():
        for key in [key for key in RECORDED if key.startswith("sample.") and "input_ids" in key]:
            found = net.logits(net.hidden(RECORDED[key], attention_mask=mask))
            close(found, RECORDED[key.replace("input_ids", "logits")])


def test_the_published_folder_gives_the_recorded_cached_logits():
    """Also past the window, where the oldest blocks have left the cache."""
    net, checkpoint = golden_network()
    size, length = checkpoint.block_size, checkpoint.length
    clean, noisy = RECORDED["kv.clean"], RECORDED["kv.noisy"]
    cache = net.new_cache(len(clean), length, size)
    with torch.no_grad():
        for k, start in enumerate(range(0, clean.shape[1], size)):
            block = slice(start, start + size)
            for kind, tokens in (("query", noisy), ("store", clean)):
                found = net.logits(
                    net.hidden(tokens[:, block], attention_mask=cache.attention_mask, cache=cache)
                )
                if f"kv.{k:02}.{kind}_logits" in RECORDED:
                    close(found, RECORDED[f"kv.{k:02}.{kind}_logits"])
            cache = cache.commit(size)


def test_the_transformers_class_reads_the_published_folder():
    model = BD3LM.from_pretrained(GOLDEN / "hf_export").eval()
    tokens = torch.cat([RECORDED["xt"], RECORDED["x0"]], 1)
    with torch.no_grad():
        found = model(tokens, RECORDED["timesteps"], output_hidden_states=True)
        close(found.logits, RECORDED["train.logits"])
        for i, state in enumerate(found.hidden_states):
            close(state, RECORDED[f"train.hidden.{i}"])
        some = model(RECORDED["sample.1.input_ids"], sample_mode=True, return_dict=False)
        close(some[0], RECORDED["sample.1.logits"])
    low, high = read_checkpoint(GOLDEN / "hf_export").interval
    assert float(model.sampling_eps_min) == low
    assert float(model.sampling_eps_max) == high


def test_padding_is_not_attended_by_the_transformers_class():
    model = BD3LM.from_pretrained(GOLDEN / "hf_export").eval()
    tokens = RECORDED["sample.2.input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, -2:] = 0
    with torch.no_grad():
        changed = tokens.clone()
        changed[:, -2:] = 0
        a = model(tokens, sample_mode=True, attention_mask=mask).logits
        b = model(changed, sample_mode=True, attention_mask=mask).logits
    assert torch.equal(a[:, :-2], b[:, :-2])
