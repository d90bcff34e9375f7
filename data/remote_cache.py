"""Prepared data behind a URL (data.cache_dir=s3://bucket/data): whole folders, copied.

Rows are read through the page cache, so they are used from a local copy, which lies in the user's
cache folder. A remote folder is complete when it has its about.json, which is written last.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from utils import atomic_folder, digest, plain_errors

log = logging.getLogger("bamdlm")

LAST = "about.json"


@dataclass(frozen=True)
class CacheDir:
    """Where prepared data and downloads are kept."""

    folder: Path  # on this machine
    url: str | None = None  # where prepared folders are copied to, and from

    def remote(self, folder: Path) -> str | None:
        """The URL of a folder inside of `folder`; None where there is none."""
        if self.url is None:
            return None
        return f"{self.url}/{folder.relative_to(self.folder).as_posix()}"


def open_cache(cache_dir: str | Path, user_cache: Path) -> CacheDir:
    """cache_dir: as in data.cache_dir, a folder or a URL. user_cache: where copies of URLs lie."""
    if "://" not in str(cache_dir):
        return CacheDir(Path(os.path.expanduser(cache_dir)))
    url = str(cache_dir).rstrip("/")
    name = f"{url.rpartition('/')[2]}-{digest(url, 12)}"
    return CacheDir(user_cache / "mirrors" / name, url)


@contextmanager
def reached(url: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """(file system, path in it). OSError: it cannot be reached, read or written."""
    try:
        with plain_errors(url):
            yield url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise OSError(
            f"data.cache_dir: {url} cannot be used ({error}); correct it, or give a folder of this"
            " machine"
        ) from error


def is_complete(url: str) -> bool:
    with reached(url) as (fs, path):
        return fs.exists(f"{path}/{LAST}")


def fetch(url: str, folder: Path) -> bool:
    """Copy a complete remote folder here; False: there is none. The caller holds the folder's
    lock."""
    if not is_complete(url):
        return False
    log.info("copying %s to %s", url, folder)
    with atomic_folder(folder, locked=True) as new, reached(url) as (fs, path):
        for source in fs.ls(path, detail=False):
            fs.get_file(source, str(new / source.rpartition("/")[2]))
    return True


def publish(folder: Path, url: str) -> None:
    """Copy a prepared folder to the URL. Two machines may do it at once: their files are equal."""
    log.info("copying %s to %s", folder, url)
    files = sorted(folder.iterdir(), key=lambda file: file.name == LAST)
    with reached(url) as (fs, path):
        fs.makedirs(path, exist_ok=True)
        for file in files:
            fs.put_file(str(file), f"{path}/{file.name}")
