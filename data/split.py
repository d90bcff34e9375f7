"""One split of a corpus as a run wants it: which text, tokenized how, in rows of what format."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from data import corpora, detokenizers, token_rows
from data.chat.encoding import ChatEncoder
from data.chat.records import Chats
from data.packing import RowFormat
from data.readers import Piece
from data.tokenizer import Tokenizer
from utils import digest


@dataclass(frozen=True)
class Split:
    """split is "train" or "valid"; corpus a name of corpora.CORPORA or a path or pattern of files.

    length: L. Training rows of text8-crop are 2 L long; DataModule cuts the windows. align, whole:
    as in packing.RowFormat. chat: data.chat_fields where the files hold conversations, which needs
    `whole`. The others are the settings data.* of the same name; None: the corpus's own.
    """

    corpus: str
    split: str
    tokenizer: Tokenizer
    length: int
    wrap: bool = True
    align: int | None = None
    whole: bool = False
    insert_eos: bool = True
    insert_special: bool = True
    revision: str | None = None
    text_column: str | None = None
    source: str | None = None
    chat: dict[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.corpus} ({self.split})"

    @cached_property
    def entry(self) -> corpora.Corpus:
        if self.chat is not None:
            return corpora.own_files(Chats(self.corpus, self.chat), self.split)
        return corpora.get_corpus(self.corpus, self.split, source=self.source)

    @property
    def column(self) -> str:
        return self.text_column or self.entry.column

    @cached_property
    def row_format(self) -> RowFormat:
        windows = self.entry.windows and self.split == "train"
        if windows and self.align is not None:
            raise ValueError(
                f"documents cannot be kept apart in {self.corpus}, windows of one document; use"
                " data.pack=wrap"
            )
        return RowFormat(
            length=2 * self.length if windows else self.length,
            wrap=self.wrap,
            insert_eos=self.insert_eos,
            insert_special=self.insert_special,
            bos=self.tokenizer.bos_id,
            eos=self.tokenizer.eos_id,
            pad=self.tokenizer.pad_id,
            align=self.align,
            whole=self.whole,
            scored=self.chat is not None,
        )

    @cached_property
    def chats(self) -> ChatEncoder:
        """What makes ids of conversations."""
        return ChatEncoder(self.tokenizer, self.length, self.align, self.split == "train")

    @cached_property
    def about(self) -> dict:
        """Everything that decides what the rows are."""
        return self.ways | {"sources": self.entry.identities(self.split, self.revision)}

    @cached_property
    def ways(self) -> dict:
        """The same without where the text is from."""
        rules = self.entry.detokenizer
        return {
            "corpus": self.corpus,
            "split": self.split,
            "column": self.column,
            "detokenizer": rules,
            "detokenizer_rules": rules and detokenizers.fingerprint(rules),
            "tokenizer": self.tokenizer.fingerprint,
            "shape": self.row_format.settings(),
            "format": token_rows.FORMAT,
            **({} if self.chat is None else {"chat": self.chats.about | {"fields": self.chat}}),
        }

    @property
    def folder_name(self) -> str:
        """Of the prepared rows."""
        about = digest(json.dumps(self.about, sort_keys=True), 12)
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(self.corpus).stem)
        return f"{name[:40]}-{self.split}-{self.row_format.length}-{about}"

    def is_of(self, about: dict) -> bool:
        """Whether rows were made like those of this split, from the place that it names, whatever
        lay there. about: of the rows."""
        like = replace(self, source=None)  # it may be gone
        if any(about.get(key) != value for key, value in like.ways.items()):
            return False
        place = self.source or (self.corpus if self.corpus not in corpora.CORPORA else None)
        found = (source.get("files", [source.get("text8")]) for source in about["sources"])
        found = itertools.chain.from_iterable(found)
        paths = [Path(file["path"]) for file in found if isinstance(file, dict)]
        if place is None:
            return not paths
        paths = paths or [Path(about.get("read_from", ""))]  # known by its text, wherever it lay
        place = Path(place).expanduser().absolute()
        return all(place in (path, *path.parents) or path.match(str(place)) for path in paths)

    def open(self, cache: Path) -> tuple[str, Iterator[Piece]]:
        """(the place that the text is read from, the text); cache: where downloads are kept."""
        return corpora.opened(self.entry, self.split, self.revision, self.column, cache)

    def passages(self, cache: Path) -> list[Callable[[], Iterator[Piece]]]:
        """The parts of the text, each a function that reads it from its beginning."""
        where = (self.entry, self.split, self.revision, self.column, cache)
        _, parts = corpora.found(*where, download=False)
        return [partial(part.read, self.column) for part in parts]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Of conversations with packing.SCORED."""
        if self.chat is not None:
            return self.chats(texts)
        if rules := self.entry.detokenizer:
            texts = [detokenizers.detokenize(rules, text) for text in texts]
        return self.tokenizer.encode_batch(texts)
