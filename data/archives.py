"""Corpora as they were first published: text files in a folder, a zip or a tar, or a file alone.

An Archive says which files hold a split and how their lines become documents: as in the tables on
the hub, which were made from these files. text8 is one file, cut by position.
"""

import fnmatch
import hashlib
import io
import json
import logging
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from data.readers import Piece, decoded_lines
from data.tables import Part, count_read, size_of
from utils import atomic_file, atomic_folder, lock

log = logging.getLogger("bamdlm")

DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)
SUFFIXES = (".zip", ".tar", ".tgz", ".gz")


@dataclass(frozen=True)
class Archive:
    """Patterns of the file names (folders aside) that hold a split; a line is one document."""

    train: str
    valid: str
    line: Callable[[str], str]  # of a line with its line break
    sister: str | None = None  # a folder's or archive's name that belongs to another corpus

    def pattern(self, split: str) -> str:
        return self.train if split == "train" else self.valid

    def fits(self, name: str) -> bool:
        """Whether a file of that name is of this layout."""
        return any(_matches(name, pattern) for pattern in (self.train, self.valid))

    def parts(self, source: Path, split: str, cache: Path) -> list[Part]:
        """The files of a split in the order of their names."""
        try:
            if zipfile.is_zipfile(source):
                with zipfile.ZipFile(source) as archive:
                    sizes = {info.filename: info.file_size for info in archive.infolist()}
                wanted = self.wanted(source, split, list(sizes))
                opened = {name: partial(_open_in_zip, source, name) for name in wanted}
            else:
                root, names = self.files(source, split, cache)
                wanted = self.wanted(source, split, names)
                sizes = {name: size_of(root / name) for name in wanted}
                opened = {name: partial(open, root / name, "rb") for name in wanted}
        except DAMAGED as error:
            raise ValueError(_damaged(f"data.source={source}", error)) from error
        return [self.part(source, name, sizes[name], opened[name]) for name in wanted]

    def files(self, source: Path, split: str, cache: Path) -> tuple[Path, list[str]]:
        """(folder, names in it) of a folder, of an unpacked tar, or of a file by itself."""
        if source.is_dir():
            found = [path for path in source.rglob("*") if path.is_file()]
            return source, [path.relative_to(source).as_posix() for path in found]
        if tarfile.is_tarfile(source):
            folder = unpacked(source, self.pattern(split), cache / "downloads")
            return folder, [path.name for path in folder.iterdir()]
        if source.suffix in SUFFIXES:
            raise ValueError(_damaged(f"data.source={source}", "neither zip nor tar"))
        return source.parent, [source.name]

    def wanted(self, source: Path, split: str, names: list[str]) -> list[str]:
        for name in (source.name, *names):
            if self.sister and self.sister in name.lower():
                raise ValueError(
                    f"data.source={source} is of another corpus ({name}); look at data.train and"
                    " data.valid"
                )
        if found := sorted(name for name in names if _matches(name, self.pattern(split))):
            return found
        known = ", ".join(sorted(names)[:10]) or "no file at all"
        raise ValueError(
            f"data.source={source} holds no {self.pattern(split)} ({split} split), but {known}"
        )

    def part(self, source: Path, name: str, size: int, opened: Callable) -> Part:
        place = f"data: {source}" if name == source.name else f"data: {source}, {name}"
        if size == 0:
            raise ValueError(f"{place} is empty; get it again")

        def read(column: str) -> Iterator[Piece]:
            try:
                with opened() as file:
                    for _, text, done in decoded_lines(file, place):
                        # as Python reads text: a lone carriage return ends a line too
                        for line in io.StringIO(text, newline=None) if "\r" in text else (text,):
                            yield Piece(self.line(line), True, done / size)
            except DAMAGED as error:
                raise ValueError(_damaged(place, error)) from error

        return Part(place.removeprefix("data: "), size, read, count_read(read))


def whole_unless_blank(line: str) -> str:
    """WikiText's rows: lines with their line break, and nothing for a blank one."""
    return line if line.strip() else ""


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(PurePath(name).name, pattern)


def _open_in_zip(path: Path, name: str):
    return zipfile.ZipFile(path).open(name)


def _damaged(place: str, error: Exception | str) -> str:
    return f"{place} is damaged or only a part of an archive ({error}); get it again"


def unpacked(source: Path, pattern: str, cache: Path) -> Path:
    """A folder with those files of a tar, unpacked once: a tar has no index to read them by."""
    status = source.stat()
    known = [str(source.resolve()), status.st_size, status.st_mtime_ns, pattern]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    folder = cache / f"unpacked-{digest}"
    with lock(folder):
        if not folder.is_dir():
            log.info("unpacking %s to %s", source, folder)
            with atomic_folder(folder, locked=True) as new:
                _unpack(source, pattern, new)
    return folder


def _unpack(source: Path, pattern: str, folder: Path) -> None:
    """Write the regular files only, under their names without folders, whatever a tar says."""
    names = []
    with tarfile.open(source) as archive:
        for member in archive:
            names.append(member.name)
            if member.isfile() and _matches(member.name, pattern):
                with (folder / PurePath(member.name).name).open("xb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file)
    if not any(folder.iterdir()):
        known = ", ".join(names[:10]) or "nothing"
        raise ValueError(f"data.source={source} holds no {pattern}, but {known}")


def text8(path: Path) -> str:
    """The text of text8.zip, or of the file inside it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "text8" not in names:
                raise ValueError(f"data: {path} holds {', '.join(names)}, but no file text8")
            try:
                content = archive.read("text8")
            except DAMAGED as error:
                raise ValueError(_damaged(f"data: {path}", error)) from error
    else:
        content = path.read_bytes()
    text = content.decode("ascii", errors="replace")
    if strange := sorted(set(text) - set("abcdefghijklmnopqrstuvwxyz ")):
        raise ValueError(
            f"data: {path} is not text8: it holds {strange[:5]} beside a-z and space; get"
            " text8.zip again"
        )
    return text


def fetched(url: str, folder: Path) -> Path:
    """The local copy of a file on the web, downloaded once and complete."""
    target = folder / url.rpartition("/")[2]
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s to %s", url, target)
    try:
        with urllib.request.urlopen(url, timeout=10) as response, atomic_file(target, "wb") as file:
            shutil.copyfileobj(response, file)
            length = response.headers.get("Content-Length")
            if length is not None and file.tell() != int(length):
                raise OSError(f"the connection ended after {file.tell()} of {length} bytes")
    except OSError as error:
        raise OSError(f"could not download {url} ({error}); place the file at {target}") from error
    return target
