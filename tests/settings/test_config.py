"""The settings of a run: defaults, groups, what null means, and where a run lives."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import settings
from settings import run_folder
from settings.defaults import visible_gpus
from settings.keys import CONFIGS, LEAVES, SCHEMA, choices, get, groups
from settings.schema import Config
from tests.published import commands

EXPERIMENTS = choices("experiment")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch, tmp_path):
    """A machine without a GPU, and an empty launch folder."""
    monkeypatch.setattr("settings.defaults.visible_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)


def gpus(monkeypatch, count, *, flash_attn=False):
    for module in ("settings.defaults", "settings.rules.machine"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: count)
        monkeypatch.setattr(f"{module}.has_package", lambda name: flash_attn)


def values(*overrides):
    config = settings.load(list(overrides))
    return {key: get(config, key) for key in LEAVES}


# ---- the table of the specification -----------------------------------------------------------

DEFAULTS = {
    "mode": "train",
    "seed": 1,
    "block_size": 1024,
    "loader.global_batch_size": 512,
    "loader.eval_global_batch_size": 512,
    "loader.batch_size": 512,
    "loader.eval_batch_size": 512,
    "loader.pin_memory": True,
    "sampling.num_sample_batches": 1,
    "sampling.var_length": False,
    "sampling.logdir": "./samples_bamdlm_len1024_blocksize1024",
    "sampling.nucleus_p": 1.0,
    "sampling.first_hitting": True,
    "sampling.kv_cache": False,
    "sampling.context_size": None,
    "training.ema": 0.9999,
    "training.antithetic_sampling": True,
    "training.sampling_eps": 1e-3,
    "training.sampling_eps_min": 1e-3,
    "training.sampling_eps_max": 1.0,
    "training.resample": False,
    "training.noise": "times",
    "training.counts": None,
    "training.count_law": "uniform",
    "training.views": 1,
    "training.block_sizes": None,
    "training.block_schedule": None,
    "training.from_pretrained": None,
    "training.eval_nll": True,
    "eval.checkpoint_path": None,
    "eval.disable_ema": False,
    "eval.tokens_per_batch": None,
    "eval.block_sizes": None,
    "eval.perplexity_batch_size": 8,
    "eval.gen_ppl_eval_model_name_or_path": "gpt2-large",
    "optim.name": "adamw",
    "optim.momentum": None,
    "optim.lr": 3e-4,
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0,
    "trainer.max_steps": 1_000_000,
    "trainer.gradient_clip_val": 1,
    "trainer.precision": "32-true",
    "trainer.val_check_interval": 10_000,
    "trainer.log_every_n_steps": 1000,
    "trainer.num_sanity_val_steps": 2,
    "trainer.num_nodes": 1,
    "trainer.limit_train_batches": None,
    "trainer.limit_val_batches": None,
    "data.train": "openwebtext",
    "data.valid": "wikitext103",
    "data.tokenizer_name_or_path": "gpt2",
    "data.wrap": True,
    "data.streaming": False,
    "data.insert_train_eos": True,
    "data.insert_train_special": True,
    "data.insert_valid_eos": True,
    "data.insert_valid_special": True,
    "algo.name": "bamdlm",
    "algo.backbone": "dit",
    "algo.T": 0,
    "algo.clip_search_delta": 0.05,
    "algo.clip_search_widths": [],
    "algo.fix_clipping": False,
    "algo.mdlm_loss_scale": False,
    "model.hidden_size": 768,
    "model.cond_dim": 128,
    "model.length": 1024,
    "model.n_blocks": 12,
    "model.n_heads": 12,
    "model.dropout": 0.1,
    "model.adaln": False,
    "noise.type": "loglinear",
    "lr_scheduler.name": "constant_warmup",
    "lr_scheduler.num_warmup_steps": 2500,
    "strategy.name": "ddp",
    "callbacks.checkpoint_monitor.monitor": "val/nll",
    "checkpointing.resume_from_ckpt": True,
    "wandb.offline": False,
}


@pytest.fixture(scope="module")
def defaults():
    return values()


@pytest.mark.parametrize("key", DEFAULTS)
def test_default_is_the_specified_one(key, defaults):
    if key == "trainer.precision" and visible_gpus():
        pytest.skip("on a GPU it is bf16-mixed")
    assert defaults[key] == DEFAULTS[key]


BY_ALGORITHM = {  # parameterization, time conditioning, ignore_bos, cross_attn, var_min, sampler
    "bamdlm": ("subs", False, True, True, True, "semi_ar"),
    "mdlm": ("subs", False, True, False, False, "semi_ar"),
    "sedd": ("sedd", True, True, False, False, "analytic"),
    "ar": ("ar", False, False, False, False, "ar"),
}


@pytest.mark.parametrize("name", BY_ALGORITHM)
def test_algorithm_has_the_specified_settings(name):
    algo = settings.load([f"algo={name}"]).algo
    assert BY_ALGORITHM[name] == (
        algo.parameterization,
        algo.time_conditioning,
        algo.ignore_bos,
        algo.cross_attn,
        algo.var_min,
        algo.sampler,
    )


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("small", (768, 128, 1024, 12, 12, 0.1)),
        ("tiny", (256, 64, 1024, 8, 8, 0.1)),
        ("medium", (1024, 128, 1024, 24, 16, 0.1)),
    ],
)
def test_model_has_the_specified_sizes(name, sizes):
    model = settings.load([f"model={name}"]).model
    assert sizes == dataclasses.astuple(model)[:6]


GROUPS = {
    "algo": "ar bamdlm bd3lm mdlm sedd",
    "data": "ag_news files lambada lm1b-gpt2 lm1b-wrap lm1b_wrap openwebtext openwebtext-split"
    " openwebtext-streaming ptb scientific_papers_arxiv scientific_papers_pubmed shakespeare"
    " text8 text8-crop wikitext103 wikitext2",
    "model": "medium small tiny xl",
    "noise": "cosine log loglinear square square_root",
    "optim": "adamw muon",
    "lr_scheduler": "constant constant_warmup cosine_decay_warmup",
    "strategy": "ddp fsdp",
    "callbacks": "checkpoint_every_n_steps checkpoint_monitor learning_rate_monitor",
}


def test_groups_are_the_specified_ones():
    assert set(groups()) == {*GROUPS, "experiment"}
    for group, names in GROUPS.items():
        assert set(choices(group)) >= set(names.split())


# ---- schema and YAML hold together ------------------------------------------------------------


def yaml_keys(node, prefix=""):
    for name, value in node.items():
        key = prefix + name
        if isinstance(value, dict) and key in SCHEMA:
            yield from yaml_keys(value, key + ".")
        else:
            yield key


def test_config_yaml_and_its_groups_hold_every_setting_of_the_schema_and_no_other():
    composed = OmegaConf.create(settings.composed_yaml([]))
    assert set(yaml_keys(OmegaConf.to_container(composed))) == set(LEAVES)


def rows_of_choices():
    """Every choice of every group at least once, a choice of each group in a row."""
    chosen = {group: choices(group) for group in GROUPS if group != "callbacks"}
    for i in range(max(map(len, chosen.values()))):
        yield [f"{group}={names[i % len(names)]}" for group, names in chosen.items()]


@pytest.mark.parametrize("row", rows_of_choices(), ids=" ".join)
def test_every_choice_composes_with_exactly_the_settings_of_the_schema(row):
    composed = OmegaConf.create(settings.composed_yaml(row))
    assert set(yaml_keys(OmegaConf.to_container(composed))) == set(LEAVES)
    settings.load(row)


def test_every_setting_says_what_it_means():
    silent = [key for key, leaf in LEAVES.items() if not leaf.doc]
    assert all(key.startswith("wandb.") for key in silent)


def test_a_group_in_the_help_has_the_choice_that_the_help_gives_it():
    """training.noise=counts is no choice of the group noise."""
    word = re.compile(r"(?<![\w.])([a-z_]+)=([a-z_]+)")
    named = [pair for leaf in LEAVES.values() for pair in word.findall(leaf.doc)]
    of_groups = [(name, value) for name, value in named if name in groups()]
    assert of_groups
    assert [(name, value) for name, value in of_groups if value not in choices(name)] == []


@pytest.mark.parametrize(
    "word", ["algo=sedd", "data=text8", "lr_scheduler=cosine_decay_warmup", "noise=cosine"]
)
def test_an_entry_of_the_code_without_a_file_is_told_which(word, monkeypatch):
    group, _, entry = word.partition("=")
    assert entry in choices(group)
    monkeypatch.setattr("settings.overrides.choices", lambda *_: ["another"])
    with pytest.raises(settings.ConfigError, match=f"configs/{group}/{entry}.yaml, which is miss"):
        settings.load([word])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_fits_together(name):
    needs = (
        ["eval.checkpoint_path=org/model"]
        if settings.load([f"experiment={name}"]).mode != "train"
        else []
    )
    made, problems, _ = settings.examine([f"experiment={name}", *needs])
    assert problems == []
    assert isinstance(made, Config)


@pytest.mark.parametrize("script", ["train_owt", "train_lm1b", "eval_owt", "zs_ppl", "gen_ppl"])
def test_paper_runs_are_there_for_every_algorithm(script):
    assert {f"{script}_{algo}" for algo in BY_ALGORITHM} <= set(EXPERIMENTS)


def test_bamdlm_runs_of_the_paper_have_its_numbers():
    made = values("experiment=train_lm1b_bamdlm")
    assert made["loader.batch_size"] == 64
    assert made["algo.clip_search_widths"] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert made["training.resample"]
    assert made["trainer.max_steps"] == 150_000
    assert values("experiment=var_len_bamdlm")["model.length"] % 16 == 0


def test_pretrained_weights_of_an_experiment_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("PRETRAIN_CKPT", "org/mdlm")
    assert values("experiment=train_owt_bamdlm")["training.from_pretrained"] == "org/mdlm"


# ---- what a user may type ---------------------------------------------------------------------


@pytest.mark.parametrize("arguments", commands().values(), ids=commands())
def test_published_command_line_composes_and_fits_together(arguments, tmp_path):
    weights = tmp_path / "weights.ckpt"
    weights.touch()
    local = [f"training.from_pretrained={weights}"] if "mode=train" in arguments else []
    if any("/path/to" in word for word in arguments):
        local.append(f"eval.checkpoint_path={weights}")
    made, problems, _ = settings.examine(arguments + local)
    assert problems == []
    assert made.block_size == 4


def test_published_training_command_accumulates_to_its_global_batch_on_one_cpu():
    arguments = next(a for name, a in commands().items() if name.startswith("train"))
    trainer = settings.load(arguments).trainer
    assert (trainer.devices, trainer.accumulate_grad_batches) == (1, 64)


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("data.insert_valid_eos=False", "data.insert_valid_eos", False),
        ("trainer.limit_val_batches=7", "trainer.limit_val_batches", 7),
        ("algo=mdlm", "algo.name", "mdlm"),
    ],
)
def test_a_leading_plus_makes_no_difference(plus, setting, key, value):
    assert values(plus + setting)[key] == value


@pytest.mark.parametrize("switch", ["wandb=null", "++wandb=null", "~wandb"])
def test_wandb_can_be_turned_off(switch):
    assert settings.load([switch]).wandb is None


def test_bd3lm_is_bamdlm():
    assert values("algo=bd3lm") == values("algo=bamdlm")


def test_lm1b_wrap_has_two_spellings():
    assert values("data=lm1b_wrap") == values("data=lm1b-wrap")
    assert values("data=lm1b_wrap")["data.eos_token"] == "[CLS]"


def test_callbacks_can_be_left_out():
    assert settings.load(["callbacks.checkpoint_monitor=null"]).callbacks.checkpoint_monitor is None
    chosen = settings.load(["callbacks=[learning_rate_monitor]"]).callbacks
    assert chosen.checkpoint_every_n_steps is None
    assert chosen.learning_rate_monitor.logging_interval == "step"


def test_the_last_of_two_equal_settings_counts():
    assert values("seed=3", "data=ptb", "seed=4", "data=wikitext2")["seed"] == 4
    assert values("data=ptb", "data=wikitext2")["data.train"] == "wikitext2"


def test_own_words_beat_an_experiment():
    made = values("data=wikitext2", "model.length=64", "experiment=quickstart")
    assert (made["data.train"], made["model.length"]) == ("wikitext2", 64)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("trainer.max_steps=1e5", "trainer.max_steps", 100_000),
        ("trainer.val_check_interval=1e3", "trainer.val_check_interval", 1000),
        ("trainer.limit_val_batches=1.0", "trainer.limit_val_batches", 1.0),
        ("trainer.limit_val_batches=1", "trainer.limit_val_batches", 1),
        ("trainer.precision=32", "trainer.precision", "32-true"),
        ("trainer.precision=bf16", "trainer.precision", "bf16-mixed"),
        ("wandb.name=7", "wandb.name", "7"),
        ("optim.lr=1", "optim.lr", 1.0),
        ("algo.clip_search_widths=[.5,1]", "algo.clip_search_widths", [0.5, 1.0]),
    ],
)
def test_value_gets_the_type_of_its_setting(word, key, value):
    got = values(word)[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "To be, or not to be: that's {the} [MASK] (a=b)",
        'said "yes", it\'s so\\',
        "\\'",
        "",
        "two\nlines",
        "5",
    ],
)
def test_a_prompt_is_taken_as_it_stands(text):
    assert values(f"sampling.prompt={text}")["sampling.prompt"] == text


def test_a_prompt_may_be_quoted_or_null():
    assert values("sampling.prompt='a, b'")["sampling.prompt"] == "a, b"
    assert values("sampling.prompt=null")["sampling.prompt"] is None


def test_interpolation_reads_other_settings_and_the_environment(monkeypatch):
    monkeypatch.setenv("WHERE", "elsewhere")
    made = values("data.cache_dir=${oc.env:WHERE}/x", "sampling.k=${block_size}")
    assert made["data.cache_dir"] == "elsewhere/x"
    assert made["sampling.k"] == made["block_size"]


def test_no_resolver_evaluates_python():
    with pytest.raises(settings.ConfigError, match=r"seed: Unsupported interpolation type eval"):
        settings.load(["seed=${eval:'1+1'}"])


# ---- what null means --------------------------------------------------------------------------


def test_autoregression_has_blocks_of_one():
    made = settings.load(["algo=ar"])
    assert made.block_size == 1
    assert made.sampling.logdir == "./samples_ar_len1024_blocksize1"


def test_batch_is_shared_out_and_rounded_up(monkeypatch):
    gpus(monkeypatch, 8)
    loader = settings.load(["trainer.num_nodes=2", "loader.global_batch_size=100"]).loader
    assert loader.batch_size == loader.eval_batch_size == 7


@pytest.mark.parametrize("name", ["gpu", "cuda", "auto"])
def test_gpus_are_taken_where_there_are_some(monkeypatch, name):
    gpus(monkeypatch, 4)
    trainer = settings.load([f"trainer.accelerator={name}"]).trainer
    assert (trainer.accelerator, trainer.devices, trainer.precision) == ("gpu", 4, "bf16-mixed")


def test_cpu_is_taken_when_asked_for(monkeypatch):
    gpus(monkeypatch, 4)
    trainer = settings.load(["trainer.accelerator=cpu"]).trainer
    assert (trainer.accelerator, trainer.devices, trainer.precision) == ("cpu", 1, "32-true")


@pytest.mark.parametrize(
    ("machine", "overrides", "backend"),
    [
        ((0, True), ["block_size=4"], "sdpa"),
        ((1, True), ["block_size=4"], "flex"),
        ((1, True), ["block_size=4", "model.hidden_size=192"], "flex"),  # heads of 16
        ((1, True), ["block_size=4", "model.hidden_size=168"], "sdpa"),  # and of 14
        ((1, True), ["algo=mdlm"], "flash_attn"),
        ((1, True), ["algo=mdlm", "trainer.precision=32"], "sdpa"),
        ((1, True), ["algo=mdlm", "data.wrap=False"], "sdpa"),
        ((1, True), ["algo=ar", "mode=sample_eval"], "sdpa"),
        ((1, False), ["algo=mdlm"], "sdpa"),
        ((1, True), ["algo=mdlm", "model.attn_backend=flex"], "flex"),
    ],
)
def test_attention_backend_is_what_machine_and_algorithm_have(
    monkeypatch, machine, overrides, backend
):
    gpus(monkeypatch, machine[0], flash_attn=machine[1])
    assert settings.load(overrides).model.attn_backend == backend


def test_cache_is_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert values()["data.cache_dir"] == "/somewhere/bamdlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert values()["data.cache_dir"] == str(Path.home() / ".cache" / "bamdlm")


def test_step_rule_follows_first_hitting():
    assert values()["sampling.steps"] == "first_hitting"
    assert values("sampling.first_hitting=False")["sampling.steps"] == "ancestral"
    assert values("algo=ar")["sampling.steps"] is None


def test_cosine_warms_up_for_a_tenth():
    made = values("lr_scheduler=cosine_decay_warmup", "trainer.max_steps=500")
    assert made["lr_scheduler.num_warmup_steps"] == 50


# ---- the run folder ---------------------------------------------------------------------------


def test_run_folder_is_named_by_data_algorithm_and_shaping_settings():
    made = settings.load(["block_size=4", "data=text8"])
    folder = Path(made.checkpointing.save_dir)
    assert folder == settings.run_dir(made)
    assert folder.parts[:2] == ("outputs", "text8")
    assert folder.name.startswith("bamdlm-1024-4-")
    assert len(folder.name.rpartition("-")[2]) == 8
    assert made.checkpointing.resume_ckpt_path == f"{folder}/checkpoints/last.ckpt"


def test_settings_that_came_later_leave_the_folders_of_older_runs():
    """The name that a command had before they were there."""
    made = settings.load(["block_size=4", "data=text8"])
    shapes = settings.shaping(made)
    assert {key: shapes[key] for key in run_folder.LATER} == run_folder.LATER
    older = {key: value for key, value in shapes.items() if key not in run_folder.LATER}
    digest = hashlib.sha256(json.dumps(older, sort_keys=True).encode()).hexdigest()
    assert settings.run_dir(made).name == f"bamdlm-1024-4-{digest[:8]}"


def test_run_folder_takes_the_name_given_to_wandb():
    folder = settings.run_dir(settings.load(["wandb.name=my run/4"]))
    assert folder.parent == Path("outputs/openwebtext")
    assert folder.name.startswith("my-run-4-")


def test_run_folder_of_own_files_is_one_folder_deep():
    folder = settings.run_dir(settings.load(["data=files", "data.train=/a/b c/mine.txt"]))
    assert folder.parent == Path("outputs/mine")


@functools.cache
def default_run():
    return settings.run_dir(settings.load([]))


@pytest.mark.parametrize(
    "same",
    [
        "loader.batch_size=8",
        "loader.num_workers=0",
        "trainer.max_steps=5",
        "trainer.num_nodes=2",
        "trainer.val_check_interval=5",
        "model.attn_backend=flex",
        "sampling.nucleus_p=0.9",
        "data.cache_dir=/x",
        "wandb=null",
        "mode=ppl_eval",
        "algo=bd3lm",
        "trainer.precision=32",
    ],
)
def test_setting_that_does_not_shape_training_keeps_the_run(same):
    assert settings.run_dir(settings.load([same])) == default_run()


@pytest.mark.parametrize(
    "other",
    [
        "seed=2",
        "loader.global_batch_size=8",
        "optim.lr=1e-3",
        "optim=muon",
        "data.insert_train_eos=False",
        "model.dropout=0",
        "training.ema=0",
        "trainer.precision=bf16",
        "noise=cosine",
        "lr_scheduler.num_warmup_steps=5",
        "algo.clip_search_widths=[.5]",
        "training.noise=counts",
        "training.counts=[2,3]",
        "training.count_law=learnt",
        "training.views=2",
        "training.block_sizes={4: 1, 1024: 1}",
    ],
)
def test_setting_that_shapes_training_makes_another_run(other):
    assert settings.run_dir(settings.load([other])) != default_run()


def test_block_sizes_in_the_same_proportions_are_one_run_whatever_the_validation_asks():
    one = settings.load(["training.block_sizes={16: .5, 4: .25, 1: .25}", "block_size=4"])
    two = settings.load(["training.block_sizes={1: 1, 4: 1, 16: 2}", "block_size=16"])
    assert settings.run_dir(one) == settings.run_dir(two)
    assert settings.run_dir(one).name.startswith("bamdlm-1024-1_4_16-")
    assert list(two.training.block_sizes.items()) == [(1, 0.25), (4, 0.25), (16, 0.5)]
    other = settings.load(["training.block_sizes={1: 1, 4: 2, 16: 1}"])
    assert settings.run_dir(one) != settings.run_dir(other)


def test_proportions_that_were_made_to_add_up_stay_as_they_are():
    """A checkpoint has them, and a run that goes on compares."""
    once = settings.load(["training.block_sizes={1: .1, 2: .2, 4: .7, 8: .13, 16: 1e-3}"])
    words = ", ".join(f"{size}: {share!r}" for size, share in once.training.block_sizes.items())
    again = settings.load([f"training.block_sizes={{{words}}}"])
    assert again.training.block_sizes == once.training.block_sizes


@pytest.mark.parametrize(
    ("context", "setting"),
    [
        ("lr_scheduler=cosine_decay_warmup", "trainer.max_steps=99999"),
        ("algo.clip_search_widths=[.5]", "trainer.val_check_interval=5"),
        ("training.count_law=learnt", "trainer.limit_val_batches=5"),
    ],
)
def test_setting_may_shape_training_through_another(context, setting):
    fixed = "lr_scheduler.num_warmup_steps=10"
    one, two = settings.load([context, fixed]), settings.load([context, fixed, setting])
    assert settings.run_dir(one) != settings.run_dir(two)


def test_a_warm_up_that_follows_from_the_number_of_steps_is_explained():
    """lr_scheduler.num_warmup_steps=null, a run made longer."""
    null = "lr_scheduler.num_warmup_steps=null"
    old = dataclasses.asdict(settings.load([null, "trainer.max_steps=100"]))
    assert settings.differences(settings.load([null, "trainer.max_steps=200"]), old) == [
        "lr_scheduler.num_warmup_steps=20 (the checkpoint has 10; null is a tenth of"
        " trainer.max_steps: set lr_scheduler.num_warmup_steps=10 to go on)"
    ]


def test_differences_from_a_checkpoint_are_named():
    old = dataclasses.asdict(settings.load(["block_size=4", "seed=2"]))
    assert settings.differences(settings.load(["block_size=8", "seed=2"]), old) == [
        "block_size=8 (the checkpoint has 4)"
    ]
    sizes = settings.load(["training.block_sizes={4: 1, 8: 1}", "block_size=4", "seed=2"])
    (found,) = settings.differences(sizes, old)
    assert found == "training.block_sizes={4: 0.5, 8: 0.5} (the checkpoint has None)"
    del old["training"]["block_sizes"]  # of a run before there was the setting
    assert settings.differences(sizes, old) == [found]
    old["algo"]["name"] = "bd3lm"
    old["trainer"]["precision"] = 32
    del old["optim"]
    assert settings.differences(settings.load(["block_size=4", "seed=2"]), old) == []
    assert settings.differences(settings.load([]), None) == []


def trained(overrides, name, age):
    """A run folder with a checkpoint that is `age` seconds old."""
    made = settings.load(overrides)
    folder = settings.write_settings(made).parent
    path = folder / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.utime(path, (1e9 - age, 1e9 - age))
    return str(path)


def test_newest_checkpoint_of_the_algorithm_is_evaluated_and_named():
    trained(["algo=mdlm"], "last.ckpt", 0)
    trained(["algo=bamdlm"], "last.ckpt", 2)
    newest = trained(["algo=bamdlm", "seed=2"], "best.ckpt", 1)
    made, problems, notes = settings.examine(["mode=ppl_eval"])
    assert problems == []
    assert made.eval.checkpoint_path == newest
    assert notes == [f"eval.checkpoint_path is not set: taking {newest}"]


def test_the_run_that_the_command_names_comes_before_a_newer_one(tmp_path):
    other = trained(["algo=bamdlm"], "last.ckpt", 0)
    named = f"checkpointing.save_dir={tmp_path / 'mine'}"
    own = trained(["algo=bamdlm", named], "last.ckpt", 9)
    beside = "checkpointing.save_dir=outputs/mine"
    older = trained(["algo=bamdlm", beside], "last.ckpt", 9)
    for words, taken in (([named], own), ([beside], older), ([], other)):
        made, _, notes = settings.examine(["mode=ppl_eval", *words])
        assert made.eval.checkpoint_path == taken
        assert notes == [f"eval.checkpoint_path is not set: taking {taken}"]


def test_a_run_folder_of_a_name_of_its_own_is_found():
    own = trained(["algo=bamdlm", "checkpointing.save_dir=outputs/own"], "last.ckpt", 0)
    made, _, _ = settings.examine(["mode=ppl_eval"])
    assert Path(made.eval.checkpoint_path).resolve() == Path(own).resolve()


def test_settings_of_a_run_are_written_whole(tmp_path):
    made = settings.load([])
    path = settings.write_settings(made)
    assert json.loads(path.read_text()) == settings.shaping(made)
    assert [file.name for file in path.parent.iterdir()] == ["settings.json"]


def test_foreign_folder_under_outputs_is_passed_over():
    folder = Path("outputs/a/b")
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text("{not json")
    assert run_folder.newest_checkpoint(settings.load([])) is None


def test_importing_and_loading_needs_no_torch():
    code = (
        "import settings, sys; settings.load([]);"
        " print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CONFIGS.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()" or Path("/dev/nvidiactl").exists()


def test_a_later_experiment_null_takes_an_earlier_choice_back():
    plain = settings.load(["block_size=4", "wandb=null"])
    taken_back = settings.load(
        ["experiment=quickstart", "block_size=4", "wandb=null", "experiment=null"]
    )
    assert settings.shaping(taken_back) == settings.shaping(plain)


# ---- files of one's own -------------------------------------------------------------------------


def test_a_file_of_config_dir_counts_as_one_of_configs():
    """Whatever the folder is called, and also where it names another file of its own."""
    name = "a 'b' {c}, d=e"
    for group in ("experiment", "model"):
        Path(name, group).mkdir(parents=True)
    Path(name, "model", "own.yaml").write_text((CONFIGS / "model/tiny.yaml").read_text())
    text = (CONFIGS / "experiment/quickstart.yaml").read_text()
    line = "  - override /algo: bamdlm\n"
    text = text.replace(line, f"{line}  - override /model: own\n")
    Path(name, "experiment", "own.yaml").write_text(text)
    for words in (["--config-dir", name], [f"--config-dir={Path(name).absolute()}"]):
        own = settings.load(["experiment=own", *words, "seed=3"])
        theirs = settings.load(["experiment=quickstart", "model=tiny", "seed=3"])
        assert settings.shaping(own) == settings.shaping(theirs)
        assert settings.run_dir(own) == settings.run_dir(theirs)
    assert "seed: 3" in settings.composed_yaml(["experiment=own", *words, "seed=3"])
    with pytest.raises(settings.ConfigError, match=r"experiment=ow does not exist. .* mean own\?"):
        settings.load(["experiment=ow", *words])
