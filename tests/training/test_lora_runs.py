"""lora.* through main.py: what a run trains and saves, how it goes on, who reads it, and what is
refused. Nothing here needs peft."""

import json
import shutil

import pytest
import torch
from hub_folders import with_tokenizer
from networks import LOGITS, assert_within, texts
from runs import differences, ends_with_2, finish, ranks, read, tiny_of_checkpoint

import main
import settings
from checkpointing.layouts import read_checkpoint
from checkpointing.trained import trained_network, trained_tokenizer
from models.lora import adapt, of_adapter
from models.masks import BlockCausal
from modes.build import build_backbone
from modes.build_data import build_tokenizer
from modes.lora import build_adapter
from scripts import inspect_checkpoint

LAST = "checkpoints/last.ckpt"
LORA = ["lora.rank=2", "lora.alpha=6", "training.ema=0.5", "optim.weight_decay=0.1"]
MASK = 28


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny_of_checkpoint(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(words, folder):
    """Of a run from it, but where it is saved."""
    common = ["algo=bamdlm", "block_size=4", "algo.backbone=llama", *LORA]
    return [
        *words,
        *common,
        f"data.tokenizer_name_or_path={folder}",
        f"training.from_pretrained={folder}",
    ]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of ten steps."""
    place = tmp_path_factory.mktemp("whole") / "run"
    assert main.main([*start, f"checkpointing.save_dir={place}"]) == 0
    return place


def of_network(state):
    return {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}


def test_only_the_adapters_and_the_row_are_trained_and_averaged(whole, folder):
    raw, base = read(whole / LAST), read_checkpoint(folder).weights
    state = of_network(raw["state_dict"])
    own = of_adapter(state)
    assert len(own) == 3 * 7 * 2 + 1
    table = "model.embed_tokens.weight"
    for name in state.keys() - own.keys() - {table}:
        assert torch.equal(state[name], base[name]), name
    assert torch.equal(state[table][:MASK], base[table])
    assert torch.equal(state[table][MASK], base[table].mean(0))
    assert not torch.equal(state["model.embed_tokens.mask_row"], state[table][MASK])
    assert all(v.any() for k, v in own.items() if k.endswith("lora_B"))
    shadow = raw["ema"]["shadow_params"]
    assert [tuple(v.shape) for v in shadow] == [tuple(v.shape) for v in own.values()]
    (optimizer,) = raw["optimizer_states"]
    assert len(optimizer["state"]) == len(own)
    assert raw["hyper_parameters"]["lora"]["base"]["source"] == str(folder)


def test_every_reader_gets_merged_weights(whole, start, capsys):
    """The logits are those of the network with its adapters, raw and averaged."""
    raw, config = read(whole / LAST), settings.load([*start, "lora.dropout=0"])
    tokenizer, tokens = build_tokenizer(config), texts(2, 16, MASK + 1)
    found = read_checkpoint(whole / LAST)
    assert not of_adapter(found.weights)
    assert found.ema.keys() == found.weights.keys()
    net = build_backbone(config, tokenizer, found)
    adapt(net, build_adapter(config, tokenizer))
    names = [f"backbone.{name}" for name in of_adapter(net.state_dict())]
    averages = dict(zip(names, raw["ema"]["shadow_params"], strict=True))
    for use_ema in (False, True):
        net.load_state_dict(of_network(raw["state_dict"] | (averages if use_ema else {})))
        plain = trained_network(found, trained_tokenizer(found), "bamdlm", use_ema=use_ema)
        with torch.no_grad():
            ours, theirs = (
                each.logits(each.hidden(tokens, attention_mask=BlockCausal(4)))[..., :MASK]
                for each in (net.eval(), plain.eval())
            )
        assert_within(theirs, ours, LOGITS)
    assert inspect_checkpoint.main([str(whole / LAST)]) == 0
    said = capsys.readouterr().out
    assert "all weights" in said
    assert "merged here: rank 2, alpha 6.0, of " in said


def test_it_is_evaluated_and_sampled_by_the_same_commands(whole, words, folder, tmp_path):
    used = [*words, "algo=bamdlm", "block_size=4", "algo.backbone=llama"]
    used += [f"eval.checkpoint_path={whole / LAST}", f"checkpointing.save_dir={tmp_path}"]
    used += [f"data.tokenizer_name_or_path={folder}"]
    assert main.main([*used, "mode=ppl_eval"]) == 0
    (path,) = tmp_path.glob("ppl_*.json")
    assert json.loads(path.read_text())["tokens"] > 0
    sampling = ["sampling.batch_size=2", f"sampling.logdir={tmp_path / 'texts.csv'}"]
    sampling += ["eval.gen_ppl_eval_model_name_or_path=null", "sampling.kv_cache=true"]
    assert main.main([*used, *sampling, "mode=sample_eval"]) == 0
    again = [*words, "algo=bamdlm", "block_size=4", "algo.backbone=llama", "trainer.max_steps=1"]
    again += [f"training.from_pretrained={whole / LAST}", f"data.tokenizer_name_or_path={folder}"]
    assert main.main([*again, f"checkpointing.save_dir={tmp_path / 'again'}"]) == 0


def test_a_run_that_goes_on_ends_the_same_bit_for_bit(whole, start):
    """Dropout at work; in the same place, whose name checkpoints hold."""
    expected, place = read(whole / LAST), f"checkpointing.save_dir={whole}"
    kept = whole.with_name("kept")
    shutil.move(whole, kept)
    try:
        assert main.main([*start, place, "trainer.max_steps=4"]) == 0
        assert main.main([*start, place]) == 0
        assert differences(read(whole / LAST), expected) == []
    finally:
        shutil.rmtree(whole)
        shutil.move(kept, whole)


def test_two_processes_train_what_one_does(whole, start, tmp_path):
    """ddp, which would wait for a gradient of anything frozen."""
    words = [*start, f"checkpointing.save_dir={tmp_path / 'run'}", "lora.dropout=0"]
    words += ["trainer.max_steps=2"]
    assert main.main([*words, f"checkpointing.save_dir={tmp_path / 'one'}"]) == 0
    assert finish(ranks(2, words, tmp_path / "log")) == [0, 0], (tmp_path / "log-0").read_text()
    one, two = (read(tmp_path / name / LAST)["state_dict"] for name in ("one", "run"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def test_a_step_without_a_finite_loss_leaves_the_adapters_alone(start, tmp_path, monkeypatch):
    import diffusion

    real = diffusion.Diffusion.training_loss
    monkeypatch.setattr(
        diffusion.Diffusion, "training_loss", lambda *each: real(*each) * float("nan")
    )
    place = f"checkpointing.save_dir={tmp_path / 'run'}"
    assert main.main([*start, place, "trainer.max_steps=2"]) == 0
    state = read(tmp_path / "run" / LAST)["state_dict"]
    assert all(not value.any() for name, value in state.items() if name.endswith("lora_B"))


def test_a_run_of_the_dit_starts_from_the_average(words, tmp_path):
    """One that was trained here, as mdlm; bamdlm goes on with it, and resumes."""
    common = [*words, "data.tokenizer_name_or_path=text8", "training.ema=0.5"]
    first = [*common, "algo=mdlm", f"checkpointing.save_dir={tmp_path / 'base'}"]
    assert main.main([*first, "trainer.max_steps=3"]) == 0
    base = tmp_path / "base" / LAST
    start = [*common, "algo=bamdlm", "block_size=4", f"training.from_pretrained={base}", *LORA]
    start += [f"checkpointing.save_dir={tmp_path / 'run'}", "lora.modules=[attn_qkv,mlp.0]"]
    assert main.main([*start, "trainer.max_steps=1"]) == 0
    assert main.main([*start, "trainer.max_steps=2"]) == 0
    found, ema = read(tmp_path / "run" / LAST)["state_dict"], read_checkpoint(base).ema
    assert torch.equal(found["backbone.blocks.1.attn_out.weight"], ema["blocks.1.attn_out.weight"])
    assert len(of_adapter(found)) == 2 * 2 * 2 + 1


def test_a_recipe_that_keeps_what_the_base_knows_goes_with_adapters(start, tmp_path):
    words = [*start, "adapt.clean=causal", "adapt.label=next", "adapt.ar_loss=0.5"]
    words += ["training.block_schedule={0: 1, 1: 4}", f"checkpointing.save_dir={tmp_path / 'run'}"]
    assert main.main([*words, "trainer.max_steps=2"]) == 0
    state = read(tmp_path / "run" / LAST)["state_dict"]
    assert all(value.any() for name, value in state.items() if name.endswith("lora_B"))


def test_the_plan_counts_what_is_trained(start, capsys):
    assert main.main([*start, "mode=plan"]) == 0
    said = capsys.readouterr().out
    own = 3 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 40)) + 32
    assert f"LoRA of rank 2: {own:,} of " in said


# ---- what is refused, each in one line

REFUSED = {
    "lora.modules: no linear layer of the blocks is proj; known: self_attn.q_proj": [
        "lora.modules=[proj]"
    ],
    "lora.rank=0 must be at least 1": ["lora.rank=0"],
    "lora.rank=33 is more than the rank of any layer": ["lora.rank=33", "lora.modules=[q_proj]"],
    "lora.rank=1000000000 is more than": ["lora.rank=1000000000"],
    "lora.alpha=0.0 must be above 0": ["lora.alpha=0"],
    "lora.alpha=-1.0 must be above 0": ["lora.alpha=-1"],
    "lora.dropout=1.0 must be in [0, 1)": ["lora.dropout=1"],
    "lora.modules=[] names no layer": ["lora.modules=[]"],
    "lora.rank=2 does not go with optim=muon": ["optim=muon"],
    "lora.rank=2 does not go with strategy=fsdp": ["strategy=fsdp", "trainer.devices=2"],
    "lora.rank=2 needs weights to start from: set training.from_pretrained": [
        "training.from_pretrained=null"
    ],
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_wrong_setting_is_one_line(said, start, tmp_path, capsys):
    place = f"checkpointing.save_dir={tmp_path / 'run'}"
    text = ends_with_2([*start, place, *REFUSED[said]], capsys)
    assert [line for line in text.splitlines() if said in line], text
    assert text.count("\n  - ") == 1, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", ["lora.rank=4", "lora.alpha=1", "lora.rank=null"])
def test_another_adapter_does_not_go_on(other, whole, start, capsys):
    text = ends_with_2([*start, f"checkpointing.save_dir={whole}", other], capsys)
    assert "belongs to a run with other settings: lora." in text


def test_a_base_that_changed_is_refused(whole, start, folder, tmp_path, capsys):
    """The run would go on with the base's weights in the checkpoint; nobody could tell of which
    base the adapter is."""
    from safetensors.torch import load_file, save_file

    place = folder / "model.safetensors"
    kept = load_file(place)
    save_file({k: v + (k == "model.norm.weight") for k, v in kept.items()}, place, {"format": "pt"})
    try:
        text = ends_with_2([*start, f"checkpointing.save_dir={whole}"], capsys)
    finally:
        save_file(kept, place, {"format": "pt"})
    assert f"training.from_pretrained={folder} has other weights than when this run began" in text


def test_a_run_goes_on_where_of_its_base_the_tokenizer_alone_is_left(whole, start, tmp_path):
    """And where the base lies in a folder of its own, with nothing."""
    model, place, words = (tmp_path / name for name in ("model", "run", "words"))
    shutil.copytree(start[-1].partition("=")[2], model)
    mine = [*start, f"training.from_pretrained={model}", f"checkpointing.save_dir={place}"]
    mine += [f"data.tokenizer_name_or_path={model}"]
    assert main.main([*mine, "trainer.max_steps=4"]) == 0
    for name in ("model.safetensors", "config.json"):
        (model / name).unlink()
    assert main.main(mine) == 0
    differing = differences(read(place / LAST)["state_dict"], read(whole / LAST)["state_dict"])
    assert differing == []
    shutil.rmtree(place)
    with_base = [*start, f"checkpointing.save_dir={place}"]
    shutil.copytree(start[-1].partition("=")[2], model, dirs_exist_ok=True)
    with_base += [f"training.from_pretrained={model}"]
    assert main.main([*with_base, "trainer.max_steps=4"]) == 0
    model.rename(words)
    assert main.main([*with_base, "trainer.max_steps=5"]) == 0


def test_a_run_that_has_not_begun_needs_its_base(start, tmp_path, capsys):
    mine = [*start, f"training.from_pretrained={tmp_path / 'gone'}"]
    text = ends_with_2([*mine, f"checkpointing.save_dir={tmp_path / 'run'}"], capsys)
    assert f"training.from_pretrained={tmp_path / 'gone'} does not exist" in text


def test_weights_that_the_algorithm_adds_are_no_adapters(words, tmp_path, capsys):
    """A DiT from AR weights has gates that are closed until they are trained."""
    common = [*words, "data.tokenizer_name_or_path=text8"]
    first = [*common, "algo=ar", f"checkpointing.save_dir={tmp_path / 'base'}"]
    assert main.main([*first, "trainer.max_steps=1"]) == 0
    start = f"training.from_pretrained={tmp_path / 'base' / LAST}"
    text = ends_with_2([*common, "algo=bamdlm", "block_size=4", start, *LORA], capsys)
    assert "lacks backbone." in text
    assert "adapters do not train: set lora.rank=null" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 3}, "lora_B and lora_A of rank 3 are"),
        ({"rank": None}, "rank None and alpha 6.0"),
        ({"alpha": "6"}, "rank 2 and alpha '6'"),
        ({"alpha": float("nan")}, "rank 2 and alpha nan"),
        ({"mask_id": 29}, "mask_row is no row 29 of an embedding"),
        ({"mask_id": -1}, "the mask's row of its adapters is -1"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change, said, whole, words, tmp_path, capsys):
    raw = read(whole / LAST)
    raw["hyper_parameters"]["lora"] |= change
    torch.save(raw, tmp_path / "odd.ckpt")
    assert inspect_checkpoint.main([str(tmp_path / "odd.ckpt")]) == 2
    assert said in capsys.readouterr().err


def test_what_nobody_reads_is_named(start, capsys):
    plain = [word for word in start if not word.startswith("lora")]
    assert main.main([*plain, "mode=plan", "lora.alpha=3"]) == 0
    assert "note: lora.alpha has no effect without lora.rank" in capsys.readouterr().err
    assert main.main([*start, "mode=plan", "algo=ar", "block_size=1", "lora.mask_row=true"]) == 0
    said = capsys.readouterr().err
    assert "lora.mask_row=True has no effect: algo=ar sees no mask" in said
