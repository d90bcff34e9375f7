"""Every corpus of the table through the real clients, from miniatures of its repository's layout.

The layouts are those of the hub in 2025 as far as they are known here: names of configurations and
shards, cards, the branch of converted files.
"""

import itertools
import json
from functools import partial

import datasets
import pytest
from conftest import GOLDEN
from hub_tools import get_rows, hold_out, put_table, stand_in, texts
from huggingface_hub import HfApi, constants

import settings
from data import corpora, shards
from data.hub_errors import CONNECT_SECONDS
from data.hub_tables import CONVERTED, Hub
from data.tokenizer import get_tokenizer
from modes.build_data import build_data, build_tokenizer

WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
OPENWEBTEXT = "79d93d786212f7344586290adb811d4ae6a1762c"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    yield from stand_in(tmp_path / "hub", monkeypatch, tmp_path / "home")


def documents(corpus, split, file=0):
    return [f"{corpus} {split} {file} {i}" for i in range(3)]


def card(*configurations, default=None):
    """README.md with the metadata that `datasets` reads: {configuration: {split: pattern}}."""
    lines = ["---", "configs:"]
    for name, splits in configurations:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
        lines += ["  default: true"] * (name == default)
    return "\n".join([*lines, "---", "# A corpus"])


def sharded(folder, shards):
    """{split: number of files} as push_to_hub names them."""
    return {
        split: [f"{folder}/{split}-{i:05}-of-{number:05}.parquet" for i in range(number)]
        for split, number in shards.items()
    }


def converted(folder, *splits):
    """As on refs/convert/parquet."""
    return {split: [f"{folder}/{split}/0000.parquet"] for split in splits}


USUAL = {"train": 1, "validation": 1, "test": 1}
EACH = ("train", "validation", "test")
# corpus: (repository, revision, {split: files}, column)
LAYOUTS = {
    "openwebtext": (
        "Skylion007/openwebtext",
        OPENWEBTEXT,
        sharded("plain_text", {"train": 3}),
        "text",
    ),
    "lm1b": (
        "billion-word-benchmark/lm1b",
        CONVERTED,
        converted("plain_text", "train", "test"),
        "text",
    ),
    "wikitext2": ("Salesforce/wikitext", WIKITEXT, sharded("wikitext-2-raw-v1", USUAL), "text"),
    "wikitext103": (
        "Salesforce/wikitext",
        WIKITEXT,
        sharded("wikitext-103-raw-v1", USUAL | {"train": 2}),
        "text",
    ),
    "ptb": (
        "ptb-text-only/ptb_text_only",
        CONVERTED,
        converted("penn_treebank", *EACH),
        "sentence",
    ),
    "lambada": ("EleutherAI/lambada_openai", "main", sharded("default", {"test": 1}), "text"),
    "ag_news": ("fancyzhx/ag_news", "main", sharded("data", {"train": 1, "test": 1}), "text"),
    "scientific_papers_arxiv": (
        "armanc/scientific_papers",
        CONVERTED,
        converted("arxiv", *EACH),
        "article",
    ),
    "scientific_papers_pubmed": (
        "armanc/scientific_papers",
        CONVERTED,
        converted("pubmed", *EACH),
        "article",
    ),
}
CONFIGURATIONS = {  # of the cards
    "Skylion007/openwebtext": ["plain_text"],
    "Salesforce/wikitext": ["wikitext-103-raw-v1", "wikitext-2-raw-v1"],
    "EleutherAI/lambada_openai": ["default", "de"],
}
OTHERS = {
    "Salesforce/wikitext": ["wikitext-103-v1"],
    "EleutherAI/lambada_openai": ["de"],
}


def put(hub, name):
    """The repository of a corpus, with the repository's other corpora."""
    repo, revision, _, _ = LAYOUTS[name]
    for other, (its_repo, _, files, column) in LAYOUTS.items():
        if its_repo != repo:
            continue
        for split, paths in files.items():
            for i, path in enumerate(paths):
                content = documents(other, split, i)
                columns = {column: content, "label": [0] * len(content)}
                put_table(hub.root, repo, revision, path, columns)
    if repo in CONFIGURATIONS:
        files = LAYOUTS[name][2]
        configurations = [
            (folder, {split: f"{folder}/{split}-*" for split in files})
            for folder in CONFIGURATIONS[repo]
        ]
        for folder in CONFIGURATIONS[repo]:
            for split in files:
                put_other(hub, repo, revision, folder, split)
        write_card(hub, repo, revision, card(*configurations))


def put_other(hub, repo, revision, folder, split):
    """A configuration that must not be read, where the corpus is not in it."""
    path = hub.root / "datasets" / repo / revision / folder
    if not list(path.glob(f"{split}-*")):
        name = f"{folder}/{split}-00000-of-00001.parquet"
        put_table(hub.root, repo, revision, name, {"text": ["another configuration"]})


def write_card(hub, repo, revision, text):
    (hub.root / "datasets" / repo / revision / "README.md").write_text(text)


def read(name, split, cache):
    corpus = corpora.get_corpus(name, split)
    return texts(corpora.opened(corpus, split, None, corpus.column, cache)[1])


def streamed(corpus, split, cache):
    _, parts = corpora.found(corpus, split, None, corpus.column, cache, download=False)
    return itertools.chain.from_iterable(part.read(corpus.column) for part in parts)


CASES = [(name, split) for name in LAYOUTS for split in ("train", "valid")]


@pytest.mark.parametrize(("name", "split"), CASES)
def test_a_corpus_is_read_from_its_repository_and_only_what_is_asked(name, split, hub, tmp_path):
    put(hub, name)
    repo, _, files, _ = LAYOUTS[name]
    if corpora.CORPORA[name].split(split) is None:
        with pytest.raises(ValueError, match=rf"data.{split}={name}: this corpus has no {split}"):
            corpora.get_corpus(name, split)
        return
    wanted = corpora.CORPORA[name].rows(split)[0]
    expected = [text for i in range(len(files[wanted])) for text in documents(name, wanted, i)]
    assert read(name, split, tmp_path / "cache") == expected
    names = {path.rpartition("/")[2] for path in files[wanted]}
    assert {file for file in hub.files() if file.endswith(".parquet")} == names
    assert all(f"/{repo}" in request.path for request in hub.asked if "/resolve/" in request.path)
    hub.asked.clear()
    assert read(name, split, tmp_path / "cache") == expected
    assert not hub.files()  # downloaded once


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_corpus_is_streamed_without_keeping_its_files(name, hub, tmp_path):
    put(hub, name)
    split = "valid" if corpora.CORPORA[name].valid else "train"
    over_the_network = texts(streamed(corpora.get_corpus(name, split), split, tmp_path / "a"))
    assert over_the_network == read(name, split, tmp_path / "b")
    kept = list((tmp_path / "a").rglob("*.parquet"))
    assert not kept


def test_evaluation_prepares_the_validation_split_alone(hub, tmp_path):
    put(hub, "wikitext103")
    words = ["data=wikitext103", "model=tiny", "model.length=16", "wandb=null"]
    config = settings.load(
        [
            *words,
            "mode=ppl_eval",
            "eval.checkpoint_path=org/model",
            f"data.tokenizer_name_or_path={GOLDEN / 'tokenizer'}",
            f"data.cache_dir={tmp_path / 'cache'}",
        ]
    )
    data = build_data(config, build_tokenizer(config), train=False)
    assert data.train is None
    assert data.valid.about["documents"] == 3
    assert hub.files() == {"README.md", "validation-00000-of-00001.parquet"}
    assert not [request for request in hub.asked if "train" in request.path]


# OpenWebText: the end of its only split


@pytest.fixture
def openwebtext(hub):
    """Five files of 40 documents of a kilobyte that does not compress."""
    import random

    letters = random.Random(1)
    repo, revision, _, _ = LAYOUTS["openwebtext"]
    whole = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=6000)) for _ in range(200)]
    for i, path in enumerate(sharded("plain_text", {"train": 5})["train"]):
        put_table(hub.root, repo, revision, path, {"text": whole[40 * i : 40 * (i + 1)]})
    write_card(hub, repo, revision, card(("plain_text", {"train": "plain_text/train-*"})))
    return whole


@pytest.mark.parametrize(
    ("held_out", "files", "footers"),
    [(7, [4], [4]), (40, [4], [4]), (41, [3, 4], [3, 4]), (110, [2, 3, 4], [2, 3, 4])],
)
def test_the_end_of_openwebtext_is_read_without_the_rest(
    held_out, files, footers, hub, openwebtext, tmp_path, monkeypatch
):
    hold_out(monkeypatch, held_out)
    valid = read("openwebtext-valid", "valid", tmp_path / "cache")
    assert valid == openwebtext[-held_out:]
    assert hub.files() >= {f"train-0000{i}-of-00005.parquet" for i in files}
    for i in range(5):
        path = f"train-0000{i}-of-00005.parquet"
        (file,) = hub.root.rglob(path)
        read_bytes = hub.bytes_of(path)
        assert (read_bytes == 0) == (i not in footers)
        assert read_bytes < 1.5 * file.stat().st_size  # itself once and its footer
    hub.asked.clear()
    train = read("openwebtext-train", "train", tmp_path / "second")
    assert train == openwebtext[:-held_out]


def test_footers_of_openwebtext_cost_kilobytes(hub, openwebtext, tmp_path):
    (source,) = corpora.CORPORA["openwebtext"].sources
    parts = source.parts("train", None, tmp_path)
    assert [part.count() for part in parts] == [40] * 5
    name = "train-00000-of-00005.parquet"
    assert 0 < hub.bytes_of(name) < 70_000 < 6000 * 40


def test_more_held_out_than_there_is_leaves_no_training_text(
    hub, openwebtext, tmp_path, monkeypatch
):
    hold_out(monkeypatch, 1000)
    assert read("openwebtext-valid", "valid", tmp_path) == openwebtext
    assert read("openwebtext-train", "train", tmp_path) == []


# What is not as it should be


def test_the_next_source_is_asked_when_the_first_has_no_answer(hub, tmp_path, caplog):
    repo, files = "ccdv/pubmed-summarization", sharded("document", USUAL)
    for split, (path,) in files.items():
        put_table(hub.root, repo, "main", path, {"article": [split], "abstract": ["short"]})
    configurations = [("document", {split: f"document/{split}-*" for split in USUAL})]
    write_card(hub, repo, "main", card(*configurations))
    with caplog.at_level("INFO", "bamdlm"):
        assert read("scientific_papers_pubmed", "valid", tmp_path) == ["validation"]
    assert (
        "armanc/scientific_papers (pubmed) at refs/convert/parquet: no such data set" in caplog.text
    )
    tokenizer = get_tokenizer(str(GOLDEN / "tokenizer"))
    made = get_rows(
        "scientific_papers_pubmed",
        "valid",
        tokenizer=tokenizer,
        length=2,
        cache_dir=tmp_path,
        insert_special=False,
    )
    assert made.about["read_from"].startswith("ccdv/pubmed-summarization@")
    assert "reading from ccdv/pubmed-summarization" in caplog.text
    assert "cleaned in another way" in caplog.text


PROBLEMS = {
    "no repository": ({}, "no such data set on the hub, or a private one"),
    "no branch": ({"main": ["x/train/0000.parquet"]}, "no such branch, tag or commit"),
    "no configuration": ({CONVERTED: ["other/test/0000.parquet"]}, "ptb_text_only"),
    "no split": ({CONVERTED: ["penn_treebank/train/0000.parquet"]}, "has no split validation"),
    "a part": (
        {CONVERTED: ["penn_treebank/partial-validation/0000.parquet"]},
        "has converted only the first part of validation",
    ),
    "a script": ({CONVERTED: ["ptb_text_only.py"]}, "scripts are no longer supported"),
    "another kind": ({CONVERTED: ["penn_treebank/validation/0.csv"]}, "0.csv is none of .parquet"),
    "empty": ({CONVERTED: ["notes.md"]}, "ptb_text_only"),
}


@pytest.mark.parametrize(("revisions", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_repository_of_another_form_is_named(revisions, message, hub, tmp_path):
    repo = "ptb-text-only/ptb_text_only"
    for revision, paths in revisions.items():
        for path in paths:
            file = put_table(hub.root, repo, revision, path, {"sentence": ["a"]})
            if not path.endswith(".parquet"):
                file.write_text("a\n")
    with pytest.raises(ValueError, match=r"local copy with data.source=PATH \(.*ptb") as raised:
        read("ptb", "valid", tmp_path / "cache")
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_languages_in_one_folder_are_not_mixed(hub, tmp_path):
    """EleutherAI's repository, were it without a card; with one the card says which file."""
    repo = "EleutherAI/lambada_openai"
    for name in ("lambada_test", "lambada_test_de"):
        path = put_table(hub.root, repo, "main", f"data/{name}.jsonl", {"text": ["a"]})
        path.write_text(json.dumps({"text": name}) + "\n")
    with pytest.raises(ValueError, match=r"the files of test are of several tables \(data/lambada"):
        read("lambada", "valid", tmp_path)
    configurations = [("default", {"test": "data/lambada_test.jsonl"})]
    configurations += [("de", {"test": "data/lambada_test_de.jsonl"})]
    write_card(hub, repo, "main", card(*configurations))
    assert read("lambada", "valid", tmp_path) == ["lambada_test"]


def test_shards_are_one_table_under_any_of_their_names(hub, tmp_path):
    for i, digits in enumerate(("0123456789abcdef", "fedcba9876543210")):
        name = f"data/test-0000{i}-of-00002-{digits}.parquet"
        put_table(hub.root, "fancyzhx/ag_news", "main", name, {"text": [digits]})
    assert read("ag_news", "valid", tmp_path) == ["0123456789abcdef", "fedcba9876543210"]


def test_a_column_of_another_name_is_told(hub, tmp_path):
    put(hub, "ag_news")
    corpus = corpora.get_corpus("ag_news", "valid")
    with pytest.raises(ValueError, match=r"has no column 'body', only text, label; set data.text"):
        texts(corpora.opened(corpus, "valid", None, "body", tmp_path)[1])


def test_a_revision_of_ones_own_is_asked_for(hub, tmp_path):
    put_table(hub.root, "fancyzhx/ag_news", "v2", "data/test-0.parquet", {"text": ["of v2"]})
    corpus = corpora.get_corpus("ag_news", "valid")
    assert texts(corpora.opened(corpus, "valid", "v2", "text", tmp_path)[1]) == ["of v2"]
    one, other = (corpus.identities("valid", revision) for revision in (None, "v2"))
    assert one != other


# Without a network


def test_what_was_downloaded_serves_without_a_network(hub, tmp_path, monkeypatch):
    put(hub, "wikitext103")
    expected = read("wikitext103", "valid", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert read("wikitext103", "valid", tmp_path) == expected
        with pytest.raises(ValueError, match=r"(?s)data.source=PATH.*HF_HUB_OFFLINE is set"):
            read("wikitext103", "train", tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert read("wikitext103", "valid", tmp_path) == expected


def test_without_a_network_each_source_is_asked_once_and_the_way_out_is_named(
    hub, tmp_path, monkeypatch
):
    """Nothing that tries again is called: huggingface_hub's downloads, datasets' own questions."""
    asked, ask = [], HfApi.dataset_info

    def dataset_info(api, repo, **options):
        asked.append((repo, options["timeout"]))
        return ask(api, repo, **options)

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset_builder", None)
    tokenizer = get_tokenizer(str(GOLDEN / "tokenizer"))
    prepare = partial(get_rows, tokenizer=tokenizer, length=16, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data.source=PATH .*hub cannot be reached") as raised:
        prepare("scientific_papers_arxiv", "valid")
    repos = "armanc/scientific_papers", "ccdv/arxiv-summarization"
    assert asked == [(repo, CONNECT_SECONDS) for repo in repos]
    assert all(str(raised.value).count(f"{repo} (") == 1 for repo in repos)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_lost_connection_costs_no_finished_part(hub, tmp_path, monkeypatch, caplog):
    put(hub, "wikitext103")
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 10)
    tokenizer = get_tokenizer(str(GOLDEN / "tokenizer"))
    prepare = partial(get_rows, "wikitext103", "train", tokenizer=tokenizer, length=8)
    whole = prepare(cache_dir=tmp_path / "whole")
    (second,) = hub.root.rglob("train-00001-of-00002.parquet")
    second.rename(second.with_suffix(".gone"))
    with pytest.raises(OSError, match=r"train-00001-of-00002.parquet could not .* run it again"):
        prepare(cache_dir=tmp_path / "cache")
    second.with_suffix(".gone").rename(second)
    with caplog.at_level("INFO", "bamdlm"):
        again = prepare(cache_dir=tmp_path / "cache")
    assert "going on with 3 finished parts" in caplog.text
    assert again.ids.tolist() == whole.ids.tolist()


def test_a_file_that_is_lost_on_the_way_is_named(hub, tmp_path):
    put(hub, "ag_news")
    corpus = corpora.get_corpus("ag_news", "valid")
    for pieces in (
        corpora.opened(corpus, "valid", None, "text", tmp_path)[1],
        streamed(corpus, "valid", tmp_path),
    ):
        for file in hub.root.rglob("test-*.parquet"):
            file.rename(file.with_suffix(".gone"))
        with pytest.raises(OSError, match=r"test-00000-of-00001.parquet could not be read from"):
            next(pieces)
        for file in hub.root.rglob("*.gone"):
            file.rename(file.with_suffix(".parquet"))


def test_a_damaged_file_is_named(hub, tmp_path):
    put(hub, "ag_news")
    (file,) = hub.root.rglob("test-*.parquet")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet is not a parquet file, or"):
        read("ag_news", "valid", tmp_path)


# The table


def test_the_notes_beside_downloads_say_what_was_found(hub, tmp_path):
    put(hub, "ag_news")
    read("ag_news", "valid", tmp_path)
    (note,) = (tmp_path / "downloads" / "listings").iterdir()
    assert json.loads(note.read_text())["files"] == ["data/test-00000-of-00001.parquet"]


def test_tables_say_where_they_are():
    assert str(Hub("a/b", name="c", revision="d")) == "a/b (c) at d"
    assert str(Hub("a/b")) == "a/b at main"
