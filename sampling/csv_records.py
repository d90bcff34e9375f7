"""Records of a CSV file (RFC 4180) from its bytes, whatever the length of a cell.

The limit of Python's own reader (131 072 characters) is one number for the whole process. So this
project leaves it alone and reads with these few lines.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

from utils import MOST_LINE

# a cell in quotes, where "" is a quote, or one without; then the comma or the end of the record
CELL = re.compile(r'(?:"((?:[^"]++|"")*+)"|([^",\r\n]*+))(,|\r?\n\Z)')


def records(file: BinaryIO) -> Iterator[bytes]:
    """The whole records from here on, each with its line break; what stands behind the last one,
    outside of quotes, was not finished. ValueError: it has MOST_LINE bytes or more."""
    lines, rest, size, quotes = [], b"", 0, 0  # of the record that is not whole yet
    while content := file.read(1 << 20):
        *whole, rest = (rest + content).split(b"\n")
        for line in whole:
            lines.append(line)
            size += len(line) + 1
            quotes += line.count(b'"')
            if quotes % 2 == 0:
                yield b"\n".join([*lines, b""])
                lines, size, quotes = [], 0, 0
        if size + len(rest) >= MOST_LINE:
            raise ValueError(f"a row has {MOST_LINE:,} bytes or more")


def cells(record: bytes) -> list[str]:
    """Of a whole record. ValueError where quotes stand as they do in no CSV file."""
    text, found, place = record.decode("utf-8", errors="replace"), [], 0
    while place < len(text):
        cell = CELL.match(text, place)
        if cell is None:
            raise ValueError(f"cell {len(found) + 1} has a quote that is not doubled")
        found.append(cell[2] if cell[1] is None else cell[1].replace('""', '"'))
        place = cell.end()
    return found
