"""Corpora as they were first published: text files in a folder, a zip or a tar, or a file alone.

An Archive says which files hold a split and how their lines become documents: as in the tables on
the hub, which were made from these files. Text8 is one file, cut by position.
"""

import fnmatch
import io
import json
import logging
import lzma
import os
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePath

from data.readers import DOCUMENT, MOST_PACKED, Piece, check_unpacked, cut_long, decoded_lines
from data.tables import Part, stamp
from utils import atomic_file, atomic_folder, digest, lock, naming

log = logging.getLogger("bamdlm")

DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)
KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
MOST_MEMBERS = 10_000  # files; those of lm1b are 153
SUFFIXES = (".zip", ".tar", ".tgz", ".gz")
TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
TEXT8_CHARACTERS = 100_000_000


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
        with _whole(f"data.source={source}"):
            files = self.files(source, split, cache)
            wanted = self.wanted(source, split, files)
            if source.is_file():
                _check_lines(source, [files[name] for name in wanted])
            return [self.part(source, name, *files[name]) for name in wanted]

    def files(self, source: Path, split: str, cache: Path) -> dict[str, tuple[int, Callable]]:
        """{name: (bytes, what opens it)} of a zip, a folder, an unpacked tar, or a file alone."""
        if zipfile.is_zipfile(source):
            found = _zip(source, *stamp(source).values(), os.getpid()).infolist()
            if len(found) > MOST_MEMBERS:
                raise ValueError(_too_many(source))
            for info in found:
                if _matches(info.filename, self.pattern(split)):
                    _check_zipped(source, info)
            return {
                i.filename: (i.file_size, partial(_open_in_zip, source, i.filename)) for i in found
            }
        if source.is_file() and not tarfile.is_tarfile(source):
            if source.suffix in SUFFIXES:
                raise ValueError(_damaged(f"data.source={source}", "neither zip nor tar"))
            folder, found = source.parent, [source]
        else:
            is_tar, pattern = source.is_file(), self.pattern(split)
            folder = unpacked(source, pattern, cache / "downloads") if is_tar else source
            found = [path for path in folder.rglob("*") if path.is_file()]
        return {
            path.relative_to(folder).as_posix(): (path.stat().st_size, partial(path.open, "rb"))
            for path in found
        }

    def wanted(self, source: Path, split: str, names: Iterable[str]) -> list[str]:
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
            with _whole(place), opened() as file:
                for _, text, done in decoded_lines(file, place):
                    # as Python reads text: a lone carriage return ends a line too
                    for line in io.StringIO(text, newline=None) if "\r" in text else (text,):
                        yield Piece(self.line(line), True, done / size)

        return Part(place.removeprefix("data: "), size, read)


def whole_unless_blank(line: str) -> str:
    """WikiText's rows: lines with their line break, and nothing for a blank one."""
    return line if line.strip() else ""


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(PurePath(name).name, pattern)


@lru_cache(1)
def _zip(path: Path, *_) -> zipfile.ZipFile:
    """Opened once for all of its files, as it is now and in this process."""
    return zipfile.ZipFile(path)


def _open_in_zip(path: Path, name: str):
    archive = _zip(path, *stamp(path).values(), os.getpid())
    return io.BufferedReader(archive.open(name), 1 << 20)


def _check_lines(source: Path, files: list[tuple[int, Callable]]) -> None:
    """Lines are documents, and many short ones take long. They are counted only where there may be
    too many of them."""
    packed, unpacked = source.stat().st_size, sum(size for size, _ in files)
    check_unpacked(f"data.source={source}", packed, unpacked)
    if unpacked + DOCUMENT * unpacked > MOST_PACKED * packed:  # if each byte were a line
        lines = 0
        for _, opened in files:
            with opened() as file:
                lines += sum(part.count(b"\n") for part in iter(partial(file.read, 1 << 20), b""))
        check_unpacked(f"data.source={source}", packed, unpacked + DOCUMENT * lines)


def _check_zipped(source: Path, info: zipfile.ZipInfo) -> None:
    place = f"data.source={source}, {info.filename}"
    if info.flag_bits & 1 or info.compress_type not in KNOWN:
        raise ValueError(
            f"{place} is encrypted or packed in an unknown way: unpack it, and give the folder"
        )
    check_unpacked(place, min(info.compress_size, source.stat().st_size), info.file_size)


def _too_many(source: Path) -> str:
    return f"data.source={source} holds more than {MOST_MEMBERS:,} files: unpack it"


@contextmanager
def _whole(place: str) -> Iterator[None]:
    """ValueError where what is unpacked is damaged. Of gzip and bzip2 this is an OSError, without
    the number that those of the disk have."""
    try:
        yield
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(_damaged(place, error)) from error


def _damaged(place: str, error: Exception | str) -> str:
    return f"{place} is damaged or only a part of an archive ({error}); get it again"


def unpacked(source: Path, pattern: str, cache: Path) -> Path:
    """A folder with those files of a tar, unpacked once: a tar has no index to read them by."""
    known = [*stamp(source).values(), pattern]
    folder = cache / f"unpacked-{digest(json.dumps(known), 12)}"
    with lock(folder):
        if not folder.is_dir():
            log.info("unpacking %s to %s", source, folder)
            with atomic_folder(folder, locked=True) as new:
                _unpack(source, pattern, new)
    return folder


def _unpack(source: Path, pattern: str, folder: Path) -> None:
    """Write the regular files only, under their names without folders, whatever a tar says."""
    names, size, place = [], 0, f"data.source={source}"
    with tarfile.open(source) as archive:
        for number, member in enumerate(archive):
            if number < 10:
                names.append(member.name)
            if number == MOST_MEMBERS:
                raise ValueError(_too_many(source))
            size += tarfile.BLOCKSIZE + max(0, member.size)
            check_unpacked(place, source.stat().st_size, size)
            if member.isfile() and _matches(member.name, pattern):
                new = folder / PurePath(member.name).name
                if new.exists():
                    raise ValueError(f"{place} holds {new.name} twice")
                if member.size > (room := shutil.disk_usage(folder).free):
                    raise ValueError(
                        f"{place}: {new.name} has {member.size:,} bytes, and {folder.parent} has"
                        f" room for {room:,}; give another data.cache_dir"
                    )
                with naming(new), new.open("xb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file)
    if not any(folder.iterdir()):
        raise ValueError(f"{place} holds no {pattern}, but {', '.join(names) or 'nothing'}")


@dataclass(frozen=True)
class Text8:
    """The first 100 MB of Wikipedia in a-z and space, cut 90 : 5 : 5; one document per split."""

    url: str = TEXT8_URL
    path: str | None = None  # a text8.zip or the file inside; None: downloaded once

    def identity(self, split, revision):
        return {"text8": stamp(self.file(Path(self.path))) if self.path else self.url}

    def file(self, path: Path) -> Path:
        """The zip or the file in a folder."""
        if not path.is_dir():
            return path
        for file in (path / "text8.zip", path / "text8"):
            if file.is_file():
                return file
        raise ValueError(f"data.source={path} holds neither text8.zip nor the file text8")

    def parts(self, split, revision, cache, *, download=True):
        path = self.file(Path(self.path)) if self.path else fetched(self.url, cache / "downloads")

        def read(column: str) -> Iterator[Piece]:
            text = text8(path)
            if len(text) != TEXT8_CHARACTERS:
                known = f"{TEXT8_CHARACTERS:,}"
                log.warning("%s has %s characters, text8 has %s", path, f"{len(text):,}", known)
            first, last = len(text) * 9 // 10, len(text) * 19 // 20
            return cut_long(text[:first] if split == "train" else text[last:])

        return [Part(str(path), 1, read)]


def text8(path: Path) -> str:
    """The text of text8.zip, or of the file inside it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "text8" not in names:
                raise ValueError(f"data: {path} holds {', '.join(names)}, but no file text8")
            size = archive.getinfo("text8").file_size
            if size > 2 * TEXT8_CHARACTERS:
                raise ValueError(f"data: {path} is not text8: it would unpack to {size:,} bytes")
            _check_zipped(path, archive.getinfo("text8"))
            with _whole(f"data: {path}"):
                content = archive.read("text8")
    else:
        with path.open("rb") as file:
            content = file.read(2 * TEXT8_CHARACTERS)
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
