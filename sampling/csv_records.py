"""Records of a CSV file (RFC 4180) from its bytes, whatever the length of a cell.

The limit of Python's own reader (131 072 characters) is one number for the whole process. So this
project leaves it alone and reads with these few lines.
"""

import re
from collections.abc import Iterator

# a cell in quotes, where "" is a quote, or one without; then the comma or the end of the record
CELL = re.compile(r'(?:"((?:[^"]++|"")*+)"|([^",\r\n]*+))(,|\r?\n\Z)')


def records(content: bytes) -> Iterator[bytes]:
    """The whole records, each with its line break; what stands behind the last one, outside of
    quotes, was not finished."""
    begin = end = quotes = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 and line.endswith(b"\n"):
            yield content[begin:end]
            begin = end


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
