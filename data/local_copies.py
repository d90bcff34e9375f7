"""data.source=PATH: a local copy of a corpus, read instead of the hub. It may be one of these:

    folder of .parquet, .jsonl or .txt files   those whose names, or folders' names, name the split
    folder that `datasets` has saved           Dataset or DatasetDict
    the published archive                      or the folder that it was unpacked to (archives.py)
    one file

The documents are those that the hub gives.
"""

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import tables
from data.archives import SUFFIXES, Archive
from data.arrow import saved
from data.tables import Part
from utils import read_json, visible_files

# What splits are called in the names of files and folders.
NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test"},
}
SAVED, SAVED_SPLITS = saved.STATE, "dataset_dict.json"  # what `datasets` writes
WAY_OUT = "give a folder of .parquet, .jsonl or .txt files, or one such file"


@dataclass(frozen=True)
class LocalCopy:
    """split: as the hub calls it."""

    corpus: str
    path: Path
    one_split: bool  # the corpus has no other, so that none needs to be named
    archive: Archive | None = None

    def identity(self, split, revision):
        if self.is_saved():
            found = self.saved_folder(split).rglob("*")
            paths = sorted(path for path in found if path.is_file())
        else:
            paths = self.files(split)
        return {"files": [tables.stamp(path) for path in paths], "split": split}

    def parts(self, split, revision, cache, *, download=True):
        if self.is_saved():
            return [saved_part(self.saved_folder(split))]
        if self.is_archive():
            return self.archive.parts(self.path, split, cache)
        return [tables.file_part(path) for path in self.files(split)]

    # folders that `datasets` has saved

    def is_saved(self) -> bool:
        return any((self.path / mark).is_file() for mark in (SAVED, SAVED_SPLITS))

    def saved_folder(self, split: str) -> Path:
        if (self.path / SAVED).is_file():
            if names_split(_own_name(self.path), split) or self.one_split:
                return self.path
            raise ValueError(
                f"data.source={self.path} is one saved table: give the folder of the DatasetDict,"
                f" with the split {split} inside, or name this folder {split}"
            )
        try:
            known = read_json(self.path / SAVED_SPLITS)["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"data.source={self.path}: {SAVED_SPLITS} is damaged ({error}); save it again"
            ) from error
        if split not in known:
            raise ValueError(
                f"data.source={self.path} has no split {split}, only {', '.join(known)}"
            )
        return self.path / split

    # the published archive

    def is_archive(self) -> bool:
        fits = self.archive.fits if self.archive else lambda name: False
        if self.path.is_dir():
            return any(fits(path.name) for path in visible(self.path))
        if self.path.suffix in SUFFIXES and self.archive is None:
            raise ValueError(
                f"data.source={self.path}: no archive of this corpus is known; unpack it, then"
                f" {WAY_OUT}"
            )
        return self.path.suffix in SUFFIXES or fits(self.path.name)

    # files

    def files(self, split: str) -> list[Path]:
        """The files that hold the split: those of the archive, or tables of one kind."""
        if not self.path.is_dir():
            return [self.file(split)]
        found = sorted(visible(self.path))
        if self.is_archive():
            return [path for path in found if self.archive.fits(path.name)]
        known = [path for path in found if path.suffix in tables.READERS]
        if not known:
            some = ", ".join(path.name for path in found[:10]) or "nothing"
            raise ValueError(
                f"data.source={self.path} holds {some}, but no file of the kinds"
                f" {', '.join(tables.READERS)}; an archive must be named itself"
            )
        wanted = [path for path in known if self.names(path, split)]
        if not wanted:
            some = ", ".join(path.relative_to(self.path).as_posix() for path in known[:10])
            raise ValueError(
                f"data.source={self.path} holds {some}, but no file of the split {split} of"
                f" {self.corpus}; name it in the file's or its folder's name, and keep several"
                " corpora in folders of their names"
            )
        tables.check_one_kind(wanted, f"data.source={self.path}")
        self.check_lines(wanted[0])
        for path in wanted:
            if "partial" in words(path.relative_to(self.path).as_posix()):
                raise ValueError(f"data.source={self.path}: {path} is only a part of {split}")
        return wanted

    def file(self, split: str) -> Path:
        if self.is_archive():
            return self.path
        if self.path.suffix not in tables.READERS:
            raise ValueError(f"data.source={self.path} is of no kind that is known; {WAY_OUT}")
        if not self.names(self.path, split):
            raise ValueError(
                f"data.source={self.path}: its name does not say that it is the split {split};"
                f" rename it, or {WAY_OUT}, that does"
            )
        self.check_lines(self.path)
        return self.path

    def check_lines(self, path: Path) -> None:
        """A .txt file is one document, but the documents of some corpora are lines."""
        if self.archive is not None and path.suffix == ".txt":
            raise ValueError(
                f"data.source: {path} would be one document, but those of {self.corpus} are lines:"
                f" give {self.archive.train} and {self.archive.valid}, .jsonl or .parquet"
            )

    def names(self, path: Path, split: str) -> bool:
        """Whether a file is of the split: by its name and those of its folders inside of source,
        or else by the name of source."""
        folder = self.path.parent if path == self.path else self.path
        for name in (path.relative_to(folder).as_posix(), _own_name(folder)):
            if (found := names_split(name, split)) is not None:
                return found
        return self.one_split


def names_split(name: str, split: str) -> bool | None:
    """Whether a path names the split; None where it names none. ValueError where it names another
    one as well: its text would be in both."""
    found = [each for each, known in NAMES.items() if words(name) & known]
    if split in found and len(found) > 1:
        raise ValueError(
            f"data.source: {name} names the splits {' and '.join(found)}; rename it, so that the"
            " file and its folders name one"
        )
    return split in found if found else None


def _own_name(folder: Path) -> str:
    """The name of a folder, also where its path ends in . or .."""
    return os.path.basename(os.path.abspath(folder))


def words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def visible(folder: Path) -> list[Path]:
    """Its files, without those of tools (.cache, __MACOSX)."""
    return [path for path in visible_files(folder, "._") if path.is_file()]


def saved_part(folder: Path) -> Part:
    """A table that `datasets` has saved."""
    paths = saved.files(folder)
    read = partial(saved.rows, folder, paths)
    return Part(str(folder), 1, read, partial(saved.count, folder, paths))
