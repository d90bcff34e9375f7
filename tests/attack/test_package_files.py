"""The npm package of the addresses: archives and folders that were made to do harm."""

import gzip
import os
import tarfile
from pathlib import Path

import pytest
from test_text_files import ESCAPE, fifo, linked, tarred, written
from tools import bounded, cases, refused

from data.packaged.state_of_the_union import MOST, MOST_ADDRESS, documents

NAME = "package/data/1790_a_n.txt"
BLOCK, CHECKSUM = 512, 148  # bytes of a header; where its checksum begins


@pytest.fixture(autouse=True)
def _folder(_launch_folder):
    """Each test in an empty one."""


def zipped(tar: bytes) -> str:
    return written("x.tgz", gzip.compress(tar, 1))


def of_members(*members: tuple[str, bytes], **kind) -> str:
    return zipped(Path(tarred(*members, **kind)).read_bytes())


def header(size: int, kind: bytes = tarfile.REGTYPE, form=tarfile.GNU_FORMAT) -> bytes:
    """Of a member whose content need not follow."""
    info = tarfile.TarInfo(NAME)
    info.size, info.type = size, kind
    return info.tobuf(form)


def cut(end: int) -> str:
    return written("x.tgz", Path(of_members((NAME, b"We met."))).read_bytes()[:end])


def bomb() -> str:
    """10 GB of zeros in 10 MB."""
    return written("x.tgz", gzip.compress(bytes(1 << 26)) * 160)


def folder(make) -> str:
    Path("data").mkdir()
    make("data/1790_a_n.txt")
    return "data"


def sparse(name: str) -> None:
    Path(name).touch()
    os.truncate(name, 8 << 30)


def many(first: str) -> None:
    for year in range(1790, 1790 + MOST // MOST_ADDRESS + 1):
        name = first.replace("1790", str(year))
        Path(name).touch()
        os.truncate(name, MOST_ADDRESS)


HOSTILE = {
    "a bomb": (bomb, "holds more than 33,554,432 bytes"),
    "a bomb of members": (
        lambda: zipped((header(1 << 20) + bytes(1 << 20)) * 40),
        "holds more than 33,554,432 bytes",
    ),
    "a bomb of sparse members": (
        lambda: zipped(header(1 << 40, tarfile.GNUTYPE_SPARSE) * 40),
        "is not whole",
    ),
    "a size that no archive has": (lambda: zipped(header(1 << 60)), "is not whole"),
    "a negative size": (lambda: zipped(header(-BLOCK) * 4), "is not whole"),
    "digits without an end": (
        lambda: zipped(header(1 << 24, tarfile.XHDTYPE) + b"1" * (1 << 24)),
        "holds no address",
    ),
    "headers of headers": (lambda: zipped(header(0, tarfile.XHDTYPE) * 40_000), "holds no address"),
    "links": (lambda: of_members((NAME, b""), kind=tarfile.SYMTYPE), "holds no address"),
    "hard links": (lambda: of_members((NAME, b""), kind=tarfile.LNKTYPE), "holds no address"),
    "devices": (lambda: of_members((NAME, b""), kind=tarfile.CHRTYPE), "holds no address"),
    "nothing": (lambda: zipped(b""), "holds no address"),
    "the same name twice": (
        lambda: of_members((NAME, b"a"), (f"../{NAME}", b"b")),
        "1790_a_n.txt twice",
    ),
    "a name that leads elsewhere": (
        lambda: of_members(("../../../etc/passwd", b"a"), (f"{ESCAPE}.txt", b"b")),
        "holds no address",
    ),
    "no text": (lambda: of_members((NAME, b"\xff\xfe")), "1790_a_n.txt, line 1 is not UTF-8"),
    "zeros": (lambda: of_members((NAME, bytes(1 << 16))), "bytes of zero and no others"),
    "an endless address": (
        lambda: of_members((NAME, b"a" * (MOST_ADDRESS + 1))),
        "has more than 1,048,576 bytes",
    ),
    "half of it": (lambda: cut(-30), "is damaged"),
    "a bit of it": (lambda: cut(8), "is damaged"),
    "no archive": (lambda: written("x.tgz", b"PK\x03\x04"), "is damaged"),
    "a FIFO": (lambda: fifo("x.tgz"), "no regular file"),
    "a device": (lambda: linked("/dev/zero", "x.tgz"), "no regular file"),
    "a sparse archive": (lambda: sparse("x.tgz") or "x.tgz", "more than 33,554,432 bytes"),
    "a FIFO in a folder": (lambda: folder(fifo), "no regular file"),
    "a device in a folder": (
        lambda: folder(lambda name: linked("/dev/zero", name)),
        "no regular file",
    ),
    "a sparse address": (lambda: folder(sparse), "more than 1,048,576 bytes"),
    "a folder of sparse addresses": (lambda: folder(many), "more than 33,554,432 bytes"),
}


@pytest.mark.parametrize(("make", "message"), cases(HOSTILE))
def test_a_hostile_package_is_refused(make, message):
    source = make()
    refused(lambda: documents("train", source), source, message)


def test_a_run_ends_before_it_reads_more_than_a_bomb_may_hold():
    words = [f"data.source={bomb()}", "data.cache_dir=cache", "wandb=null"]
    refused(["data=state_of_the_union", "mode=prepare", *words], "data.source=x.tgz", "holds more")


def text_or_refusal(tar: bytes) -> list[str] | str:
    try:
        return documents("train", zipped(tar))
    except ValueError as error:
        return str(error)


def test_any_byte_of_a_header_may_be_another():
    """Under a checksum that is right the text is as it was, or the package is refused."""
    tar = gzip.decompress(Path(of_members((NAME, b"We met."))).read_bytes())
    with bounded():
        for place in range(BLOCK):
            changed = bytearray(tar)
            changed[place] ^= 0xFF
            whole = sum(changed[:CHECKSUM]) + sum(changed[CHECKSUM + 8 : BLOCK]) + 8 * ord(" ")
            changed[CHECKSUM : CHECKSUM + 8] = b"%06o\0 " % whole
            found = text_or_refusal(bytes(changed))
            assert found == ["We met."] or "x.tgz" in found
        assert text_or_refusal(tar[:CHECKSUM] + b"7" + tar[CHECKSUM + 1 :]) != ["We met."]
