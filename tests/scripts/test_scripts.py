"""The shell scripts of the published runs: what they start (spec §9)."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_job import clean_environment

ROOT = Path(__file__).parents[2]
ALGORITHMS = ("ar", "sedd", "mdlm", "bamdlm")
SINGLE = [
    *(f"train/train_{data}_{algo}.sh" for data in ("owt", "lm1b") for algo in ALGORITHMS),
    *(f"ppl/eval_{data}_{algo}.sh" for data in ("owt", "lm1b") for algo in ALGORITHMS),
    *(f"zs_ppl/zs_ppl_{algo}.sh" for algo in ALGORITHMS),
    *(f"gen_ppl/gen_ppl_{algo}.sh" for algo in ALGORITHMS),
    *(f"var_len/var_len_{algo}.sh" for algo in ("ar", "bamdlm", "sedd")),
]
BATCH = [
    "ppl/batch_ppl.sh",
    "zs_ppl/batch_zs_ppl.sh",
    "gen_ppl/batch_gen_ppl.sh",
    "var_len/batch_var_len.sh",
]
HEADER = "#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120"


def dry_run(script, *arguments, **environment):
    """The words of the command a script would run."""
    done = subprocess.run(
        ["bash", ROOT / "scripts" / script, "--dry-run", *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(**environment),
        check=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def overrides(script, *arguments, **environment):
    (words,) = dry_run(script, *arguments, **environment)
    assert words[1:3] == ["-u", "main.py"]
    return words[3:]


def test_the_folders_hold_these_scripts_and_no_others():
    found = {str(p.relative_to(ROOT / "scripts")) for p in ROOT.glob("scripts/*/*.sh")}
    assert found == {*SINGLE, *BATCH}


@pytest.mark.parametrize("script", [*SINGLE, *BATCH])
def test_a_script_is_short_has_the_one_header_and_names_no_site(script):
    path = ROOT / "scripts" / script
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert len(lines) <= 11
    assert lines[1] == HEADER
    site = r"partition|account|constraint|gres|mail|conda|module load|/home|/share|--time"
    assert not re.search(site, path.read_text())


@pytest.fixture(scope="module")
def configs():
    """{script: its Config}, all composed and checked as they stand."""
    from modes.sampling_params import sampling_problems
    from settings import check, load

    made = {}
    for script in SINGLE:
        config = load(overrides(script))
        problems, _ = check(config, rules=[sampling_problems])
        assert [p for p in problems if "eval.checkpoint_path is not set" not in p] == [], script
        made[script] = config
    return made


def test_every_script_trains_evaluates_or_samples_its_algorithm(configs):
    modes = {"train": "train", "ppl": "ppl_eval", "zs_ppl": "ppl_eval"}
    for script, config in configs.items():
        folder, name = script.removesuffix(".sh").split("/")
        assert config.algo.name == name.rsplit("_", 1)[1]
        assert config.mode == modes.get(folder, "sample_eval")


def test_training_is_as_published(configs):
    for script in SINGLE[:8]:
        config = configs[script]
        owt, bamdlm = "owt" in script, config.algo.name == "bamdlm"
        assert config.loader.global_batch_size == 512
        assert (config.optim.lr, config.training.ema, config.model.dropout) == (3e-4, 0.9999, 0.1)
        assert config.model.length == (1024 if owt else 128)
        assert config.loader.batch_size == (16 if owt else 64 if bamdlm else 128)
        assert config.trainer.max_steps == (150_000 if bamdlm else 1_000_000)
        assert config.data.train == ("openwebtext-train" if owt else "lm1b")
        if owt:
            data = config.data
            assert not data.insert_train_special
            assert not data.insert_valid_special
            assert not data.insert_valid_eos
        if bamdlm:
            assert config.algo.clip_search_widths == [0.5, 0.6, 0.7, 0.8, 0.9]
            assert config.training.resample


def test_bamdlm_trains_every_block_size_from_the_mdlm_run():
    from settings import load

    for size in (4, 8, 16):
        config = load(overrides("train/train_owt_bamdlm.sh", BLOCK_SIZE=size))
        assert config.block_size == size
        assert config.wandb.name == f"bamdlm-owt-block_size{size}"
    given = "training.from_pretrained=mdlm.ckpt"
    config = load(overrides("train/train_lm1b_bamdlm.sh", given))
    assert config.training.from_pretrained == "mdlm.ckpt"


def test_perplexities_are_as_published(configs):
    for script in SINGLE[8:20]:
        config = configs[script]
        assert config.model.length == (128 if "eval_lm1b" in script else 1024)
    assert not configs["ppl/eval_owt_bamdlm.sh"].data.insert_valid_special
    for algo in ("mdlm", "sedd"):
        assert not configs[f"ppl/eval_owt_{algo}.sh"].algo.ignore_bos
    for algo in ALGORITHMS:
        assert not configs[f"zs_ppl/zs_ppl_{algo}.sh"].data.insert_valid_eos


def test_samples_are_drawn_as_published(configs):
    for script in SINGLE[20:]:
        config = configs[script]
        algo, variable = config.algo.name, script.startswith("var_len")
        assert config.sampling.nucleus_p == (0.99 if algo == "sedd" else 0.9)
        assert config.sampling.kv_cache == (algo in ("ar", "bamdlm"))
        assert config.sampling.num_sample_batches == (1 if variable else 25)
        assert config.sampling.var_length == variable
        if algo != "ar":
            assert (1000 if algo == "sedd" else 5000) == config.algo.T
        long = variable and algo != "sedd"
        assert config.model.length == (131_008 if long else 1024)
    assert configs["gen_ppl/gen_ppl_mdlm.sh"].block_size == 1024
    assert configs["var_len/var_len_bamdlm.sh"].block_size == 16


def test_each_seed_and_length_has_a_folder_of_its_own():
    from settings import load

    chosen = ("seed=7", "model.length=2048")
    config = load(overrides("gen_ppl/gen_ppl_bamdlm.sh", *chosen, BLOCK_SIZE=8))
    assert config.sampling.logdir == "sample_logs/gen_ppl_bamdlm_len2048_bs8_seed7"


@pytest.mark.parametrize("data", ["ptb", "lm1b-gpt2", "scientific_papers_arxiv"])
def test_zero_shot_data_is_chosen_on_the_command_line(data):
    from modes.sampling_params import sampling_problems
    from settings import check, load

    config = load(overrides("zs_ppl/zs_ppl_bamdlm.sh", f"data={data}"))
    assert check(config, rules=[sampling_problems])[0] == []
    assert config.data.valid == load([f"data={data}"]).data.valid


@pytest.mark.parametrize(
    ("given", "backbone"),
    [(None, "hf_dit"), ("a b/last.ckpt", "dit"), ("export", "hf_dit"), ("name/id", "hf_dit")],
)
def test_a_checkpoint_says_how_it_is_loaded(given, backbone):
    environment = {} if given is None else {"CHECKPOINT": given}
    words = overrides("ppl/eval_owt_bamdlm.sh", BLOCK_SIZE=8, **environment)
    published = "kuleshov-group/bamdlm-owt-block_size8"
    assert f"eval.checkpoint_path={given or published}" in words
    assert f"algo.backbone={backbone}" in words


def test_batches_cover_the_published_runs():
    lines = dry_run("gen_ppl/batch_gen_ppl.sh")
    assert len(lines) == 12 * (2 + 1 + 2 + 2 * 3)
    assert len({tuple(line) for line in lines}) == len(lines)
    zero_shot = dry_run("zs_ppl/batch_zs_ppl.sh")
    named = {word for line in zero_shot for word in line if word.startswith("data=")}
    assert len(named) == 8
    assert len(zero_shot) == 8 * (3 + 3)
    assert len(dry_run("var_len/batch_var_len.sh")) == 20 * 3
    assert len(dry_run("ppl/batch_ppl.sh", ALGOS="ar bamdlm", BLOCK_SIZE=4)) == 2 * 2
