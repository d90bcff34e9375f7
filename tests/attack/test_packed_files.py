"""Archives that say less or more than they hold, or cannot be unpacked."""

import gzip
import io
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_text_files import CACHE, documents
from tools import cases, refused

NAME = "wiki.train.raw"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- archives ------------------------------------------------------------------------------------


def head(kind: bytes = tarfile.REGTYPE, size: int = 0, name: str = NAME) -> bytearray:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


def tar(*members: bytes) -> str:
    Path("x.tar").write_bytes(b"".join(members))
    return "x.tar"


def hole() -> str:
    """2 KiB of the old format for sparse files, which unpack to 8 GiB of zeros."""
    found = head(tarfile.GNUTYPE_SPARSE, 512)
    found[386:410] = b"%011o\0%011o\0" % (0, 512)
    found[483:495] = b"%011o\0" % ((1 << 33) - 1)
    found[148:156] = b" " * 8
    found[148:156] = b"%06o\0 " % sum(found)
    return tar(found, b"a\n" * 256, bytes(1024))


def packed_tar(size: int, name: str = NAME) -> str:
    with gzip.open("x.tar.gz", "wb", compresslevel=6) as file:
        file.write(head(size=size, name=name))
        for _ in range(size >> 20):
            file.write(b"a\n" * (1 << 19))
    return "x.tar.gz"


def many() -> str:
    with gzip.open("x.tar.gz", "wb", compresslevel=1) as file:
        file.write(bytes(head(name="x")) * 10_001)
    return "x.tar.gz"


def pax(**said: str) -> str:
    with tarfile.open("x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(NAME)
        info.size, info.pax_headers = 4, said
        archive.addfile(info, io.BytesIO(b"a\nb\n"))
    return "x.tar"


def zipped(name: str = NAME, content: bytes = b"a\nb\n", **said: int) -> str:
    """A zip whose two heads of one file say: flags, method, size, packed."""
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    data = bytearray(Path("x.zip").read_bytes())
    for begin in (0, data.rfind(b"PK\x01\x02") + 2):  # the second one has a version more
        places = {"flags": ("<H", 6), "method": ("<H", 8), "packed": ("<I", 18), "size": ("<I", 22)}
        for field, value in said.items():
            form, place = places[field]
            struct.pack_into(form, data, begin + place, value)
    Path("x.zip").write_bytes(data)
    return "x.zip"


def wrong_sum() -> str:
    data = bytearray(Path(packed_tar(1 << 20)).read_bytes())
    data[-8:-4] = b"none"
    Path("x.tar.gz").write_bytes(data)
    return "x.tar.gz"


LONG = ("300 MB in 300 kB", "300 MB of another name", "zip: 300 MB in 300 kB")
FILLS = "it would fill the memory or the disk"
ARCHIVES = {
    "a file of 8 GB that is not there": (lambda: tar(head(size=(1 << 33) - 1), b"a\n"), FILLS),
    "a file of 2^60": (lambda: tar(head(size=1 << 60)), FILLS),
    "a hole of 8 GB": (hole, FILLS),
    "300 MB in 300 kB": (lambda: packed_tar(300 << 20), FILLS),
    "300 MB of another name": (lambda: packed_tar(300 << 20, "other"), FILLS),
    "10 001 files": (many, "holds more than 10,000 files"),
    "a size below zero": (lambda: pax(size="-5"), "x.tar"),
    "a size of text": (lambda: pax(size="many"), "x.tar"),
    "a size of 5 000 digits": (lambda: pax(size="9" * 5000), "x.tar"),
    "a name that is a path": (lambda: pax(path="../../../../../x"), "holds no wiki.train.raw"),
    "a gzip with another sum": (wrong_sum, "damaged or only a part"),
    "half a head": (lambda: tar(head(size=9)[:300]), "neither zip nor tar"),
    "half a gzip of a tar": (
        lambda: (
            Path(packed_tar(1 << 20)).write_bytes(Path("x.tar.gz").read_bytes()[:900])
            and "x.tar.gz"
        ),
        "x.tar.gz",
    ),
    "zip: 4 GB that are not there": (lambda: zipped(size=0xFFFFFFF0), FILLS),
    "zip: 4 GB in 4 GB": (lambda: zipped(size=0xFFFFFFF0, packed=0xFFFFFF00), FILLS),
    "zip: less than it holds": (lambda: zipped(size=1), "damaged or only a part"),
    "zip: encrypted": (lambda: zipped(flags=1), "encrypted or packed in an unknown way"),
    "zip: an unknown method": (lambda: zipped(method=99), "encrypted or packed in an unknown way"),
    "zip: another method": (lambda: zipped(method=14), "damaged or only a part"),
    "zip: bzip2 that is none": (lambda: zipped(method=12), "damaged or only a part"),
    "zip: 10 001 files": (lambda: many_zipped(10_001), "holds more than 10,000 files"),
    "zip: 4 million lines in 8 kB": (lambda: zipped(content=b"a\n" * (4 << 20)), FILLS),
    "4 million lines in 8 kB": (lambda: packed_tar(8 << 20), FILLS),
    "zip: 300 MB in 300 kB": (lambda: zipped(content=b"a\n" * (150 << 20)), FILLS),
}


def many_zipped(count: int, content: str = "a\n", name: str = "news.en-{}-of-9") -> str:
    with zipfile.ZipFile("x.zip", "w") as archive:
        for number in range(count):
            archive.writestr(name.format(number), content)
    return "x.zip"


@pytest.mark.parametrize(("make", "message"), cases(ARCHIVES, LONG))
def test_an_archive_that_lies_is_refused(make, message):
    source = make()
    refused(lambda: documents("wikitext2", source=source), message, writes=[*CACHE, "*.raw"])


@pytest.mark.parametrize("said", [{"flags": 1}, {"method": 99}, {"size": 0xFFFFFFF0}])
def test_a_text8_that_lies_is_refused(said):
    source = zipped("text8", b"a b c", **said)
    refused(lambda: documents("text8", source=source), "x.zip", writes=CACHE)


def test_what_has_no_room_on_the_disk_is_not_unpacked(monkeypatch):
    source = tar(head(size=1024), b"a word\n" * 146 + b"b\n", bytes(1024))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        refused(
            lambda: documents("wikitext2", source=source),
            "wiki.train.raw has 1,024 bytes",
            "has room for 1,000; give another data.cache_dir",
            writes=CACHE,
        )
    assert len(documents("wikitext2", source=source)) == 147


def test_many_files_are_read_in_one_pass(monkeypatch):
    """The directory of a zip is as long as it has files: it is read once."""
    opened = []
    whole = zipfile.ZipFile.__init__
    monkeypatch.setattr(
        zipfile.ZipFile, "__init__", lambda self, *how: opened.append(how) or whole(self, *how)
    )
    names = documents("lm1b", source=many_zipped(3000))
    assert len(names) == 3000
    assert len(opened) <= 3


def test_a_zip_that_has_changed_is_read_anew():
    assert documents("lm1b", source=many_zipped(2)) == ["a"] * 2
    assert documents("lm1b", source=many_zipped(3, "another\n")) == ["another"] * 3


def test_many_short_lines_of_an_honest_size_are_read():
    assert len(documents("wikitext2", source=zipped(content=b"a\n" * 100_000))) == 100_000
