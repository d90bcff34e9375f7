"""Rows of L ids on disk: made once, read through the page cache. A prepared folder holds

    ids.bin      [rows, L] uint16, or uint32 for vocabularies above 65 536
    counts.bin   [rows] uint32, real tokens of each row; what follows them is padding
    marks.bin    [rows, 2, ceil(L / 8)] uint8, of documents apart alone: two bits for a token,
                 whether a document begins there and whether it is real (not padding); of
                 conversations a third one, whether it is of an answer
    about.json   what the rows were made from and how many there are

It is made under a temporary name (preparation.py): a folder with its own name is complete.
"""

import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data import packing
from utils import check_place, read_json

AGAIN = "the file was changed or damaged; delete the folder, and it will be made again"
DTYPES = ("uint16", "uint32")
FORMAT = 1  # raise it when the same settings would give other rows


def dtype_of(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """ids: with or without packing.SCORED."""
    ids = ids & ~packing.SCORED
    if ids.size and ids.max() >= vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {ids.max()}, but its vocabulary has {vocab_size} ids, the"
            " mask included; check data.tokenizer_name_or_path"
        )


def save(folder: Path, chunks: Iterable, dtype: type) -> tuple[int, int]:
    """(rows written, real tokens in them)"""
    rows, real, files = 0, 0, {}
    with ExitStack() as stack:
        for ids, counts, marks in chunks:
            arrays = {"ids.bin": ids.astype(dtype), "counts.bin": counts.astype(np.uint32)}
            if marks is not None:
                arrays["marks.bin"] = marks
            for name, array in arrays.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / name).open("wb"))
                files[name].write(array.tobytes())
            rows += len(ids)
            real += int(counts.sum())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return rows, real


class TokenRows:
    """A prepared folder, read through the page cache: opening it costs nothing."""

    def __init__(self, folder: str | Path):
        """ValueError where the files are not those that were written."""
        self.folder = Path(folder)
        self.about = read_json(self.folder / "about.json")
        self._check()
        self.length = self.about["shape"]["length"]
        self.dtype = np.dtype(self.about["dtype"])
        self.ids = self.array("ids.bin", self.dtype, (self.about["rows"], self.length))
        self.counts = self.array("counts.bin", np.dtype(np.uint32), (self.about["rows"],))
        if self.apart:
            bits = 2 + bool(self.about["shape"].get("scored"))
            shape = (self.about["rows"], bits, -(-self.length // 8))
            self.marks = self.array("marks.bin", np.dtype(np.uint8), shape)

    def _check(self) -> None:
        """Whether about.json has what the other files are read by."""
        about = self.about if isinstance(self.about, dict) else {}
        shape = about.get("shape")
        sizes = (about.get("rows"), shape.get("length") if isinstance(shape, dict) else None)
        whole = all(type(size) is int and 0 < size < 1 << 48 for size in sizes)
        if not whole or about.get("dtype") not in DTYPES:
            raise ValueError(f"{self.folder / 'about.json'} is not what was written: {AGAIN}")

    @property
    def apart(self) -> bool:
        """Whether documents are kept apart (data.pack=documents, whole)."""
        return self.about["shape"].get("align") is not None

    def array(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        path = self.folder / name
        check_place(path)
        expected = math.prod(shape) * dtype.itemsize
        found = path.stat().st_size
        if found != expected:
            raise ValueError(f"{path} has {found} bytes, {expected} were written: {AGAIN}")
        return np.memmap(path, dtype, "r", shape=shape)

    def __reduce__(self):  # a memory map would be copied into a worker
        return TokenRows, (self.folder,)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, L], 1 where a token may enter the loss [B, L]), both int64."""
        ids = np.array(self.ids[rows], np.int64)
        if self.apart:
            return ids, packing.scored(self.marks[rows], self.length)
        mask = np.arange(self.length) < self.counts[rows][:, None]
        return ids, mask.astype(np.int64)

    def document_ids(self, rows: list[int]) -> np.ndarray:
        """Where documents are apart: the number of each token's document in its row, int64 [B, L];
        0 is padding."""
        return packing.document_ids(self.marks[rows], self.length)
