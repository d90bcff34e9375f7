"""The `python main.py` lines of the published README, run by bash as they stand.

Model and corpus of the recordings take the place of the published ones by settings added at the end
of each line; nothing else of it is changed.
"""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, load_json
from published import PAGE
from runs import run as forked
from runs import write_text

from checkpointing import export
from checkpointing.layouts import read_checkpoint
from data.tokenizer import get_tokenizer

ROOT = Path(__file__).parents[2]
BLOCKS = [b for b in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S) if "main.py" in b]
SAMPLE_HUB, SAMPLE_LOCAL, EVALUATE, TRAIN = range(4)
MANIFEST = load_json("manifest.json")
SAMPLES = "sample_logs/samples_genlen_bamdlm_blocksize4"
NOTE = "note: algo.T=1000 has no effect: steps=first_hitting ends when nothing is masked\n"


def recorded(name):
    return GOLDEN / f"checkpoints/{name}.ckpt"


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The empty folder, after the README's mkdir. main.py is where `python main.py` looks."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "main.py").symlink_to(ROOT / "main.py")
    subprocess.run(["bash", "-c", "mkdir outputs watch_folder logs sample_logs"], cwd=folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What stands for kuleshov-group/bamdlm-owt-block_size4."""
    checkpoint = read_checkpoint(recorded("bd3lm_bs4"))
    tokenizer = get_tokenizer(str(GOLDEN / "tokenizer"))
    return export.export(checkpoint, tmp_path_factory.mktemp("hub") / "model", tokenizer)


@pytest.fixture(scope="module")
def bash(launch, tmp_path_factory):
    """bash(number, **settings): that block of the README, the settings at its end. interpreter:
    it starts one, as a user does; this takes longer than what it does."""
    place = tmp_path_factory.mktemp("corpus")
    corpus = [
        f"data.train={write_text(place / 'train.txt', 3000, 1)}",
        f"data.valid={write_text(place / 'valid.txt', 300, 2)}",
        f"data.tokenizer_name_or_path={GOLDEN / 'tokenizer'}",
        f"data.cache_dir={place / 'cache'}",
        "trainer.accelerator=cpu",
        "loader.num_workers=0",
    ]
    hidden = ("WANDB_", "CUDA_VISIBLE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(place),  # nobody is logged in anywhere
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }

    def ask(number, settings, path):
        more = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
        done = subprocess.run(
            ["bash", "-c", f'{BLOCKS[number].rstrip()} "$@"', "bash", *corpus, *more],
            cwd=launch,
            env=environment | {"PATH": f"{path}:{environment['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    def run(number, *, interpreter=False, **settings):
        """In an interpreter of its own. Else bash hands its words to a `python` that notes them, a
        fork of this process runs them, and bash is asked again with what that said."""
        if interpreter:
            return ask(number, settings, ".")
        place = tmp_path_factory.mktemp("python")
        python, said = place / "python", place / "out"
        python.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {place}/words\n")
        python.chmod(0o755)
        ask(number, settings, place)
        option, script, *words = (place / "words").read_text().split("\0")[:-1]
        assert (option, script) == ("-u", "main.py")

        def before():
            os.chdir(launch)
            os.dup2(os.open(place / "err", os.O_WRONLY | os.O_CREAT), 2)

        code = forked(words, said, before=before, environment={"HOME": environment["HOME"]})[0]
        python.write_text(f"#!/bin/bash\ncat {said}\ncat {place}/err >&2\nexit {code}\n")
        return ask(number, settings, place)

    return run


def network():
    names = ("hidden_size", "cond_dim", "n_blocks", "n_heads")
    return {f"model__{name}": MANIFEST[name] for name in names}


def test_the_readme_has_these_commands():
    modes = [re.search(r"mode=(\w+)", block)[1] for block in BLOCKS]
    assert modes == ["sample_eval", "sample_eval", "ppl_eval", "train"]


@pytest.mark.parametrize("number", [SAMPLE_HUB, SAMPLE_LOCAL])
def test_sampling_beyond_the_training_length(number, bash, launch, exported):
    (launch / SAMPLES).unlink(missing_ok=True)
    from_hub = number == SAMPLE_HUB
    length = 8 * MANIFEST["length"]  # of what the network was trained on
    out, err = bash(
        number,
        eval__checkpoint_path=exported if from_hub else recorded("bd3lm_bs4"),
        eval__gen_ppl_eval_model_name_or_path=GOLDEN / "judge",
        model__length=length,
        **({} if from_hub else network()),
    )
    assert err == NOTE
    assert SAMPLES in out
    with (launch / SAMPLES).open(newline="") as file:
        (row,) = csv.DictReader(file)  # loader.eval_batch_size=1
    assert list(row)[:8] == [*load_json("metrics/csv.json")["save_dict"], "row", "run"]
    assert int(row["gen_nfes"]) == length - 1  # first hitting: one token each; BOS is given
    assert 0 < float(row["gen_entropy"]) < math.log(length)
    assert math.isfinite(float(row["gen_ppl"]))
    assert row["samples"].startswith("<|endoftext|>")


def test_likelihood(bash, launch, exported):
    out, err = bash(EVALUATE, eval__checkpoint_path=exported, model__length=MANIFEST["length"])
    assert out == ""  # the README sends it to a file
    assert "perplexity" not in err
    log = (launch / "logs/bamdlm_owt_block_size4.log").read_text()
    ppl = float(re.search(r"perplexity ([\d.]+) ± ", log)[1])
    (written,) = launch.glob("outputs/**/ppl_valid-*.json")
    found = json.loads(written.read_text())
    assert found["ppl"] == pytest.approx(ppl, abs=1e-3)
    assert found["checkpoint"] == str(exported)
    assert found["bound"] == "upper bound (NELBO)"


def test_training_from_a_pretrained_checkpoint(bash, launch):
    settings = {
        "training__from_pretrained": recorded("mdlm"),
        "model__length": MANIFEST["length"],
        **network(),
        "trainer__max_steps": 2,
        "loader__global_batch_size": 16,
        "loader__eval_global_batch_size": 16,
    }
    out, err = bash(TRAIN, interpreter=True, **settings)
    assert [line for line in (out + err).splitlines() if "wandb" in line] == [
        "wandb: nobody is logged in, logging to"
        f" {folder_of(out)}/wandb (wandb login, or wandb=null)"
    ]
    assert "starting from the weights of" in out
    folder = launch / folder_of(out)
    assert folder.match("outputs/*/bamdlm-owt-block_size4-*")
    assert list(folder.glob("wandb/offline-run-*"))
    last = folder / "checkpoints/last.ckpt"
    trained = read_checkpoint(str(last))
    assert (trained.algo, trained.block_size, trained.step) == ("bamdlm", 4, 2)
    assert (folder / "settings.json").is_file()
    before = last.stat().st_mtime_ns
    out, _ = bash(TRAIN, **settings)  # the same line again: nothing is trained twice
    assert "going on from step 2" in out
    assert last.stat().st_mtime_ns == before


def folder_of(out) -> str:
    return re.search(r"run folder: (\S+)", out)[1]
