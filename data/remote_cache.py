"""Prepared data behind a URL (data.cache_dir=s3://bucket/data): whole folders, copied.

Rows are read through the page cache, so they are used from a local copy, which lies in the user's
cache folder. A remote folder is complete when it has its about.json, which is written last.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from settings.defaults import user_cache
from utils import plain_errors

log = logging.getLogger("bamdlm")

LAST = "about.json"


def is_url(cache_dir: str | Path) -> bool:
    return "://" in str(cache_dir)


def local(cache_dir: str | Path) -> Path:
    """The folder on this machine that stands for data.cache_dir."""
    if not is_url(cache_dir):
        return Path(cache_dir).expanduser()
    url = str(cache_dir).rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return user_cache() / "mirrors" / f"{url.rpartition('/')[2]}-{digest}"


@contextmanager
def reached(url: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """(file system, path in it). OSError: it cannot be reached, read or written."""
    try:
        with plain_errors(url):
            yield url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise OSError(
            f"data.cache_dir: {url} cannot be used ({error}); see to it, or give a folder of this"
            " machine"
        ) from error


def is_complete(url: str) -> bool:
    with reached(url) as (fs, path):
        return fs.exists(f"{path}/{LAST}")


def fetch(url: str, folder: Path) -> bool:
    """Copy a complete remote folder here, under its name when it is whole; False: there is none."""
    if not is_complete(url):
        return False
    new = folder.with_name(f"{folder.name}.fetched")
    shutil.rmtree(new, ignore_errors=True)  # of a killed process; the caller holds the lock
    log.info("copying %s to %s", url, folder)
    try:
        new.mkdir(parents=True)
        with reached(url) as (fs, path):
            for source in fs.ls(path, detail=False):
                fs.get_file(source, str(new / source.rpartition("/")[2]))
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return True


def publish(folder: Path, url: str) -> None:
    """Copy a prepared folder there. Two machines that do it at once write the same files."""
    log.info("copying %s to %s", folder, url)
    files = sorted(folder.iterdir(), key=lambda file: file.name == LAST)
    with reached(url) as (fs, path):
        fs.makedirs(path, exist_ok=True)
        for file in files:
            fs.put_file(str(file), f"{path}/{file.name}")
