"""Checkpoints take each other's places, and are deleted, so that at any moment what has the name of
a checkpoint is whole. Files and links are exchanged at once; folders first lose their names.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import atomic_link

MARK = "link"  # in a folder that is there for a link: its name


def unfinished(name: str, token: str) -> str:
    """The name of a folder that is no checkpoint `name` yet, or no longer. A later run deletes it.
    Unfinished files have other names: each kind is cleared away by what made it."""
    return f".{token}.{name}.partial"


def put(partial: Path, path: Path, step: int) -> None:
    """`partial` gets the name `path`. One that says no step becomes a link to a folder that does,
    because a link can be exchanged at once."""
    numbered = re.search(r"step=\d+$", path.stem) is not None
    own = path if numbered else path.with_name(f"{path.stem}-step={step}{path.suffix}")
    if own != path:
        (partial / MARK).write_text(path.name)
    with making_way(own):
        own.unlink(missing_ok=True)  # a file
        os.rename(partial, own)
    if own != path:
        with making_way(path):
            atomic_link(path, own)


def left_behind(folder: Path) -> Iterator[Path]:
    """Folders that `put` made for links which do not lead there: it was killed on the way."""
    for mark in folder.glob(f"*/{MARK}"):
        link, own = folder / mark.read_text(errors="replace"), mark.parent
        if own.name.startswith(f"{link.stem}-step=") and link.resolve() != own.resolve():
            yield own


@contextmanager
def making_way(path: Path, *, keeps: bool = False) -> Iterator[None]:
    """A folder at `path`, or the one beside it to which `path` links, is deleted once the block has
    put something else there. keeps: not the latter."""
    linked = path.resolve() if path.is_symlink() and not keeps else None
    old = _set_aside(path)
    try:
        yield
    except BaseException:
        if old is not None:
            os.rename(old, path)
        raise
    for left in (old, linked):
        here = left is not None and left.parent == path.parent.resolve()
        if here and left not in (path.absolute(), path.resolve()):
            remove(left)


def remove(path: Path) -> None:
    """A checkpoint of either kind; of a link also the folder beside it. A folder loses its name
    first: nothing is ever half a checkpoint."""
    linked = path.resolve() if path.is_symlink() else None
    if linked is not None or not path.is_dir():
        path.unlink(missing_ok=True)
    elif (left := _set_aside(path)) is not None:
        shutil.rmtree(left)
    if linked is not None and linked.is_dir() and linked.parent == path.parent.resolve():
        remove(linked)


def _set_aside(path: Path) -> Path | None:
    """A folder at `path` gets a name by which a later run knows that it is to be deleted."""
    if path.is_symlink() or not path.is_dir():
        return None
    aside = path.parent.resolve() / unfinished(path.name, secrets.token_hex(4))
    os.rename(path, aside)
    return aside
