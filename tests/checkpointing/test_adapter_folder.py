"""scripts/export_hf.py of a run with adapters: merged, or for peft, whose figures are the same.

The tests that ask peft itself skip where it is not installed (requirements-lora.txt).
"""

import json
import os
from dataclasses import asdict

import pytest
import torch
from hub_folders import put, saved, transformers_model
from networks import LOGITS, assert_within, randomised, small, texts
from safetensors.torch import load_file, save_file

from checkpointing.adapter_folder import peft_name
from checkpointing.layouts import read_checkpoint
from checkpointing.load import build_network, load_into
from checkpointing.vocabulary import with_mask
from data.tokenizer import get_tokenizer
from data.vocabularies import character_set
from models.llama import Llama
from models.lora import Adapter, adapt
from models.masks import Causal
from scripts import export_hf
from training.optimizers import trained

MODELS = ["llama", "llama, one head of keys, tied", "qwen2, tied", "qwen3, biases, tied", "mistral"]


def letters(folder, ids):
    """A tokenizer of so many ids without the mask, in the folder."""
    character_set("".join(map(chr, range(97, 97 + ids - 1)))).save_pretrained(folder)
    words = get_tokenizer(str(folder))
    assert words.mask_id == ids
    return words


def run_of(net, adapter, base, words, path, ema=True):
    """What a run from `base` would have saved, its average 0.1 away from the weights."""
    config = {
        "algo": {"name": "bamdlm"},
        "block_size": 4,
        "model": {"length": 16},
        "training": {"ema": 0.9 * ema},
        "data": {"tokenizer_name_or_path": words.hf.name_or_path},
        "lora": {"dropout": 0.05},
    }
    start = read_checkpoint(base)
    start, _ = with_mask(start, words, words.hf.name_or_path)
    about = {"source": str(base), "fingerprint": start.fingerprint}
    hyper = {"config": config, "lora": {**asdict(adapter), "base": about}}
    if isinstance(net, Llama):
        hyper["llama"] = asdict(net.shape)
    averages = [value.detach() + 0.1 for _, value in trained(net)]
    torch.save(
        {
            "state_dict": {f"backbone.{k}": v.detach() for k, v in net.state_dict().items()},
            "hyper_parameters": hyper,
            "global_step": 1,
            **({"ema": {"decay": 0.9, "num_updates": 1, "shadow_params": averages}} if ema else {}),
        },
        path,
    )
    return path


def made(name, tmp_path, *, spare=0, rank=3, **more):
    """(the run's file, its network with adapters, the base's folder)."""
    model = transformers_model(name)
    base = saved(tmp_path / "base", model)
    words = letters(base, 29 - spare)
    start, _ = with_mask(read_checkpoint(base), words, str(base))
    net = build_network(start)
    load_into(net, start, use_ema=False, algo="ar")
    adapter = Adapter(rank=rank, alpha=7.0, mask_id=words.mask_id, **more)
    adapt(net, adapter)
    randomised(net)
    return run_of(net.eval(), adapter, base, words, tmp_path / "run.ckpt"), net, base


@torch.no_grad()
def causal(net, tokens):
    return net.logits(net.hidden(tokens, attention_mask=Causal()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spare", [0, 2], ids=["new row", "spare row"])
def test_peft_computes_the_same(name, spare, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: requirements-lora.txt")
    import transformers

    run, net, base = made(name, tmp_path, spare=spare)
    folder = tmp_path / "adapter"
    assert export_hf.main([str(run), str(folder), "--adapter", "--disable-ema"]) == 0
    mask = net.embed.mask_id
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if not spare:
        assert f"base.resize_token_embeddings({mask + 1})" in (folder / "README.md").read_text()
        model.resize_token_embeddings(mask + 1)
    else:
        assert "resize" not in (folder / "README.md").read_text()
    theirs = peft.PeftModel.from_pretrained(model, folder).eval()
    tokens = texts(2, 12, mask + 1)
    assert (tokens == mask).any()
    with torch.no_grad():
        found = theirs(tokens).logits
    assert_within(causal(net, tokens)[..., :mask], found[..., :mask], LOGITS)
    with torch.no_grad():
        alone = theirs.merge_and_unload()(tokens).logits
    ours = read_checkpoint(run)
    plain = build_network(ours)
    load_into(plain, ours, use_ema=False, algo="bamdlm")
    assert_within(causal(plain, tokens)[..., :mask], alone[..., :mask], LOGITS)
    for key, value in plain.state_dict().items():  # the mask's row too
        if key != "lm_head.weight":
            torch.testing.assert_close(value, theirs.base_model.model.state_dict()[key])


def test_peft_names_and_settings_are_those_that_it_writes(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: requirements-lora.txt")
    import transformers

    run, _, base = made("qwen3", tmp_path, modules=("q_proj", "mlp.down_proj"), spare=1)
    assert export_hf.main([str(run), str(tmp_path / "adapter"), "--adapter"]) == 0
    ours = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config = peft.LoraConfig(**{k: v for k, v in ours.items() if k != "peft_type"})
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("use_ema", [True, False], ids=["averaged", "raw"])
def test_the_folder_holds_the_adapters_alone(use_ema, tmp_path, capsys):
    run, net, base = made("qwen3", tmp_path, modules=("q_proj", "mlp.down_proj"))
    folder = tmp_path / "adapter"
    words = [str(run), str(folder), "--adapter", *([] if use_ema else ["--disable-ema"])]
    assert export_hf.main(words) == 0
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == {peft_name(name) for name, _ in trained(net)}
    for name, value in trained(net):
        found = tensors[peft_name(name)].view_as(value)
        torch.testing.assert_close(found, value.detach() + 0.1 * use_ema)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["mlp.down_proj", "self_attn.q_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7.0, 0.05)
    assert config["base_model_name_or_path"] == os.path.abspath(base)
    assert config["trainable_token_indices"] == {"embed_tokens": [29]}
    assert export_hf.main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert export_hf.main([*words, "--overwrite"]) == 0


def test_an_export_is_merged(tmp_path):
    run, net, _ = made("llama", tmp_path)
    assert export_hf.main([str(run), str(tmp_path / "merged"), "--disable-ema"]) == 0
    found = read_checkpoint(tmp_path / "merged")
    plain = build_network(found)
    load_into(plain, found, use_ema=True, algo="bamdlm")
    tokens = texts(2, 12, 30)
    assert_within(causal(plain, tokens)[..., :29], causal(net, tokens)[..., :29], LOGITS)


# ---- what peft could not use


def refused(words, capsys):
    capsys.readouterr()
    assert export_hf.main([*map(str, words), "--adapter"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_a_base_that_changed_is_refused(tmp_path, capsys):
    run, _, base = made("llama", tmp_path)
    path = base / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(path).items()}, path, {"format": "pt"})
    said = refused([run, tmp_path / "out"], capsys)
    assert "base, which has other weights now" in said
    path.unlink()
    assert "base has config.json but no weights" in refused([run, tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_a_base_of_this_project_is_none_of_peft(tmp_path, capsys):
    words, net = get_tokenizer("characters:abcdef"), small(7)
    config = {"model_type": "bd3lm", "algo": "bamdlm", "model_length": 16, "block_size": 4}
    tensors = {f"backbone.{k}": v.detach().clone() for k, v in net.state_dict().items()}
    base, adapter = put(tmp_path / "base", config, tensors), Adapter(rank=1, alpha=1.0)
    adapt(net, adapter)
    run = run_of(net, adapter, base, words, tmp_path / "run.ckpt")
    said = refused([run, tmp_path / "out", "--tokenizer", "characters:abcdef"], capsys)
    assert "which transformers does not load as it is" in said


def test_without_adapters_there_is_nothing_to_write(tmp_path, capsys):
    run, _, base = made("llama", tmp_path)
    said = refused([run, tmp_path / "out", "--format", "sdar"], capsys)
    assert "--adapter does not go with --format sdar" in said
    said = refused([base, tmp_path / "out", "--tokenizer", base], capsys)
    assert "has no adapters (it was trained without lora.rank): leave out --adapter" in said
