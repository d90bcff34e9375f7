"""The recipes of docs/fine-tuning.md in miniature, and the layout of the checkpoints they write."""

import random

import pytest
import torch
from checkpoint_helpers import BY_ALGO, INFO, MANIFEST, path
from conftest import GOLDEN

import main
from checkpointing.layouts import read_checkpoint
from training.checkpoint_io.files import SafeCheckpointIO

STEPS = 2
LENGTH = MANIFEST["length"]
BLOCK_SIZES = [size for size in MANIFEST["bd3lm_block_sizes"] if 1 < size < LENGTH]
CONDITIONING = ("sigma_map.", "adaLN_modulation.")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, *words): train two steps of an experiment with a tiny model; its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    words = random.Random(0)
    for name, lines in (("train.txt", 60), ("valid.txt", 40)):
        text = ("".join(words.choices("abcdefgh ", k=80)) for _ in range(lines))
        (folder / name).write_text("\n".join(text))
    tiny = {
        "data": "files",
        "data.train": folder / "train.txt",
        "data.valid": folder / "valid.txt",
        "data.tokenizer_name_or_path": GOLDEN / "tokenizer",
        "data.cache_dir": folder / "cache",
        "model.length": LENGTH,
        **{f"model.{k}": MANIFEST[k] for k in ("hidden_size", "cond_dim", "n_blocks", "n_heads")},
        "model.attn_backend": "sdpa",
        "loader.global_batch_size": 2,
        "loader.eval_global_batch_size": 2,
        "loader.batch_size": 2,
        "loader.eval_batch_size": 2,
        "loader.num_workers": 0,
        "lr_scheduler.num_warmup_steps": 1,
        "algo.clip_search_widths": "[0.5]",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS,
        "trainer.limit_val_batches": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "wandb": "null",
    }
    finished = {}

    def train(experiment, **changes):
        key = experiment, *sorted(changes.items())
        if key not in finished:
            here = folder / str(len(finished))
            settings = {**tiny, "checkpointing.save_dir": here} | {
                name.replace("__", "."): value for name, value in changes.items()
            }
            if "bamdlm" not in experiment:
                del settings["algo.clip_search_widths"]
            words = [f"experiment={experiment}", *(f"{k}={v}" for k, v in settings.items())]
            assert main.main(words) == 0
            finished[key] = here / "checkpoints" / "last.ckpt"
        return finished[key]

    return train


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_mdlm_then_bamdlm_as_in_the_paper(run, capsys, block_size):
    """850K steps, then 150K, in the paper; here the same two experiment files, 2 steps each."""
    mdlm = run("pretrain_owt_mdlm")
    bamdlm = run("train_owt_bamdlm", block_size=block_size, training__from_pretrained=mdlm)
    out = capsys.readouterr().out
    assert "new in this run: sampling_eps_min, sampling_eps_max\n" in out
    before, after = read_checkpoint(mdlm), read_checkpoint(bamdlm)
    assert (before.algo, after.algo) == ("mdlm", "bamdlm")
    assert after.block_size == block_size
    assert after.weights.keys() == before.weights.keys()
    assert after.ema_updates == before.ema_updates + STEPS
    assert after.interval is not None
    assert_near(before, after)


def test_ar_then_bamdlm(run, capsys):
    ar = run("train_owt_ar")
    bamdlm = run("finetune_owt_bamdlm_from_ar", training__from_pretrained=ar)
    out = capsys.readouterr().out
    before, after = read_checkpoint(ar), read_checkpoint(bamdlm)
    assert (before.algo, after.algo) == ("ar", "bamdlm")
    new = after.weights.keys() - before.weights.keys()
    assert new == {key for key in after.weights if any(part in key for part in CONDITIONING)}
    assert all(f"backbone.{key}" in out for key in new)
    assert_near(before, after)


def assert_near(before, after):
    """Two steps of AdamW from where the other run ended, not from a new network."""
    rate = after.config["optim"]["lr"]
    for key, value in before.weights.items():
        assert (after.weights[key] - value).abs().max() <= 3 * STEPS * rate


@pytest.fixture(scope="module")
def written(run):
    """{algorithm: checkpoint written by this project}, at the sizes of the recordings."""
    mdlm = run("pretrain_owt_mdlm")
    return {
        "mdlm": mdlm,
        "ar": run("train_owt_ar"),
        "sedd": run("train_owt_sedd"),
        "bamdlm": run(
            "train_owt_bamdlm", block_size=BLOCK_SIZES[0], training__from_pretrained=mdlm
        ),
    }


@pytest.mark.parametrize("algo", BY_ALGO)
def test_training_checkpoints_have_the_published_layout(written, algo):
    ours = SafeCheckpointIO().load_checkpoint(written[algo])
    theirs = SafeCheckpointIO().load_checkpoint(path(BY_ALGO[algo]))
    assert list(ours) == list(theirs)
    assert same_kind(ours["state_dict"], theirs["state_dict"])
    assert list(ours["state_dict"]) == INFO[BY_ALGO[algo]]["state_dict_keys"]
    for key in ("loops", "ema", "optimizer_states"):
        assert same_kind(ours[key], theirs[key])
    assert ours["sampler"].keys() >= theirs["sampler"].keys()
    assert same_kind(ours["sampler"]["random_state"], theirs["sampler"]["random_state"])
    for eps in ("sampling_eps_min", "sampling_eps_max"):
        assert same_kind(ours.get(eps), theirs.get(eps))
    (schedule,), (published,) = ours["lr_schedulers"], theirs["lr_schedulers"]
    assert schedule.keys() == published.keys()
    assert ours["hyper_parameters"].keys() == theirs["hyper_parameters"].keys()


def same_kind(ours, theirs) -> bool:
    """Equal keys in equal order, types, shapes and dtypes; values may differ."""
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same_kind(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        same = len(ours) == len(theirs)
        return same and all(map(same_kind, ours, theirs))
    if isinstance(theirs, torch.Tensor):
        return ours.shape == theirs.shape and ours.dtype == theirs.dtype
    number = (int, float)
    return type(ours) is type(theirs) or (isinstance(ours, number) and isinstance(theirs, number))


@pytest.mark.parametrize("algo", BY_ALGO)
def test_training_checkpoints_are_plain_for_everybody(written, algo):
    """torch's own restricted reader takes them: no class of any project is pickled."""
    raw = torch.load(written[algo], weights_only=True)
    assert raw["hyper_parameters"]["config"]["algo"]["name"] == algo
    assert read_checkpoint(written[algo]).algo == algo
