"""algo.backbone=llama through main.py: from a folder of transformers and from scratch, trained,
resumed, evaluated and sampled by the commands that there are."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from hub_folders import HUB_FOLDER, SIZES, with_tokenizer
from runs import tiny_of_checkpoint

import main
import settings
from checkpointing.layouts import read_checkpoint
from checkpointing.load import build_network, is_llama
from checkpointing.trained import trained_network, trained_tokenizer
from models.denoiser import Denoiser
from models.masks import Causal
from modes.build_data import build_rows, build_tokenizer

ALGORITHMS = {
    "ar": ["algo=ar"],
    "bamdlm": ["algo=bamdlm", "block_size=4"],
    "mdlm": ["algo=mdlm"],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny_of_checkpoint(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return with_tokenizer(tmp_path_factory.mktemp("model"), template)


def run(*words):
    assert main.main([str(word) for word in words]) == 0


def figures(folder):
    (path,) = folder.glob("ppl_*.json")
    return json.loads(path.read_text())


def test_a_folder_is_evaluated_as_it_is(words, folder, tmp_path, capsys):
    """The mean of every token's loss is that of transformers."""
    import transformers

    words = [*words, "algo=ar", "algo.backbone=llama", f"data.tokenizer_name_or_path={folder}"]
    words += ["mode=ppl_eval", f"eval.checkpoint_path={folder}"]
    run(*words, f"checkpointing.save_dir={tmp_path}")
    assert "mask token: id 28, a new row, the mean of the 28 embeddings" in capsys.readouterr().out
    config = settings.load(words)
    assert config.model.dropout == 0
    ids = torch.as_tensor(build_rows(config, build_tokenizer(config), "valid").ids.astype("int64"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    theirs = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    found = figures(tmp_path)
    assert found["tokens"] == ids[:, 1:].numel()
    assert found["nll"] == pytest.approx(float(theirs), rel=1e-6)
    # untrained, as block diffusion in blocks of one
    blocks = ["algo=bamdlm", "block_size=1", "adapt.clean=causal", "adapt.label=next"]
    words = [blocks[0] if word == "algo=ar" else word for word in words]
    run(*words, *blocks[1:], f"checkpointing.save_dir={tmp_path / 'blocks'}")
    ours = figures(tmp_path / "blocks")
    assert (ours["algo"], ours["tokens"]) == ("bamdlm", found["tokens"])
    assert ours["nll"] == pytest.approx(found["nll"], rel=1e-5)


@pytest.mark.parametrize("algo", ["ar", "bamdlm"])
def test_a_folder_is_trained_on_and_what_comes_out_serves(algo, words, folder, tmp_path, capsys):
    """Two steps, two more of the resumed run, then every reader of the checkpoint."""
    common = [*words, *ALGORITHMS[algo], f"data.tokenizer_name_or_path={folder}"]
    common += ["algo.backbone=llama", "optim=muon", "training.ema=0.5"]
    saved = f"checkpointing.save_dir={tmp_path / 'run'}"
    start = [*common, saved, f"training.from_pretrained={folder}"]
    start += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=2"]
    run(*start, "trainer.max_steps=2")
    run(*start, "trainer.max_steps=4")
    assert "going on from step 2" in capsys.readouterr().out
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    found = read_checkpoint(last)
    assert (found.step, found.algorithms[0]) == (4, algo)
    assert is_llama(found)
    assert found.ema.keys() == found.weights.keys()
    used = [*common[:-2], f"eval.checkpoint_path={last}", f"checkpointing.save_dir={tmp_path}"]
    run(*used, "mode=ppl_eval")
    assert figures(tmp_path)["algo"] == algo
    sampling = ["sampling.batch_size=2", f"sampling.logdir={tmp_path / 'texts.csv'}"]
    sampling += ["eval.gen_ppl_eval_model_name_or_path=null"]
    run(*used, *sampling, "mode=sample_eval", "sampling.kv_cache=true")
    net = trained_network(found, trained_tokenizer(found), algo)
    assert not torch.equal(net.embeddings, found.weights["model.embed_tokens.weight"])  # averaged
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    ask = Denoiser(net.eval(), 28, 1, Causal())
    with torch.no_grad():
        assert torch.isfinite(ask(tokens, torch.tensor([[2]]))[..., :28]).all()


@pytest.mark.parametrize("algo", [*ALGORITHMS, "sedd"])
def test_from_scratch(algo, words, folder, tmp_path):
    changes = ALGORITHMS.get(algo, ["algo=sedd", "algo.time_conditioning=false"])
    sizes = ["model=llama-tiny", "model.hidden_size=24", "model.n_heads=4", "model.n_kv_heads=2"]
    sizes += ["model.head_dim=8", "model.ffn_size=null", "model.qk_norm=true", "model.length=16"]
    sizes += ["model.n_blocks=2", "model.tied=false", "trainer.max_steps=2"]
    sizes += [f"checkpointing.save_dir={tmp_path}", f"data.tokenizer_name_or_path={folder}"]
    kept = [word for word in words if not word.startswith("model")]
    run(*kept, *changes, "algo.backbone=llama", *sizes)
    found = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    shape = build_network(found).shape
    assert (shape.hidden_size, shape.head_dim, shape.ffn_size) == (24, 8, 64)
    assert (shape.n_heads, shape.n_kv_heads, shape.qk_norm, shape.tied) == (4, 2, True, False)
    assert shape.vocab_size == 29
    assert found.config["model"]["dropout"] == 0


def test_a_run_from_an_exported_dit_resumes_too(words, tmp_path, capsys):
    """Its sizes are not those of model.*, in the run's own checkpoint either."""
    start = [*words, "algo=bamdlm", "block_size=4", "algo.backbone=hf_dit"]
    start += [f"training.from_pretrained={HUB_FOLDER}", f"checkpointing.save_dir={tmp_path}"]
    start += [f"data.tokenizer_name_or_path={GOLDEN / 'tokenizer'}"]
    run(*start, "trainer.max_steps=2")
    run(*start, "trainer.max_steps=3")
    assert "going on from step 2" in capsys.readouterr().out


def test_the_plan_knows_its_cost(words, folder, capsys):
    """As many parameters as the files hold and a row for the mask; nothing is trained."""
    run(
        *words,
        *("mode=plan", "algo=bamdlm", "block_size=4", "algo.backbone=llama"),
        *(f"training.from_pretrained={folder}", f"data.tokenizer_name_or_path={folder}"),
    )
    weights = read_checkpoint(folder).weights
    count = sum(value.numel() for value in weights.values()) + SIZES["hidden_size"]
    assert f"bamdlm: {count / 1e6:,.1f}M parameters" in capsys.readouterr().out


def test_a_text_longer_than_those_of_training_is_named(words, folder, capsys):
    common = ["mode=plan", "algo=ar", "algo.backbone=llama", "model.length=65536"]
    start = [f"training.from_pretrained={folder}", f"data.tokenizer_name_or_path={folder}"]
    run(*words, *common, *start)
    said = capsys.readouterr().out
    assert "model.length=65536: the network was trained on 32768 positions" in said


def test_settings_nobody_reads_are_named(words, folder, capsys):
    sizes = ["model.hidden_size=64", "model.qk_norm=true", "mode=plan", "algo=ar"]
    run(*words, *sizes, f"data.tokenizer_name_or_path={folder}")
    assert "model.qk_norm has no effect without algo.backbone=llama" in capsys.readouterr().err
    start = f"training.from_pretrained={folder}"
    run(*words, *sizes, "algo.backbone=llama", f"data.tokenizer_name_or_path={folder}", start)
    said = capsys.readouterr().err
    for key in ("hidden_size", "qk_norm"):
        assert f"model.{key} has no effect: algo.backbone=llama takes sizes from the" in said
