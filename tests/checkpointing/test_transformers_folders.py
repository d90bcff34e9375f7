"""Models of transformers: what config.json may say, the row of the mask, and everything wrong with
one, each with one line."""

import json
import re

import pytest
import torch
from checkpoint_helpers import BY_ALGO, path
from hub_folders import LLAMA3, SIZES, TRANSFORMERS, saved, shard, transformers_model
from runs import ends_with_2, tiny
from safetensors.torch import load_file, save_file

from checkpointing.families import ARCHITECTURES, shape_of
from checkpointing.layouts import CheckpointError, read_checkpoint
from checkpointing.load import build_network, load_into, load_pretrained
from checkpointing.vocabulary import with_mask
from data.tokenizer import get_tokenizer
from models.llama import LlamaShape

TEXT8_IDS = 35  # the mask is one of them


def config(**changes):
    given = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **changes}
    return {key: value for key, value in given.items() if value is not None or key not in changes}


# ---- what config.json may say


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        ),
        (
            {
                "rope_theta": 500.0,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            },
            LLAMA3,
        ),
    ],
    ids=["none", "theta", "linear", "llama3"],
)
def test_both_spellings_of_rope_are_one_network(old, new):
    ours = shape_of("x", config(**old))
    assert ours == shape_of("x", config(rope_parameters=new))
    assert ours.rope_theta == new.get("rope_theta", 1e4)


def test_a_key_that_is_absent_means_what_transformers_takes():
    import transformers

    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        theirs = getattr(transformers, f"{name}Config")()
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        sizes = {key: getattr(theirs, key) for key in (*sizes, "intermediate_size")}
        short = {"architectures": [f"{name}ForCausalLM"], **sizes}
        full = {"architectures": [f"{name}ForCausalLM"], **json.loads(theirs.to_json_string())}
        assert shape_of("x", short) == shape_of("x", full), name


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 8}, None),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, 8),
        ({"architectures": ["MistralForCausalLM"]}, 4096),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}, None),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
            },
            8,
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            8,
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 3,
            },
            None,
        ),
    ],
)
def test_where_a_sliding_window_acts(changes, window):
    assert shape_of("x", config(**changes)).sliding_window == window


@pytest.mark.parametrize("name", ["llama", "qwen2, tied", "qwen3"])
def test_shards_hold_what_one_file_holds(name, tmp_path):
    folder = saved(tmp_path / "m", transformers_model(name))
    whole = read_checkpoint(folder).weights
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard(folder, tensors, "safetensors", save_file)
    parts = read_checkpoint(folder).weights
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_stored_copies_of_what_follows_are_known(tmp_path):
    """Old files store frequencies, and the head beside a tied embedding."""
    model = transformers_model("qwen2, tied")
    folder = saved(tmp_path / "m", model)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    found = read_checkpoint(folder)
    assert found.weights.keys() == dict(build_network(found).named_parameters()).keys()


# ---- the row of the mask


def words_of(count):
    """A tokenizer of `count` ids, and the mask behind them."""
    words = get_tokenizer("characters:" + "".join(map(chr, range(97, 97 + count - 1))))
    assert (words.mask_id, words.vocab_size) == (count, count + 1)
    return words


def test_a_spare_row_is_taken_as_it_is(tmp_path):
    found = read_checkpoint(saved(tmp_path / "m", transformers_model("llama")))
    same, said = with_mask(found, words_of(20), "x")
    assert same is found
    assert said == "mask token: id 20, a spare row of 29"
    _, said = with_mask(found, words_of(28), "x")
    assert said == "mask token: id 28, a spare row of 29"


@pytest.mark.parametrize("name", ["llama", "qwen2, tied"])
@torch.no_grad()
def test_a_row_is_added_where_none_is_spare(name, tmp_path):
    found = read_checkpoint(saved(tmp_path / "m", transformers_model(name)))
    made, said = with_mask(found, words_of(29), "x")
    assert said == "mask token: id 29, a new row, the mean of the 29 embeddings"
    net = build_network(made)
    load_into(net, made, use_ema=True, algo="ar")
    tables = {"model.embed_tokens.weight", "lm_head.weight"} & found.weights.keys()
    assert len(tables) == (1 if "tied" in name else 2)
    for key, value in net.state_dict().items():
        assert torch.equal(value[: len(found.weights[key])], found.weights[key])
        if key in tables:
            torch.testing.assert_close(value[29], value[:29].mean(0))
    assert len(found.weights["model.embed_tokens.weight"]) == 29


def test_other_ids_are_refused(tmp_path):
    found = read_checkpoint(saved(tmp_path / "m", transformers_model("llama")))
    with pytest.raises(CheckpointError, match=r"vocabulary of 29 ids, the tokenizer x of 32"):
        with_mask(found, words_of(31), "x")


def test_the_tokenizer_of_the_folder_is_the_right_one(tmp_path):
    folder = saved(tmp_path / "m", transformers_model("llama"))
    words_of(20).save(folder)
    found, own = read_checkpoint(folder), get_tokenizer(str(folder))
    assert with_mask(found, own, str(folder))[1]
    assert with_mask(found, words_of(20), "characters:...")[1]  # the same ids by another name
    with pytest.raises(CheckpointError, match=f"set data.tokenizer_name_or_path={folder}"):
        with_mask(found, words_of(21), "x")


@pytest.mark.parametrize("algo", ["ar", "bamdlm", "mdlm"])
def test_new_runs_of_any_algorithm_start_from_it(algo, tmp_path):
    found = read_checkpoint(saved(tmp_path / "m", transformers_model("llama")))
    net = build_network(found)
    taken = load_pretrained(net, found, algo=algo)
    assert all(torch.equal(v, found.weights[k]) for k, v in net.state_dict().items())
    assert all(not key.startswith("backbone.") for key in taken.new_keys)


def test_sdar_is_a_block_diffusion_model(tmp_path):
    model = transformers_model("qwen3")
    folder = saved(
        tmp_path / "m", model, architectures=["SDARForCausalLM"], block_size=4, mask_token_id=28
    )
    found = read_checkpoint(folder)
    assert (found.algorithms, found.block_size) == (("bamdlm",), 4)
    load_into(build_network(found), found, use_ema=True, algo="bamdlm")


def test_every_architecture_is_tried():
    tried = {f"{family}ForCausalLM" for family, _ in TRANSFORMERS.values()}
    assert ARCHITECTURES.keys() == tried | {"SDARForCausalLM"}
    assert LlamaShape(**build_network_sizes()).tied is False


def build_network_sizes():
    return vars(shape_of("x", config()))


# ---- everything wrong


@pytest.fixture(scope="module")
def model():
    import transformers

    torch.manual_seed(0)
    given = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**given, vocab_size=TEXT8_IDS)
    ).eval()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    found = tiny(tmp_path_factory.mktemp("data"))
    return [word for word in found if not re.match(r"model\.(hidden|cond|n_|dropout)", word)]


def says(**changes):
    def change(folder):
        path = folder / "config.json"
        found = json.loads(path.read_text())
        found |= changes
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))

    return change


def holds(change):
    def rewritten(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.unlink()  # load_file maps it
        save_file(tensors, path)

    return rewritten


def sharded(change):
    """change(folder, index)"""

    def made(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        path.unlink()
        shard(folder, tensors, "safetensors", save_file)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(folder, index)
        path.write_text(json.dumps(index))

    return made


def only(name, data=b"GGUF\3\0\0\0"):
    def left(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(data)

    return left


def outside(folder, index):
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"


def other_words(folder):
    words_of(20).save(folder)


NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
WRONG = {
    "architecture": (says(architectures=["GPT2LMHeadModel"]), "architectures=['GPT2LMHeadModel']"),
    "two architectures": (says(architectures=["LlamaForCausalLM"] * 2), "this project reads"),
    "rope": (
        says(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "rope_type='yarn' in rope_parameters, which is not supported; only default, linear, llama3",
    ),
    "rope of 4": (
        says(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_type='dynamic' in rope_scaling",
    ),
    "rope is a list": (says(rope_parameters=[1]), "rope_parameters=[1]; an object was expected"),
    "no factor": (says(rope_parameters={"rope_type": "linear"}), "no factor; a number above 0"),
    "two thetas": (
        says(rope_theta=5.0, rope_parameters={"rope_theta": 6.0}),
        "two values of rope_theta: 6.0 and 5.0",
    ),
    "a part of a head": (says(partial_rotary_factor=0.5), "partial_rotary_factor=0.5; only 1"),
    "heads": (says(num_key_value_heads=3), "in config.json num_attention_heads=4 is not a"),
    "more heads of keys": (says(num_key_value_heads=8), "is not a multiple of num_key_value_heads"),
    "odd head": (says(head_dim=7), "head_dim=7 is odd"),
    "no even share": (
        says(hidden_size=30, head_dim=...),
        "hidden_size=30, which is not a multiple of num_attention_heads=4, and no head_dim",
    ),
    "no size": (says(intermediate_size=...), "no intermediate_size; a whole number"),
    "a size in words": (says(hidden_size="32"), "'32' as hidden_size; a whole number"),
    "a huge size": (says(intermediate_size=10**9), "1000000000 as intermediate_size"),
    "another size": (says(intermediate_size=64), "[40, 32] in the file, [64, 32] here"),
    "another depth": (says(num_hidden_layers=2), "not in the network (9)"),
    "eps": (says(rms_norm_eps=0), "0 as rms_norm_eps; a number above 0"),
    "a flag in words": (says(tie_word_embeddings="yes"), "'yes' as tie_word_embeddings"),
    "activation": (says(hidden_act="gelu"), "hidden_act='gelu'; only silu"),
    "quantized": (says(quantization_config={"bits": 4}), "a quantization_config"),
    "kinds of layers": (says(layer_types=["chunked_attention"] * 3), "layer_types=['chunked"),
    "window": (
        says(architectures=["MistralForCausalLM"], sliding_window=8),
        "sliding window of 8 tokens, which is not supported",
    ),
    "tied, and not": (says(tie_word_embeddings=True), "but lm_head.weight is not model.embed"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "without config.json"),
    "extra key": (
        holds(lambda t: t.update({"model.extra": torch.ones(2)})),
        "not in the network (1): model.extra",
    ),
    "missing key": (holds(lambda t: t.pop(NORM)), f"missing from the file (1): {NORM}"),
    "shape": (
        holds(lambda t: t.update({NORM: torch.ones(2)})),
        f"of another shape (1): {NORM} [2] in the file, [32] here",
    ),
    "no table": (
        holds(lambda t: t.update({"model.embed_tokens.weight": torch.ones(())})),
        "model.embed_tokens.weight [] in the file, [35, 32] here",
    ),
    "a row of numbers": (
        holds(lambda t: t.update({"model.embed_tokens.weight": torch.ones(35)})),
        "model.embed_tokens.weight [35] in the file, [35, 32] here",
    ),
    "whole numbers": (
        holds(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        f"{UP} is torch.int8; only",
    ),
    "not finite": (holds(lambda t: t[UP].fill_(torch.nan)), f"NaN or infinite weights: {UP}"),
    "vocabulary": (
        holds(
            lambda t: t.update(
                {k: t[k][:30].clone() for k in ("lm_head.weight", "model.embed_tokens.weight")}
            )
        ),
        "has a vocabulary of 30 ids, the tokenizer text8 of 35 (mask included)",
    ),
    "another mask": (says(mask_token_id=7), "trained with the mask token of id 7, and that of"),
    "another tokenizer": (other_words, "and data.tokenizer_name_or_path=text8 is another"),
    "missing shard": (
        sharded(lambda f, _: (f / "model-00002-of-00002.safetensors").unlink()),
        "names model-00002-of-00002.safetensors, which is missing",
    ),
    "outside": (sharded(outside), "names the shard '../other.safetensors'; a plain file name"),
    "key of no shard": (
        sharded(lambda _, i: i["weight_map"].pop("lm_head.weight")),
        "disagree on 1 keys: lm_head.weight",
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{}"),
        "is damaged or was cut short",
    ),
    "pickles": (only("pytorch_model.bin"), "as pickles, which are not read: load it in"),
    "gguf beside": (only("model.gguf"), "has no weights but model.gguf, a GGUF file"),
    "gguf alone": (
        lambda f: (only("model.gguf")(f), (f / "config.json").unlink()),
        "holds model.gguf, a GGUF file, which is not read: give the folder with config.json",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_is_wrong(name, model, words, tmp_path, capsys):
    change, message = WRONG[name]
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    change(folder)
    run = ["mode=ppl_eval", "algo=ar", "algo.backbone=llama", f"eval.checkpoint_path={folder}"]
    said = ends_with_2([*words, *run], capsys)
    (line,) = [line for line in said.splitlines() if line.startswith("  - ")]
    assert message in line
    assert str(folder) in line


GIVEN = {
    "a GGUF file": (
        lambda f: [
            (f / "model.safetensors").rename(f / "m.gguf"),
            f"eval.checkpoint_path={f}/m.gguf",
        ],
        "m.gguf is a GGUF file, which is not read",
    ),
    "the other network": (
        lambda f: ["algo.backbone=dit", f"eval.checkpoint_path={f}"],
        "holds weights of the network llama, and algo.backbone=dit: set algo.backbone=llama",
    ),
    "the network of before": (
        lambda f: [f"eval.checkpoint_path={path(BY_ALGO['ar'])}"],
        "holds weights of the network dit, and algo.backbone=llama: set algo.backbone=dit",
    ),
    "another algorithm": (
        lambda f: ["algo=bamdlm", "block_size=4", f"eval.checkpoint_path={f}"],
        "the file holds ar weights, the run asks for algo=bamdlm",
    ),
    "sedd": (
        lambda f: ["algo=sedd", f"eval.checkpoint_path={f}"],
        "algo.backbone=llama takes no noise level, and algo=sedd tells it to its network",
    ),
    "an odd head from scratch": (
        lambda f: ["mode=train", "model.head_dim=7"],
        "model.head_dim=7 (null: hidden_size / n_heads) is odd",
    ),
    "heads from scratch": (
        lambda f: ["mode=train", "model.n_heads=4", "model.n_kv_heads=3"],
        "model.n_heads=4 is not a multiple of model.n_kv_heads=3",
    ),
    "a width from scratch": (
        lambda f: ["mode=train", "model.hidden_size=30", "model.n_heads=4"],
        "model.hidden_size=30 is not a multiple of model.n_heads=4: set model.head_dim",
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_one_line_says_what_does_not_go_together(name, model, words, tmp_path, capsys):
    make, message = GIVEN[name]
    model.save_pretrained(tmp_path / "model")
    changes = [word for word in make(tmp_path / "model") if isinstance(word, str)]
    run = {"mode": "ppl_eval", "algo": "ar", "algo.backbone": "llama"}
    run |= dict(word.split("=", 1) for word in changes)
    said = ends_with_2([*words, *(f"{key}={value}" for key, value in run.items())], capsys)
    (line,) = [line for line in said.splitlines() if line.startswith("  - ")]
    assert message in line
