"""The metadata of a GGUF file: typed values under dotted keys, decoded on first access.

Opening a file only finds the place of each value. A vocabulary of 150,000 strings is stepped over
in a few hundredths of a second and becomes a Python list on first access. So a string that is not
UTF-8 is an error of that access.

Reference: docs/gguf.md in ggml. Numbers are little-endian; a string is a 64-bit length and that
many bytes of UTF-8. Returned values are shared and must not be changed. The bytes of the header are
kept as long as the metadata.
"""

import enum
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..errors import FormatError

__all__ = ["U64", "Field", "Metadata", "Typed", "ValueType", "quote"]

U64 = struct.Struct("<Q")


class ValueType(enum.IntEnum):
    """The types of values, by their numbers in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    @property
    def code(self) -> str:
        """The type's code in `struct`; NumPy uses the same codes for numbers."""
        return _CODES[self]

    @property
    def size(self) -> int:
        """Bytes of a number; for a string the smallest number of bytes."""
        return 8 if self is ValueType.STRING else struct.calcsize("<" + self.code)


_CODES = MappingProxyType(
    {
        ValueType.UINT8: "B",
        ValueType.INT8: "b",
        ValueType.UINT16: "H",
        ValueType.INT16: "h",
        ValueType.UINT32: "I",
        ValueType.INT32: "i",
    }
    | {
        ValueType.FLOAT32: "f",
        ValueType.BOOL: "?",
        ValueType.UINT64: "Q",
        ValueType.INT64: "q",
        ValueType.FLOAT64: "d",
    }
)


@dataclass(frozen=True, slots=True)
class Typed:
    """A value with its type in the file: the type of a scalar or string, or of the elements of a
    list.
    """

    value: object
    type: ValueType


@dataclass(frozen=True, slots=True)
class Field:
    """The place of one value: its type (of an array: the type of its elements), its first byte, and
    the number of elements (None: not an array).
    """

    type: ValueType
    start: int
    count: int | None


def quote(value: object) -> str:
    """A value from a file as messages show it: escaped, and at most one line."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:80] + "…"


class Metadata(Mapping[str, object]):
    """The values of one file by key: int, float, bool, str, or a list of one of them."""

    def __init__(self, path: Path, buffer: bytearray, fields: Mapping[str, Field]) -> None:
        """`fields` are the places of the values in `buffer`; the reader has checked them."""
        self.path = path
        self._buffer = buffer
        self._fields = fields
        self._decoded: dict[str, object] = {}

    def __getitem__(self, key: str) -> object:
        if key not in self._decoded:
            self._decoded[key] = self._decode(key, self._fields[key])
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def typed(self) -> dict[str, Typed]:
        """Every value with its type in the file, for writing them again unchanged."""
        return {key: Typed(self[key], field.type) for key, field in self._fields.items()}

    def integer(self, key: str, low: int, high: int, default: int) -> int:
        """The integer `key`, which must be in low … high; `default` if the file has none."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise FormatError(
                f"{self.path}: metadata {quote(key)} is {quote(value)}; it must be an integer "
                f"from {low} to {high}"
            )
        return value

    def _decode(self, key: str, field: Field) -> object:
        count = 1 if field.count is None else field.count
        values: list[object]
        if field.type is ValueType.STRING:
            values = self._decode_strings(key, field.start, count)
        elif field.type is ValueType.BOOL:
            flags = self._buffer[field.start : field.start + count]
            if flags.strip(b"\0\1"):
                raise FormatError(
                    f"{self.path}: metadata {quote(key)} holds the byte {max(flags)} as a truth "
                    "value; it must be 0 or 1"
                )
            values = [flag == 1 for flag in flags]
        else:
            values = np.frombuffer(self._buffer, "<" + field.type.code, count, field.start).tolist()
        return values[0] if field.count is None else values

    def _decode_strings(self, key: str, position: int, count: int) -> list[object]:
        strings: list[object] = []
        buffer, unpack = self._buffer, U64.unpack_from
        try:
            for _ in repeat(None, count):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                strings.append(buffer[start:position].decode())
        except UnicodeDecodeError as error:
            element = f" element {len(strings)}" if self._fields[key].count is not None else ""
            raise FormatError(
                f"{self.path}: metadata {quote(key)}{element} is not valid UTF-8 ({error.reason} "
                f"at its byte {error.start})"
            ) from None
        return strings
