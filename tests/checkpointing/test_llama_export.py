"""Exports of models/llama.py: for transformers with this project's files, and for servers of block
diffusion; read back bit for bit, with the tokenizer's chat template."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from hub_folders import consumed
from networks import small_llama, texts
from safetensors.torch import save_file

from checkpointing import export, served
from checkpointing.layouts import Checkpoint, CheckpointError, read_checkpoint
from checkpointing.load import build_network, load_into
from data.tokenizer import wrap
from data.vocabularies import character_set
from models.denoiser import Denoiser
from models.masks import BlockCausal, Causal
from samplers.params import SamplingParams
from samplers.request import TextRequest
from samplers.writing import generate
from scripts import export_hf

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
QWEN3 = {"qkv_bias": False, "tied": True, "rope_theta": 1e6}


@pytest.fixture(scope="module")
def words():
    hf = character_set("abcdefghijk")
    hf.chat_template = TEMPLATE
    return wrap(hf, "letters")


def trained(words, algo="bamdlm", rows=None, **shape) -> Checkpoint:
    """What a run with averages would have saved."""
    net = small_llama(rows or words.vocab_size, **(QWEN3 | shape))
    weights = {k: v.detach() for k, v in net.state_dict().items()}
    config = {
        "algo": {"name": algo},
        "block_size": 4,
        "model": {"length": 16},
        "noise": {"type": "loglinear"},
        "data": {"insert_train_special": False},
    }
    return Checkpoint(
        source="run",
        layout="lightning",
        algorithms=(algo,),
        config=config,
        weights=weights,
        ema={k: v + 1 for k, v in weights.items()},
        ema_decay=0.9,
        raw={"hyper_parameters": {"llama": asdict(net.shape)}},
    )


def loaded(folder, algo):
    found = read_checkpoint(folder)
    net = build_network(found)
    load_into(net, found, use_ema=True, algo=algo)
    return found, net.eval()


@pytest.mark.parametrize("algo", ["ar", "bamdlm", "mdlm"])
def test_an_export_comes_back_bit_for_bit(algo, words, tmp_path):
    run = trained(words, algo, tied=False)
    found, net = loaded(export.export(run, tmp_path / "x", words), algo)
    assert (found.algo, found.length) == (algo, 16)
    assert net.shape == build_network(run).shape
    for key, value in net.state_dict().items():
        assert torch.equal(value, run.ema[key])
    assert f"algo={algo} algo.backbone=llama" in (tmp_path / "x" / "README.md").read_text()


def test_the_card_has_the_sizes_of_the_network(words, tmp_path):
    """Those of model.* have no effect where a checkpoint has the sizes."""
    run = trained(words)
    run.config["model"] |= {"hidden_size": 768, "n_blocks": 12, "param_dtype": "bfloat16"}
    run.config["lora"] = {"rank": 2}
    text = (export.export(run, tmp_path / "x", words) / "README.md").read_text()
    said = json.loads(text.partition("```json")[2].partition("```")[0])
    shape = build_network(run).shape
    assert said["model"]["hidden_size"] == shape.hidden_size != 768
    assert said["model"]["n_blocks"] == shape.n_blocks != 12
    assert said["model"]["param_dtype"] == "bfloat16"
    assert said["lora"] == {"rank": 2}


def test_spare_rows_are_exported_and_the_chat_template_stays(words, tmp_path):
    from transformers import AutoTokenizer

    folder = export.export(trained(words, rows=20), tmp_path / "x", words)
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["mask_token_id"]) == (20, words.mask_id)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    with pytest.raises(CheckpointError, match="has 11 ids, the tokenizer 13"):
        export.export(trained(words, rows=11), tmp_path / "y", words)


CONSUMER = """
    import sys
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    from safetensors.torch import load_file, save_file

    data, out, where = load_file(sys.argv[1]), {}, {"trust_remote_code": True}
    for algo in ("ar", "bamdlm"):
        model = AutoModelForMaskedLM.from_pretrained(algo, **where)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        out[f"{algo}.logits"] = model(data["tokens"], sample_mode=True).logits
        out[f"{algo}.texts"] = model.generate(data["prompts"], nucleus_p=0.9, seed=7)
    causal = AutoModelForCausalLM.from_pretrained("ar", **where)
    assert causal(data["tokens"]).logits.shape == out["ar.logits"].shape
    config = AutoConfig.from_pretrained("sdar", **where)
    assert (config.model_type, config.rope_theta, config.block_size) == ("sdar", 1e6, 4)
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (8, 2, True)
    assert getattr(config, "rope_scaling", None) is None
    assert config.architectures == ["SDARForCausalLM"]
    save_file(out, sys.argv[2])
    assert not any(name in sys.modules for name in ("models", "samplers"))
"""


def test_transformers_loads_and_samples_it_where_this_project_is_not(words, tmp_path, monkeypatch):
    for algo in ("ar", "bamdlm"):
        export.export(trained(words, algo), tmp_path / algo, words)
    monkeypatch.setattr(served, "MASK_ID", words.mask_id)
    export.export(trained(words), tmp_path / "sdar", words, form="sdar")
    tokens = texts(2, 16, words.mask_id)
    prompts = tokens[:, :3].contiguous()
    save_file({"tokens": tokens, "prompts": prompts}, tmp_path / "in.safetensors")
    theirs = consumed(tmp_path, CONSUMER)
    for algo, mask in (("ar", Causal()), ("bamdlm", BlockCausal(4))):
        _, net = loaded(tmp_path / algo, algo)
        with torch.no_grad():
            ours = net.logits(net.hidden(tokens, attention_mask=mask))
        torch.testing.assert_close(theirs[f"{algo}.logits"], ours, rtol=1e-5, atol=1e-5)
        size = mask.block_size
        params = SamplingParams(
            length=16,
            bos_id=words.bos_id,
            eos_id=words.eos_id,
            seed=7,
            batch_size=2,
            block_size=size,
            context_size=16,
            window=16,
            nucleus_p=0.9,
            kv_cache=True,
        )
        requests = [TextRequest(i, tuple(row)) for i, row in enumerate(prompts.tolist())]
        made = generate(algo, Denoiser(net, words.mask_id, size, mask), requests, params)
        made = sorted((s for found in made for s in found), key=lambda s: s.row)
        assert torch.equal(theirs[f"{algo}.texts"], torch.stack([s.tokens for s in made]))


def test_a_served_folder_is_qwen3_in_blocks(words, tmp_path, monkeypatch):
    """transformers' own Qwen3 loads it; under a causal mask, which is blocks of one, they agree."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    monkeypatch.setattr(served, "MASK_ID", words.mask_id)
    run = trained(words, rows=20)
    folder = export.export(run, tmp_path / "x", words, form="sdar")
    found, net = loaded(folder, "bamdlm")
    assert (found.algorithms, found.block_size) == (("bamdlm",), 4)
    for key, value in net.state_dict().items():
        assert torch.equal(value, run.ema[key])
    config = json.loads((folder / "config.json").read_text())
    assert (config["block_size"], config["mask_token_id"]) == (4, words.mask_id)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template == TEMPLATE
    theirs = Qwen3Config(**{k: v for k, v in config.items() if k != "auto_map"})
    model = Qwen3ForCausalLM.from_pretrained(folder, config=theirs).eval()
    tokens = texts(2, 12, words.vocab_size)
    with torch.no_grad():
        ours = net.logits(net.hidden(tokens, attention_mask=Causal()))
        torch.testing.assert_close(model(tokens).logits, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_blocks": 10**7}, "description of the network is damaged: n_blocks=10000000"),
        ({"n_kv_heads": 3}, "damaged: n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"rope_theta": float("nan")}, "damaged: rope_theta=nan"),
        ({"tied": 1}, "damaged: tied=1"),
        ({"extra": 1}, "damaged: extra=1"),
        ({"ffn_size": 24}, "20, 16] in the file, [24, 16] here"),
        ({"n_blocks": 2}, "not in the network (11)"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_whose_description_is_damaged(change, message, words):
    run = trained(words)
    shape = run.raw["hyper_parameters"]["llama"]
    damaged = replace(run, raw={"hyper_parameters": {"llama": {**shape, **change}}})
    with pytest.raises(CheckpointError) as refused:
        build_network(damaged)
    assert message in str(refused.value)
    with pytest.raises(CheckpointError, match="damaged: vocab_size=None, hidden_size=None"):
        build_network(replace(run, raw={}))


def test_what_no_server_computes_is_named(words, tmp_path, capsys):
    shape = {"qk_norm": False, "qkv_bias": True, "rope_type": "linear", "rope_factor": 2.0}
    with pytest.raises(CheckpointError) as refused:
        export.export(trained(words, "ar", **shape), tmp_path / "x", words, form="sdar")
    said = str(refused.value)
    for part in (
        "it was trained by algo=ar, and servers know blocks alone",
        "Qwen3 has qk_norm=True, it has False",
        "Qwen3 has o_bias=True, it has False",
        "Qwen3 has rope_type=default, it has linear",
        f"its mask token has id {words.mask_id}, and servers mask with 151,669",
        "--format project writes a folder for transformers",
    ):
        assert part in said
    run = trained(words)
    with pytest.raises(CheckpointError) as refused:
        export.export(replace(run), tmp_path / "x", words, form="sdar")
    assert "a smaller vocabulary cannot be served" in str(refused.value)
    assert not (tmp_path / "x").exists()
    assert export_hf.main([str(tmp_path), str(tmp_path / "x"), "--format", "sdar"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_the_mask_id_of_servers_is_that_of_qwen3():
    """SGLang 0.5.23, srt/dllm/config.py: DLLM_PARAMS."""
    assert served.MASK_ID == 151669
