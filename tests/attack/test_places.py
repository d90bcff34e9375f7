"""Something else in the place of a file or folder: a FIFO, a device, a socket, a folder, a pickle.

Every setting that names a place is attacked with each, and each file in the folders that this
project reads. The settings come from the schema: one that is new is a place unless TEXTS has it.
"""

import os
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
from conftest import GOLDEN
from runs import ALGORITHMS, run, tiny
from tools import answer, clear

from settings.keys import LEAVES

# Settings of free text that name no place.
TEXTS = {
    *("data.text_column", "data.eos_token", "data.train_revision", "data.valid_revision"),
    *("sampling.prompt", "wandb.project", "wandb.notes", "wandb.group", "wandb.job_type"),
    *("wandb.name", "wandb.id", "demo.host"),
}
PLACES = [
    key
    for key, leaf in LEAVES.items()
    if leaf.limit is None and leaf.hint in (str, str | None) and key not in TEXTS
]
JUDGE = "eval.gen_ppl_eval_model_name_or_path"


class Trap:
    def __reduce__(self):
        return os.mkdir, (str(Path.cwd() / "ran"),)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def _sparse(path: str) -> None:
    with open(path, "wb") as file:
        file.truncate(8 << 30)


def _link(target: str):
    return lambda path: os.symlink(target, path)


THINGS = {
    "a FIFO": os.mkfifo,
    "zeros": _link("/dev/zero"),
    "a pickle": lambda path: Path(path).write_bytes(pickle.dumps({"state_dict": Trap()})),
    "a folder": os.mkdir,
    "a full device": _link("/dev/full"),
    "the memory": _link("/proc/self/mem"),
    "a socket": _socket,
    "a link to itself": lambda path: os.symlink(os.path.basename(path), path),
    "any bytes": lambda path: Path(path).write_bytes(bytes(range(256)) * 20),
    "zeros of 8 GB": _sparse,
}
QUICK = ("a FIFO", "zeros", "a pickle")  # the others are slow for settings that a network precedes
# What is right there: a folder, or a file or link that is replaced.
RIGHT = {
    "checkpointing.save_dir": {"a folder"},
    "data.cache_dir": {"a folder"},
    "sampling.trajectory": {"a pickle", "any bytes", "zeros of 8 GB", "a link to itself"}
    | {"the memory"},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a trained run, prepared rows and samples, and the words of its command."""
    folder = tmp_path_factory.mktemp("good")
    words = [*tiny(folder), *ALGORITHMS["bamdlm"], "trainer.max_steps=2", f"{JUDGE}=null"]
    words += ["trainer.enable_progress_bar=false", "sampling.num_sample_batches=1"]
    words += ["sampling.batch_size=1", "lr_scheduler.num_warmup_steps=1"]
    words += [f"checkpointing.save_dir={folder / 'run'}"]
    code, text = run(words, folder / "log")
    assert code == 0, text
    return folder, words


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, _launch_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def mode_of(key: str) -> str:
    """One that reads the place."""
    if key.startswith("sampling.") or key == JUDGE:
        return "sample_eval"
    return "ppl_eval" if key.startswith("eval.") else "train"


def words_of(good, mode: str) -> list[str]:
    folder, words = good
    place = folder / "run/checkpoints/last.ckpt"
    more = [f"mode={mode}", "checkpointing.save_dir=run", "sampling.logdir=texts.csv"]
    return [*words, *more, *[f"eval.checkpoint_path={place}"] * mode.endswith("_eval")]


def names(key: str) -> list[str]:
    """x, with each suffix that the setting's line of help has."""
    found = re.findall(r"\.(?:txt|jsonl|parquet|ckpt|html)\b", LEAVES[key].doc)
    return [f"x{suffix}" for suffix in found] or ["x.txt" if key == "data.valid" else "x"]


def is_refused(words: list[str], key: str, name: str) -> None:
    """In one line that has the setting and the path; nothing ran."""
    code, message = answer(words)
    assert code == 2, message
    clear(message)
    assert re.search(rf"{re.escape(key)}[=:.]", message), message
    assert name in message, message
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("key", "thing"),
    [
        pytest.param(key, thing, marks=[pytest.mark.slow] * (thing not in QUICK))
        for key in PLACES
        for thing in THINGS
    ],
)
def test_no_setting_takes_it_for_its_own(key, thing, good):
    for name in names(key):
        THINGS[thing](name)
        words = [*words_of(good, mode_of(key)), f"{key}={name}"]
        if thing in RIGHT.get(key, ()):
            code, message = answer(words)
            assert code == 0, message
        else:
            is_refused(words, key, name)


def test_there_are_places():
    assert len(PLACES) >= 11
    assert LEAVES.keys() >= TEXTS


# ---- files in folders ---------------------------------------------------------------------------


def exported(good) -> str:
    """An exported folder, which is a tokenizer's as well."""
    from scripts import export_hf

    checkpoint = str(good[0] / "run/checkpoints/last.ckpt")
    assert export_hf.main([checkpoint, "x", "--tokenizer", "text8"]) == 0
    return "x"


def judge(good) -> str:
    shutil.copytree(GOLDEN / "judge", "x")
    return "x"


def cache(good) -> str:
    shutil.copytree(good[0] / "cache", "x")
    return "x"


def samples(good) -> str:
    os.mkdir("x")
    for name in ("texts.csv", "texts.csv.log.jsonl"):
        Path("x", name).touch()
    return "x/texts.csv"


def run_folder(good) -> str:
    shutil.copytree(good[0] / "run", "x")
    return "x"


# setting: (what makes its folder, the files whose place is attacked, mode)
FOLDERS = {
    "eval.checkpoint_path": (exported, ("config.json", "model.safetensors"), "ppl_eval"),
    "data.tokenizer_name_or_path": (
        exported,
        ("tokenizer.json", "tokenizer_config.json"),
        "train",
    ),
    JUDGE: (judge, ("config.json", "tokenizer.json", "model.safetensors"), "sample_eval"),
    "data.cache_dir": (
        cache,
        ("rows/*-train-*/about.json", "rows/*-train-*/ids.bin", "rows/*-train-*/counts.bin"),
        "train",
    ),
    "sampling.logdir": (samples, ("texts.csv", "texts.csv.log.jsonl"), "sample_eval"),
    "checkpointing.save_dir": (run_folder, ("metrics.csv",), "train"),
}


@pytest.mark.parametrize("thing", ["a FIFO", "zeros", "a link to itself"])
@pytest.mark.parametrize(
    ("key", "file"), [(key, file) for key, entry in FOLDERS.items() for file in entry[1]]
)
def test_no_file_of_a_folder_is_anything_else(key, file, thing, good, capsys):
    make, _, mode = FOLDERS[key]
    place = make(good)
    capsys.readouterr()
    (path,) = Path("x").glob(file)
    path.unlink()
    THINGS[thing](str(path))
    is_refused([*words_of(good, mode), f"{key}={place}"], key, path.name)


@pytest.mark.parametrize("thing", ["a FIFO", "zeros", "a link to itself", "any bytes"])
@pytest.mark.parametrize("file", ["settings.json", "running.json", "running.json.lock"])
def test_what_a_run_only_writes_is_replaced(file, thing, good):
    run_folder(good)
    Path("x", file).unlink(missing_ok=True)
    THINGS[thing](f"x/{file}")
    words = [*words_of(good, "train"), "checkpointing.save_dir=x"]
    code, message = answer(words)
    if code == 2:  # a link where a lock belongs is not followed
        clear(message)
        assert f"checkpointing.save_dir=x: x/{file}" in message.replace(f"{Path.cwd()}/", "")
        assert Path("x", file).is_symlink()
    else:
        assert code == 0, message


# ---- packages -----------------------------------------------------------------------------------

MISSING = {
    "wandb.offline=true": ("wandb", "wandb"),
    "checkpointing.save_dir=s3://bucket/run": ("s3fs", "s3fs"),
    "data.cache_dir=s3://bucket/data": ("s3fs", "s3fs"),
    "training.from_pretrained=gs://bucket/a.ckpt": ("gcsfs", "gcsfs"),
}


@pytest.mark.parametrize("word", MISSING)
def test_a_package_that_is_missing_is_named_with_its_command(word, good, monkeypatch):
    import settings.rules.machine

    package, name = MISSING[word]
    has = settings.rules.machine.has_package
    monkeypatch.setattr(settings.rules.machine, "has_package", lambda p: p != package and has(p))
    words = [each for each in good[1] if each != "wandb=null"]
    is_refused([*words, word], word.partition(".")[0], f"pip install {name}")
