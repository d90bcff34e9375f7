"""A split whose text, tokenizer and row format a test makes up, in place of data.split.Split."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from data import preparation
from data.packing import RowFormat
from data.readers import Piece
from data.remote_cache import CacheDir
from data.token_rows import TokenRows


@dataclass
class MadeUpSplit:
    read: Callable[[], Iterable[Piece]]
    encode: Callable[[list[str]], list[list[int]]]
    row_format: RowFormat
    vocab_size: int
    folder_name: str = "x"
    place: str = "made up"

    @property
    def tokenizer(self):
        return SimpleNamespace(vocab_size=self.vocab_size)

    @property
    def about(self) -> dict:
        return {"corpus": "x", "split": "train", "shape": self.row_format.settings()}

    def open(self, cache: Path) -> tuple[str, Iterable[Piece]]:
        return self.place, self.read()

    def __str__(self) -> str:
        return "x (train)"


def rows_of_ids(ids: list[int], row_format: RowFormat, vocab_size: int, cache: Path) -> TokenRows:
    """The prepared rows of one document whose ids are given."""
    pieces = [Piece("", True, 1.0)]
    split = MadeUpSplit(lambda: pieces, lambda _: [ids], row_format, vocab_size)
    return preparation.prepare(split, CacheDir(cache))
