"""From text to rows: the recordings of the data steps, the prepared folder, interrupted work."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, load_json
from hub_tools import get_rows, hold_out, in_memory
from made_up_split import rows_of_ids

from data import detokenizers, packing, preparation, shards
from data.arrow import parquet
from data.hub_tables import Hub
from data.packing import RowFormat, Tokens
from data.tokenizer import get_tokenizer

ROOT = Path(__file__).parents[2]
VALIDATION = ("test", "validation")  # the reference's names of what is "valid" here


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(GOLDEN / "tokenizer"))


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """get_rows with the small tokenizer, short rows and an empty cache."""
    return partial(get_rows, tokenizer=tokenizer, length=16, cache_dir=tmp_path / "cache")


def row_format(length=6, *, wrap=True, eos=False, special=False):
    return RowFormat(length, wrap, insert_eos=eos, insert_special=special, bos=1, eos=2, pad=0)


def packed(documents, row_format):
    """All rows of whole documents, as lists."""
    chunks = list(packing.packed([Tokens.of(documents, [True] * len(documents))], row_format))
    assert all((chunk.counts > 0).all() for chunk in chunks)
    return [row for chunk in chunks for row in chunk.ids.tolist()]


# Recordings


@pytest.mark.parametrize("name", list(load_json("data/detokenizers.json")["outputs"]))
def test_detokenizers_give_what_was_recorded(name):
    recorded = load_json("data/detokenizers.json")
    for text, output in zip(recorded["strings"], recorded["outputs"][name], strict=True):
        assert detokenizers.detokenize(name, text) == output


@pytest.mark.parametrize(
    "case", load_json("data/group_texts.json"), ids=lambda c: str(c["block_size"])
)
def test_grouping_gives_what_was_recorded(case):
    """The recorded function sees one batch of documents; here the same holds for a whole corpus."""
    special = case["insert_special_tokens"]
    how = RowFormat(
        *(case["block_size"], True),
        *(False, special),
        bos=case["bos"],
        eos=case["eos"],
        pad=0,
    )
    assert packed(case["input_ids"], how) == case["out_input_ids"]


@pytest.mark.parametrize("name", list(load_json("data/get_dataset.json")))
def test_prepared_rows_are_those_recorded(name, prepare, monkeypatch, tmp_path):
    """Exception: the reference leaves unwrapped LAMBADA rows as long as they are, which cannot be
    batched; here (specification 2) every unwrapped row is cut and padded to the length."""
    case = load_json("data/get_dataset.json")[name]
    wanted = case["kwargs"]
    asked = []

    corpus = case["dataset_name"]
    held_out = ["the last document"] if corpus == "openwebtext-train" else []
    columns = {name: documents + held_out for name, documents in case["columns"].items()}

    def parts(hub, split, *_, **__):
        asked.append((hub.repo, split))
        return [in_memory(columns)]

    monkeypatch.setattr(Hub, "parts", parts)
    hold_out(monkeypatch, 1)
    if corpus == "mydata":
        corpus = str(tmp_path / "mydata.jsonl")
        lines = (json.dumps({"text": text}) for text in case["columns"]["text"])
        Path(corpus).write_text("\n".join(lines))
    made = prepare(
        corpus,
        "valid" if case["mode"] in VALIDATION else "train",
        length=wanted["block_size"],
        wrap=wanted["wrap"],
        insert_eos=wanted.get("insert_eos", True),
        insert_special=wanted.get("insert_special_tokens", True),
    )
    ids, mask = made.read(list(range(len(made))))
    assert len(ids) == len(case["rows"])
    assert len(asked) == (case["dataset_name"] != "mydata")
    for row, counted, recorded in zip(ids.tolist(), mask.tolist(), case["rows"], strict=True):
        length, given = wanted["block_size"], recorded["input_ids"]
        if len(given) != length:
            ragged = given if len(given) < length else [*given[: length - 1], given[-1]]
            assert [token for token, real in zip(row, counted, strict=True) if real] == ragged
        else:
            assert row == given
            assert counted == recorded["attention_mask"]


def test_validation_batches_are_those_recorded(prepare, tokenizer, monkeypatch):
    """Exceptions: `valid_seed` shuffles the reference's batches, here their order is fixed; and the
    reference drops a rest for each of its processes, so that its rows depend on their number: the
    recording is several streams, one after the other, here it is one."""
    from dataloader import DataModule

    recorded = load_json("data/dataloaders.json")
    documents = in_memory({"text": recorded["texts"]})
    monkeypatch.setattr(Hub, "parts", lambda *_, **__: [documents])
    valid = prepare("ag_news", "valid", length=recorded["length"])
    data = DataModule(
        train=None,
        valid=valid,
        length=recorded["length"],
        batch_size=1,
        eval_batch_size=recorded["batch"],
    )
    batches = [batch["input_ids"].tolist() for batch in data.val_dataloader()]
    assert {len(batch) for batch in batches[:-1]} == {recorded["batch"]}
    ours = [row for batch in batches for row in batch]
    in_order = [row for batch in recorded["batches"]["None"] for row in batch]

    how = RowFormat(**valid.about["shape"])
    documents = tokenizer.encode_batch(recorded["texts"])

    def rows_of(processes):
        parts = np.array_split(np.arange(len(documents)), processes)
        return [r for p in parts for r in packed([documents[i] for i in p], how)]

    assert ours == rows_of(processes=1)
    assert in_order in [rows_of(processes) for processes in range(1, len(documents) + 1)]
    for batches in recorded["batches"].values():
        assert sorted(row for batch in batches for row in batch) == sorted(in_order)


# Wrapping


@pytest.mark.parametrize("special", [False, True])
def test_only_the_last_rest_of_a_corpus_is_dropped(special):
    """2 500 documents are three batches: the reference drops the rest of each."""
    documents = [[10 + i % 90] * (i % 7) for i in range(2500)]
    how = row_format(6, eos=True, special=special)
    stream = [token for ids in documents for token in [*ids, how.eos]]
    body = [row[1:-1] if special else row for row in packed(documents, how)]
    flat = [token for row in body for token in row]
    assert flat == stream[: len(stream) // how.room * how.room]
    assert len(body) == len(stream) // how.room


def test_a_document_in_pieces_wraps_as_one():
    whole = packed([[5, 6, 7, 8, 9], [3, 4]], row_format(4, eos=True))
    pieces = [([5, 6], False), ([], False), ([7, 8, 9], True), ([3], False), ([4], True)]
    (chunk,) = packing.packed([Tokens.of(*zip(*pieces, strict=True))], row_format(4, eos=True))
    assert chunk.ids.tolist() == whole == [[5, 6, 7, 8], [9, 2, 3, 4]]


def test_an_unwrapped_document_is_one_row_cut_or_padded():
    pieces = [([5, 6, 7], True), ([3, 4, 5], False), ([6, 7, 8], True), ([], True)]
    (chunk,) = packing.packed([Tokens.of(*zip(*pieces, strict=True))], row_format(6, wrap=False))
    assert chunk.ids.tolist() == [[1, 5, 6, 7, 2, 0], [1, 3, 4, 5, 6, 2], [1, 2, 0, 0, 0, 0]]
    assert chunk.counts.tolist() == [5, 6, 2]


def test_rows_too_short_for_their_specials_are_refused():
    with pytest.raises(ValueError, match=r"model.length=2 leaves no room"):
        row_format(2, special=True)


def test_padding_is_masked_out(prepare, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("be", "software " * 40)))
    made = prepare(str(path), "valid", wrap=False)
    ids, mask = made.read([0, 1])
    assert mask.sum(1).tolist() == [(ids[0] != made.about["shape"]["pad"]).sum(), 16]
    assert ids.dtype == mask.dtype == np.int64


# The prepared folder


def test_preparing_again_reads_nothing(prepare, monkeypatch, tmp_path):
    path = write_lines(tmp_path, 50)
    first = prepare(path, "train")
    monkeypatch.setattr(preparation, "write", None)
    again = prepare(path, "train")
    assert again.folder == first.folder
    np.testing.assert_array_equal(again.ids, first.ids)


def write_lines(folder, number, name="lines.jsonl"):
    path = folder / name
    words = ["the", "license", "shall", "be", "provided", "under", "terms", "of", "this", "notice"]
    lines = (json.dumps({"text": " ".join(words[: 1 + i % 9])}) for i in range(number))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


CHANGES = {
    "split": {"split": "valid"},
    "length": {"length": 17},
    "wrap": {"wrap": False},
    "eos": {"insert_eos": False},
    "special": {"insert_special": False},
    "column": {"text_column": "other"},
    "tokenizer": {"tokenizer": "gpt2"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_setting_that_shapes_rows_has_its_own_folder(change, prepare, tmp_path):
    path = tmp_path / "a.jsonl"
    record = {"text": "the work " * 30, "other": "the license " * 30}
    path.write_text(json.dumps(record))
    if "tokenizer" in change:
        change = {"tokenizer": get_tokenizer("gpt2")}
    settings = {"corpus": str(path), "split": "train"}
    folders = {prepare(**settings).folder, prepare(**(settings | change)).folder}
    assert len(folders) == 2


def test_a_changed_file_is_prepared_anew(prepare, tmp_path):
    first = prepare(write_lines(tmp_path, 50), "train")
    second = prepare(write_lines(tmp_path, 60), "train")
    assert first.folder != second.folder
    assert len(second) > len(first)


def test_a_file_of_the_same_size_changed_later_is_prepared_anew(prepare, tmp_path):
    path = write_lines(tmp_path, 50)
    first = prepare(path, "train")
    os.utime(path, (1, 1))
    assert prepare(path, "train").folder != first.folder


def test_the_folder_says_what_it_was_made_from(prepare, tmp_path):
    made = prepare(write_lines(tmp_path, 50), "train")
    about = json.loads((made.folder / "about.json").read_text())
    assert about["documents"] == 50
    assert about["rows"] == len(made)
    assert about["shape"]["length"] == 16
    assert about["sources"][0]["files"][0]["path"].endswith("lines.jsonl")


def test_a_damaged_folder_is_refused(prepare, tmp_path):
    path = write_lines(tmp_path, 50)
    made = prepare(path, "train")
    with (made.folder / "ids.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(ValueError, match=r"ids.bin has .* bytes, .* delete the folder"):
        prepare(path, "train")


def test_ids_that_do_not_fit_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gave the id 9, but its vocabulary has 9 ids"):
        rows_of_ids([9] * 20, row_format(), 9, tmp_path)
    assert list((tmp_path / "rows").iterdir()) == []


def test_large_vocabularies_keep_their_ids(tmp_path):
    ids = [70_000, 1, 2, 3, 4, 5]
    made = rows_of_ids(ids, row_format(), 80_000, tmp_path)
    assert made.read([0])[0].tolist() == [ids]


def test_preparation_does_not_depend_on_batches(prepare, monkeypatch, tmp_path):
    path = write_lines(tmp_path, 300)
    whole = np.array(prepare(path, "train").ids)
    monkeypatch.setattr(shards, "TEXTS_AT_ONCE", 7)
    monkeypatch.setattr(packing, "PIECES_AT_ONCE", 5)
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 3)
    again = prepare(path, "train", cache_dir=tmp_path / "second")
    np.testing.assert_array_equal(again.ids, whole)


def test_reading_leaves_the_environment_alone(prepare, tmp_path):
    before = dict(os.environ)
    prepare(write_lines(tmp_path, 50), "train")
    assert dict(os.environ) == before
