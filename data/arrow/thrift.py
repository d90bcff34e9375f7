"""Thrift's compact protocol, in which a parquet file says what it holds.

Source: github.com/apache/thrift, doc/specs/thrift-compact-protocol.md.
"""


class Damaged(ValueError):
    """What no parquet file holds."""


class Thrift:
    """Reads structs as {(field, kind): a whole number, a struct or a list of structs}.

    IndexError: the data end too early. most: items in lists and maps, all together.
    """

    FALSE, INT32, LIST, STRUCT = 2, 5, 9, 12

    def __init__(self, data: bytes, most: int):
        self.data, self.at, self.most = data, 0, most

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        number, shift = 0, 0
        while (byte := self.byte()) > 127:
            number, shift = number | (byte & 127) << shift, shift + 7
            if shift > 63:
                raise Damaged("a number without end")
        return number | byte << shift

    def signed(self, bits: int) -> int:
        """As the reader in C++ has it, which cuts off what is too large."""
        number = self.varint() & (1 << (64 if bits == 64 else 32)) - 1
        number = number >> 1 ^ -(number & 1)
        return (number + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)

    def struct(self, depth: int = 0) -> dict[tuple[int, int], object]:
        if depth > 20:
            raise Damaged("structs that are nested too deeply")
        found, field = {}, 0
        while (head := self.byte()) & 15:
            field = field + (head >> 4) if head >> 4 else self.signed(16)
            kind = head & 15
            found[field, kind] = self.value(kind, depth) if kind > 2 else None  # 1, 2: booleans
        return found

    def value(self, kind: int, depth: int) -> object:
        if kind in (1, 2, 3):
            self.at += 1
        elif kind in (4, 5, 6):
            return self.signed({4: 16, 5: 32, 6: 64}[kind])
        elif kind == 7:
            self.at += 8
        elif kind == 8:
            length = self.varint()
            self.at += length
        elif kind in (9, 10):
            head = self.byte()
            size = head >> 4
            return self.items(self.varint() if size == 15 else size, [head & 15], depth)
        elif kind == 11:
            if size := self.varint():
                kinds = self.byte()
                self.items(size, [kinds >> 4, kinds & 15], depth)
        elif kind == self.STRUCT:
            return self.struct(depth + 1)
        else:
            raise Damaged(f"a value of the unknown kind {kind}")
        return None

    def items(self, size: int, kinds: list[int], depth: int) -> list:
        self.most -= size
        if self.most < 0:
            raise Damaged("lists that are too long")
        found = [self.value(kind, depth) for _ in range(size) for kind in kinds]
        return found if kinds == [self.STRUCT] else []
