"""Folders for transformers: written from a checkpoint, read with and without this project."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from checkpoint_helpers import BY_ALGO, INFO, NAMES, close, network, path
from conftest import GOLDEN, load, load_json
from hub_folders import consumed
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from checkpointing import export, torch_file
from checkpointing.layouts import CheckpointError, read_checkpoint
from checkpointing.load import load_into
from data.tokenizer import get_tokenizer
from models.denoiser import Denoiser, Score
from models.masks import BlockCausal, Causal, Full
from samplers.params import SamplingParams
from samplers.request import TextRequest
from samplers.writing import generate
from scripts import export_hf

transformers_logging.disable_progress_bar()
ROOT = export.ROOT
GOLDEN_CONFIG = load_json("hf_export/config.json")
RECORDED = load("hf_export/golden.safetensors")
SOURCE = next(
    name
    for name in NAMES
    if INFO[name]["algo"] == "bd3lm" and INFO[name]["block_size"] == GOLDEN_CONFIG["block_size"]
)
PROMPTS = {"bamdlm": 1, "mdlm": 2, "sedd": 3, "ar": 4}  # tokens of the prompt in the tests


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(GOLDEN / "tokenizer"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """An export of one checkpoint of each algorithm, {algo: folder}."""
    root = tmp_path_factory.mktemp("exports")
    names = {**BY_ALGO, "bamdlm": SOURCE}
    return {
        algo: export.export(read_checkpoint(path(name)), root / algo, tokenizer)
        for algo, name in names.items()
    }


def test_an_export_of_the_same_checkpoint_is_the_recorded_one_bit_for_bit(folders):
    ours = load_file(folders["bamdlm"] / "model.safetensors")
    theirs = load_file(GOLDEN / "hf_export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value)
    config = json.loads((folders["bamdlm"] / "config.json").read_text())
    written_anyway = {"transformers_version", "return_dict", "sampling_eps_min", "sampling_eps_max"}
    for key in GOLDEN_CONFIG.keys() - written_anyway:
        assert config[key] == GOLDEN_CONFIG[key]


@pytest.mark.parametrize("algo", BY_ALGO)
def test_checkpoint_to_export_to_checkpoint_is_bit_equal(algo, folders, tmp_path):
    name = SOURCE if algo == "bamdlm" else BY_ALGO[algo]
    before, exported = read_checkpoint(path(name)), read_checkpoint(folders[algo])
    assert exported.algo == algo
    assert exported.length == before.length
    assert exported.interval == before.interval
    net = network(exported)
    load_into(net, exported, use_ema=True, algo=algo)
    state = {f"backbone.{key}": value for key, value in net.state_dict().items()}
    if before.interval is not None:
        bounds = dict(zip(("sampling_eps_min", "sampling_eps_max"), before.interval, strict=True))
        state = {key: torch.tensor(value) for key, value in bounds.items()} | state
    torch_file.save({**before.raw, "state_dict": state}, str(tmp_path / "again.ckpt"))
    again = read_checkpoint(tmp_path / "again.ckpt")
    for key, value in before.ema.items():
        assert torch.equal(again.weights[key], value)
        assert torch.equal(again.ema[key], value)
    assert list(again.weights) == list(before.weights)
    assert again.interval == before.interval


def test_plain_weights_are_exported_on_request(tmp_path, tokenizer):
    checkpoint = read_checkpoint(path(BY_ALGO["ar"]))
    folder = export.export(checkpoint, tmp_path / "x", tokenizer, use_ema=False)
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[f"backbone.{k}"], v) for k, v in checkpoint.weights.items())


def test_an_export_holds_the_projects_own_files(folders):
    folders_of_sources = ("models", "models/kernels", "samplers")
    places = (ROOT, *(ROOT / name for name in folders_of_sources), export.ENTRY.parent)
    for name in export.sources():
        (source,) = [place / name for place in places if (place / name).exists()]
        written = (folders["mdlm"] / name).read_text()
        expected = source.read_text().replace("\nfrom models.kernels.", "\nfrom .")
        expected = expected.replace("\nfrom models.", "\nfrom .")
        expected = expected.replace("\nfrom .kernels.", "\nfrom .")
        assert written == expected.replace("\nfrom noise_schedule ", "\nfrom .noise_schedule ")
    for name in ("dit.py", "attention.py", "cache.py", "masks.py", "draw.py", "randomness.py"):
        assert name in export.sources()


def test_reading_an_export_natively_runs_none_of_its_code(folders, tmp_path):
    folder = shutil.copytree(folders["ar"], tmp_path / "x")
    marker = tmp_path / "it-ran"
    for name in export.sources():
        (folder / name).write_text(f"open({str(marker)!r}, 'w')")
    checkpoint = read_checkpoint(folder)
    load_into(network(checkpoint), checkpoint, use_ema=True, algo="ar")
    assert not marker.exists()


def test_an_export_is_whole_or_not_there(tmp_path, tokenizer, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "card", fail)
    with pytest.raises(KeyboardInterrupt):
        export.export(read_checkpoint(path(SOURCE)), tmp_path / "x", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_the_model_card_tells_what_was_trained(folders):
    card = (folders["bamdlm"] / "README.md").read_text()
    info = INFO[SOURCE]
    assert f"| block size | {info['block_size']} |" in card
    assert f"| optimizer steps | {info['global_step']} |" in card
    assert "best validation perplexity" in card
    assert f'"lr": {info["config"]["optim"]["lr"]}' in card
    assert "$" not in card.split("```json")[0]


def test_an_export_of_several_block_sizes_keeps_them(tmp_path, tokenizer):
    found = read_checkpoint(path(SOURCE))
    run = found.config | {"training": {"block_sizes": {1: 0.25, 4: 0.75}}}
    found = dataclasses.replace(found, config=run)
    folder = export.export(found, tmp_path / "x", tokenizer)
    assert read_checkpoint(folder).block_sizes == (1, 4)
    assert "| block size | 1 and 4 |" in (folder / "README.md").read_text()
    assert "block_sizes" not in export.hub_config(read_checkpoint(path(SOURCE)), tokenizer)


# The same samplers, in a process without this project


def native_texts(algo, folder, times=1):
    """times: of the block size."""
    checkpoint = read_checkpoint(folder)
    net = network(checkpoint)
    load_into(net, checkpoint, use_ema=True, algo=algo)
    config = checkpoint.config
    mask, size = config["mask_token_id"], config["block_size"] * times
    ask = {
        "sedd": Score(net, mask),
        "ar": Denoiser(net, mask, 1, Causal()),
        "mdlm": Denoiser(net, mask, 1, Full()),
        "bamdlm": Denoiser(net, mask, size, BlockCausal(size)),
    }[algo]
    prompts = RECORDED["x0"][:, : PROMPTS[algo]]
    params = SamplingParams(
        length=config["model_length"],
        bos_id=config["bos_token_id"],
        eos_id=config["eos_token_id"],
        seed=7,
        batch_size=len(prompts),
        block_size=size if algo == "bamdlm" else 1,
        context_size=config["model_length"],
        window=config["model_length"],
        num_steps=4,
        nucleus_p=0.9,
        kv_cache=algo in ("ar", "bamdlm"),
    )
    requests = [TextRequest(i, tuple(row)) for i, row in enumerate(prompts.tolist())]
    made = [s for found in generate(algo, ask, requests, params) for s in found]
    return torch.stack([s.tokens for s in sorted(made, key=lambda s: s.row)])


CONSUMER = """
    import sys
    import torch
    from transformers import (
        AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
    )
    from safetensors.torch import load_file, save_file

    out = {}
    data = load_file(sys.argv[1])
    for folder in sys.argv[3:]:
        algo = folder.rpartition("/")[2]
        where = {"pretrained_model_name_or_path": folder, "trust_remote_code": True}
        model = AutoModelForMaskedLM.from_pretrained(**where)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        same = AutoModel.from_pretrained(**where)
        with torch.no_grad():
            sigma = torch.full((len(data["tokens"]),), 0.5)
            logits = model(data["tokens"], sigma, sample_mode=True).logits
            assert torch.equal(same(data["tokens"], sigma, sample_mode=True).logits, logits)
            out[f"{algo}.logits"] = logits
            if algo == "ar":  # the others have no row about the next token
                causal = AutoModelForCausalLM.from_pretrained(**where)
                assert causal.config.max_position_embeddings == causal.config.model_length
                mask = causal.config.mask_token_id
                assert (causal(data["tokens"]).logits[..., mask] == -torch.inf).all()
                logits[..., mask] = -torch.inf
                assert torch.equal(causal(data["tokens"]).logits, logits)
                out[f"{algo}.logits"] = model(data["tokens"]).logits
            else:
                assert "AutoModelForCausalLM" not in model.config.auto_map
        prompts = data[f"{algo}.prompts"]
        texts = model.generate(prompts, num_steps=4, nucleus_p=0.9, seed=7)
        out[f"{algo}.texts"] = texts
        if algo == "bamdlm":
            out["twice"] = model.generate(
                prompts, nucleus_p=0.9, seed=7, block_size=2 * model.config.block_size
            )
        assert torch.equal(texts[:, : prompts.shape[1]], prompts)
        assert len(model.generate(num_samples=3, num_steps=2)) == 3
    longer = AutoModelForMaskedLM.from_pretrained(sys.argv[3], trust_remote_code=True)
    twice = 2 * longer.config.model_length
    assert longer.generate(max_length=twice).shape == (1, twice)
    try:
        longer.generate(max_new_tokens=5)
    except ValueError as error:
        assert "no option max_new_tokens; the options are input_ids, " in str(error)
    else:
        raise AssertionError("max_new_tokens was accepted")
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[3], trust_remote_code=True)
    assert tokenizer.eos_token_id == longer.config.eos_token_id
    save_file(out, sys.argv[2])
    assert not any(name in sys.modules for name in ("models", "samplers", "checkpoints", "build"))
"""


def test_transformers_loads_and_samples_an_export_where_this_project_is_not_installed(
    folders, tmp_path
):
    from safetensors.torch import save_file

    prompts = {f"{a}.prompts": RECORDED["x0"][:, :n].contiguous() for a, n in PROMPTS.items()}
    tokens = RECORDED["sample.2.input_ids"]
    save_file({"tokens": tokens, **prompts}, tmp_path / "in.safetensors")
    found = consumed(tmp_path, CONSUMER, *(str(folders[algo]) for algo in BY_ALGO))
    for algo in BY_ALGO:
        checkpoint = read_checkpoint(folders[algo])
        net = network(checkpoint)
        load_into(net, checkpoint, use_ema=True, algo=algo)
        mask = {"ar": Causal(), "bamdlm": BlockCausal(checkpoint.block_size)}.get(algo, Full())
        sigma = torch.full((len(tokens),), 0.5) if algo == "sedd" else None
        with torch.no_grad():
            close(
                found[f"{algo}.logits"],
                net.logits(net.hidden(tokens, sigma, attention_mask=mask), sigma),
            )
        assert torch.equal(found[f"{algo}.texts"], native_texts(algo, folders[algo]))
    assert torch.equal(found["twice"], native_texts("bamdlm", folders["bamdlm"], times=2))
    assert not torch.equal(found["twice"], found["bamdlm.texts"])


# The command


def run(capsys, *arguments):
    code = export_hf.main([str(a) for a in arguments])
    return code, capsys.readouterr()


def test_the_command_takes_the_tokenizer_out_of_an_authors_checkpoint(tmp_path, capsys, tokenizer):
    code, shown = run(capsys, path(SOURCE), tmp_path / "x")
    assert code == 0
    assert "model.safetensors" in shown.out
    found = get_tokenizer_of(tmp_path / "x")
    text = "To be, or not to be:  that is the question."
    assert found.encode(text) == tokenizer.encode(text)
    for key in ("mask_id", "eos_id", "bos_id", "vocab_size"):
        assert getattr(found, key) == getattr(tokenizer, key)


def test_a_tokenizer_pickled_by_transformers_4_is_rebuilt_too(tokenizer):
    """There the special tokens are attributes, AddedToken or str."""
    backend = tokenizer.hf.backend_tokenizer.to_str()
    end = tokenizer.hf.eos_token
    kept = {"_tokenizer": backend, "_eos_token": {"class": "AddedToken", "content": end}}
    found = export_hf.rebuilt({**kept, "_bos_token": end, "_pad_token": None})
    assert (found.eos_token, found.bos_token, found.pad_token) == (end, end, None)
    assert found.encode("to be") == tokenizer.encode("to be")


def get_tokenizer_of(folder):
    from transformers import PreTrainedTokenizerFast

    from data.tokenizer import wrap

    return wrap(PreTrainedTokenizerFast.from_pretrained(folder), str(folder))


def test_the_command_explains_itself(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    plain = next((GOLDEN / "checkpoints").glob("*_plain.ckpt"))
    for arguments, message in (
        ((path(SOURCE), tmp_path / "full"), "is not empty"),
        ((tmp_path / "no.ckpt", tmp_path / "y"), "does not exist"),
        ((path(SOURCE), tmp_path / "y", "--algo", "ar"), "give --algo"),
        ((path(SOURCE), tmp_path / "y", "--tokenizer", "text8"), "give the right one"),
        ((plain, tmp_path / "y"), "names no tokenizer"),
        ((plain, tmp_path / "y", "--tokenizer", GOLDEN / "tokenizer"), "length it was trained at"),
    ):
        code, shown = run(capsys, *arguments)
        assert code == 2
        assert message in shown.err
    assert not (tmp_path / "y").exists()
    assert run(capsys, path(SOURCE), tmp_path / "full", "--overwrite")[0] == 0
    assert not (tmp_path / "full" / "x").exists()


def test_push_uploads_the_folder(tmp_path, capsys, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, sorted(os.listdir(folder_path))))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    code, shown = run(capsys, path(SOURCE), tmp_path / "x", "--push", "me/model", "--private")
    assert code == 0
    assert "https://hub/me/model" in shown.out
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert "modeling_bd3lm.py" in calls[1][1]


def test_an_algorithm_that_does_not_fit_is_refused(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="may be mdlm"):
        export.export(
            read_checkpoint(path(BY_ALGO["mdlm"])), tmp_path / "x", tokenizer, algo="sedd"
        )
