"""data.source=PATH: in whichever form a corpus is kept, the documents are those of the hub."""

import io
import json
import tarfile
import zipfile
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from hub_tools import get_rows, hold_out, put_table, stand_in, texts

from data import corpora
from data.tokenizer import get_tokenizer

# What was published, and the rows that the hub has of it.
WIKITEXT = " \n = Robert Boulter = \n \n Robert is an actor @,@ of film . \n He was born . \n"
WIKITEXT_ROWS = [
    "",
    " = Robert Boulter = \n",
    "",
    " Robert is an actor @,@ of film . \n",
    " He was born . \n",
]
PTB = " aer banknote berlitz calloway \n pierre <unk> N years old \n mr. <unk> is chairman \n"
PTB_ROWS = [
    "aer banknote berlitz calloway",
    "pierre <unk> N years old",
    "mr. <unk> is chairman",
]
LM1B = ["The U.S. Centers \n", "Having no more than six in 10\n", "He said so .\n"]
LM1B_ROWS = ["The U.S. Centers", "Having no more than six in 10", "He said so ."]


def read(name, split, source, cache, column=None):
    corpus = corpora.get_corpus(name, split, source=str(source))
    return texts(corpora.opened(corpus, split, None, column or corpus.column, cache)[1])


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def tarred(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def unpacked(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


WIKITEXT_FILES = {
    "wikitext-103-raw/": "",
    "wikitext-103-raw/wiki.test.raw": "test \n",
    "wikitext-103-raw/wiki.train.raw": "train \n \n",
    "wikitext-103-raw/wiki.valid.raw": WIKITEXT,
}
PTB_FILES = {
    "simple-examples/data/ptb.test.txt": " test \n",
    "simple-examples/data/ptb.train.txt": " no it was n't black monday \n",
    "simple-examples/data/ptb.valid.txt": PTB,
    "simple-examples/data/ptb.char.valid.txt": "a e r\n",
}
TOP = "1-billion-word-language-modeling-benchmark-r13output"
TRAIN, HELD_OUT = (
    "training-monolingual.tokenized.shuffled",
    "heldout-monolingual.tokenized.shuffled",
)
LM1B_FILES = {  # in no order
    f"{TOP}/{TRAIN}/news.en-00002-of-00100": "second\n",
    f"{TOP}/{HELD_OUT}/news.en.heldout-00001-of-00050": LM1B[2],
    f"{TOP}/{TRAIN}/news.en-00001-of-00100": "first\nof train\n",
    f"{TOP}/{HELD_OUT}/news.en.heldout-00000-of-00050": LM1B[0] + LM1B[1],
    f"{TOP}/README": "read me",
}
ARCHIVES = {
    "wikitext103": (WIKITEXT_FILES, ["train \n", ""], WIKITEXT_ROWS),
    "ptb": (PTB_FILES, ["no it was n't black monday"], PTB_ROWS),
    "lm1b": (LM1B_FILES, ["first", "of train", "second"], LM1B_ROWS),
}
HUB = {
    "wikitext103": (
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-103-raw-v1/{}-0.parquet",
    ),
    "ptb": ("ptb-text-only/ptb_text_only", corpora.CONVERTED, "penn_treebank/{}/0000.parquet"),
    "lm1b": ("billion-word-benchmark/lm1b", corpora.CONVERTED, "plain_text/{}/0000.parquet"),
}
FORMS = {
    "zip": lambda folder, files: zipped(folder / "corpus.zip", files),
    "tar": lambda folder, files: tarred(folder / "corpus.tar.gz", files),
    "folder": lambda folder, files: unpacked(
        folder / "corpus", {name: text for name, text in files.items() if name[-1] != "/"}
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ARCHIVES)
def test_the_published_archive_gives_the_rows_of_the_hub(name, form, tmp_path):
    files, train, valid = ARCHIVES[name]
    source = form(tmp_path, files)
    assert read(name, "train", source, tmp_path / "cache") == train
    assert read(name, "valid", source, tmp_path / "cache") == valid


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_hub_and_saved_table_give_the_same_rows(name, tmp_path, monkeypatch):
    """The ids, through the whole preparation."""
    files, _, rows = ARCHIVES[name]
    corpus = corpora.CORPORA[name]
    split = corpus.rows("valid")[0]
    table = {corpus.column: rows}
    datasets.DatasetDict({split: datasets.Dataset.from_dict(table)}).save_to_disk(
        tmp_path / "saved"
    )
    tokenizer = get_tokenizer(str(GOLDEN / "tokenizer"))
    prepare = partial(get_rows, name, "valid", tokenizer=tokenizer, length=6)
    for hub in stand_in(tmp_path / "hub", monkeypatch, tmp_path / "home"):
        repo, revision, path = HUB[name]
        put_table(hub.root, repo, revision, path.format(split), table)
        if name == "wikitext103":
            readme = hub.root / "datasets" / repo / revision / "README.md"
            readme.write_text(
                "---\nconfigs:\n- config_name: wikitext-103-raw-v1\n  data_files:\n"
                "  - split: validation\n    path: wikitext-103-raw-v1/validation-*\n---\n"
            )
        expected = prepare(cache_dir=tmp_path / "a")
    for source in (tarred(tmp_path / "corpus.tgz", files), tmp_path / "saved"):
        made = prepare(cache_dir=tmp_path / "b", source=str(source))
        assert made.about["documents"] == len(rows)
        np.testing.assert_array_equal(made.ids, expected.ids)


def test_one_file_of_an_archive_is_enough_for_its_split(tmp_path):
    (tmp_path / "wiki.valid.raw").write_text(WIKITEXT)
    (tmp_path / "ptb.valid.txt").write_text(PTB)
    assert read("wikitext2", "valid", tmp_path / "wiki.valid.raw", tmp_path) == WIKITEXT_ROWS
    assert read("ptb", "valid", tmp_path / "ptb.valid.txt", tmp_path) == PTB_ROWS
    with pytest.raises(ValueError, match=r"wiki.valid.raw holds no wiki.train.raw \(train split\)"):
        read("wikitext2", "train", tmp_path / "wiki.valid.raw", tmp_path)


def test_lines_end_where_python_ends_them(tmp_path):
    (tmp_path / "ptb.valid.txt").write_bytes(b"one\r\ntwo\rthree\n\nfour")
    rows = read("ptb", "valid", tmp_path / "ptb.valid.txt", tmp_path)
    assert rows == ["one", "two", "three", "", "four"]


def test_of_a_tar_only_the_split_is_unpacked_and_once(tmp_path):
    source = tarred(tmp_path / "lm1b.tar.gz", LM1B_FILES)
    read("lm1b", "valid", source, tmp_path / "cache")
    found = {path.name: path for path in (tmp_path / "cache").rglob("news*")}
    assert set(found) == {f"news.en.heldout-0000{i}-of-00050" for i in (0, 1)}
    path = found["news.en.heldout-00000-of-00050"]
    path.write_text("as it was unpacked\n")
    assert read("lm1b", "valid", source, tmp_path / "cache")[0] == "as it was unpacked"


def test_a_tar_that_was_replaced_is_unpacked_anew(tmp_path):
    read("lm1b", "valid", tarred(tmp_path / "x.tar", LM1B_FILES), tmp_path / "cache")
    tarred(tmp_path / "x.tar", {"news.en.heldout-00000-of-00050": "another\n"})
    assert read("lm1b", "valid", tmp_path / "x.tar", tmp_path / "cache") == ["another"]


def test_a_tar_cannot_write_outside_its_folder(tmp_path):
    source = tmp_path / "evil.tar"
    with tarfile.open(source, "w") as archive:
        link = tarfile.TarInfo("x/wiki.valid.raw")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        info = tarfile.TarInfo("../../../wiki.valid.raw")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"text\n"))
    assert read("wikitext2", "valid", source, tmp_path / "cache") == ["text\n"]
    assert not list(tmp_path.glob("wiki*"))


def test_lambada_is_its_json_lines(tmp_path):
    lines = [{"text": "In my palm is a clear stone"}, {"text": "“Give me a minute”"}]
    path = tmp_path / "lambada_test.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    for source in (path, path.rename(tmp_path / "anything.jsonl"), tmp_path):
        if source.exists():
            assert read("lambada", "valid", source, tmp_path) == [line["text"] for line in lines]


def test_text8_may_be_a_zip_its_file_or_a_folder(tmp_path):
    text = "anarchism originated " * 100
    for source in (zipped(tmp_path / "text8.zip", {"text8": text}), tmp_path):
        assert read("text8", "valid", source, tmp_path) == [text[len(text) * 19 // 20 :]]


# Tables


def write_table(path, documents, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: documents, "label": [0] * len(documents)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents))
    else:
        path.write_text(documents[0])


NAMED = {
    "shards of the hub": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "converted": ["default/train/0000.parquet", "default/test/0000.parquet"],
    "JSON lines": ["ag_train.jsonl", "ag_test.jsonl"],
    "texts": ["train/a.txt", "test/a.txt"],
}


@pytest.mark.parametrize("names", NAMED.values(), ids=NAMED)
def test_files_are_chosen_by_the_split_in_their_names(names, tmp_path):
    folder = tmp_path / "test-of-folders"  # its own name does not count
    for name in names:
        write_table(folder / name, [f"text of {name}"])
    write_table(folder / ".cache" / "test.txt", ["of a tool"])
    for split, name in zip(("train", "valid"), names, strict=True):
        assert read("ag_news", split, folder, tmp_path) == [f"text of {name}"]
        assert read("ag_news", split, folder / name, tmp_path) == [f"text of {name}"]


def test_a_split_has_several_names_and_latest_is_not_test(tmp_path):
    for name in ("latest.jsonl", "contest-train.jsonl", "dev.jsonl"):
        write_table(tmp_path / name, [name])
    assert read("wikitext2", "valid", tmp_path, tmp_path) == ["dev.jsonl"]
    assert read("wikitext2", "train", tmp_path, tmp_path) == ["contest-train.jsonl"]


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("test/training.jsonl", ["train", "test"]),
        ("train-test.jsonl", ["train", "test"]),
        ("train/dev/a.jsonl", ["train", "validation"]),
    ],
)
def test_a_file_that_names_two_splits_is_in_neither(name, splits, tmp_path):
    """It was in both, so that a validation text was trained on."""
    for other in ("train", "test", "dev"):
        write_table(tmp_path / f"{other}.jsonl", [other])
    write_table(tmp_path / name, ["of which?"])
    for corpus, split in (("ag_news", "train"), ("ag_news", "valid"), ("wikitext2", "valid")):
        if corpora.CORPORA[corpus].split(split) in splits:
            with pytest.raises(ValueError, match=f"{name} names the splits {' and '.join(splits)}"):
                read(corpus, split, tmp_path, tmp_path)
        else:
            assert "of which?" not in read(corpus, split, tmp_path, tmp_path)


@pytest.mark.parametrize("kind", ["files", "saved"])
def test_a_copy_that_names_two_splits_is_neither(kind, tmp_path):
    source = tmp_path / "train_and_test"
    if kind == "files":
        write_table(source / "0.jsonl", ["of which?"])
    else:
        datasets.Dataset.from_dict({"text": ["of which?"]}).save_to_disk(source)
    for split in ("train", "valid"):
        with pytest.raises(ValueError, match="train_and_test names the splits train and test"):
            read("ag_news", split, source, tmp_path)


def test_a_copy_of_the_whole_repository_is_narrowed_to_the_configuration(tmp_path):
    for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1", "wikitext-103-v1"):
        write_table(tmp_path / name / "validation-00000-of-00001.parquet", [name])
    assert read("wikitext103", "valid", tmp_path, tmp_path) == ["wikitext-103-raw-v1"]
    assert read("wikitext2", "valid", tmp_path, tmp_path) == ["wikitext-2-raw-v1"]


def test_a_folder_may_hold_a_folder_for_each_corpus(tmp_path):
    for name in ("openwebtext", "wikitext103"):
        for split in ("train", "validation"):
            write_table(tmp_path / name / f"{split}.jsonl", [f"{name} {split}"])
    assert read("openwebtext", "train", tmp_path, tmp_path) == ["openwebtext train"]
    assert read("wikitext103", "valid", tmp_path, tmp_path) == ["wikitext103 validation"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved"])
@pytest.mark.parametrize("held_out", [2, 3, 5])
def test_openwebtext_is_cut_as_on_the_hub(kind, held_out, tmp_path, monkeypatch):
    hold_out(monkeypatch, held_out)
    whole = [f"page {i}" for i in range(9)]
    source = tmp_path / "copy"
    if kind == "saved":
        datasets.Dataset.from_dict({"text": whole}).save_to_disk(source)
    else:
        for i in range(3):  # no name of a split: there is but one
            write_table(source / f"{i:04}.{kind}", whole[3 * i : 3 * i + 3])
    assert read("openwebtext-valid", "valid", source, tmp_path) == whole[-held_out:]
    assert read("openwebtext-train", "train", source, tmp_path) == whole[:-held_out]
    assert read("openwebtext", "train", source, tmp_path) == whole


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_dict_is_read_by_split(shards, tmp_path):
    tables = {split: [f"{split} {i}" for i in range(7)] for split in ("train", "test")}
    saved = {key: datasets.Dataset.from_dict({"text": rows}) for key, rows in tables.items()}
    datasets.DatasetDict(saved).save_to_disk(
        tmp_path / "dict", num_shards=dict.fromkeys(tables, shards)
    )
    for source in (tmp_path / "dict", tmp_path / "dict" / "test"):
        assert read("ag_news", "valid", source, tmp_path) == tables["test"]
    assert read("ag_news", "train", tmp_path / "dict", tmp_path) == tables["train"]


def test_a_folder_is_the_same_under_any_name_of_it(tmp_path, monkeypatch):
    write_table(tmp_path / "test" / "0000.jsonl", ["of the split"])
    monkeypatch.chdir(tmp_path / "test")
    for source in (".", "../test", tmp_path / "test", "0000.jsonl"):
        assert read("ag_news", "valid", source, tmp_path) == ["of the split"]


def test_the_folder_of_an_archive_may_be_called_as_another_corpus(tmp_path):
    (tmp_path / "wikitext-103").mkdir()
    source = zipped(tmp_path / "wikitext-103" / "two.zip", {"wiki.valid.raw": WIKITEXT})
    assert read("wikitext2", "valid", source, tmp_path) == WIKITEXT_ROWS


def test_a_selection_that_was_saved_stays_one(tmp_path):
    table = datasets.Dataset.from_dict({"text": list("abcdef")}).select([4, 1])
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "dict")
    assert read("ag_news", "valid", tmp_path / "dict", tmp_path) == ["e", "b"]


def test_another_content_is_another_corpus(tmp_path):
    path = tmp_path / "test.jsonl"
    seen = []
    for documents in (["a"], ["a", "b"]):
        write_table(path, documents)
        seen.append(
            corpora.get_corpus("ag_news", "valid", source=str(tmp_path)).identities("valid", None)
        )
    assert seen[0] != seen[1]
