"""One .safetensors file: names, shapes, formats and bytes.

    u64 length of the header | the header, JSON: name -> {dtype, shape, data_offsets} | the tensors'
    bytes

Little-endian. Sizes and offsets are in bytes, and offsets count from the end of the header. The
whole header is checked before any of it is used: the bytes of each tensor match its type and shape,
and the tensors lie one after another, from the end of the header to the end of the file.

A tensor is read into new memory on request, so a file that is cut short while it is read is an
error. With a memory map it would end the process. Reference: the format's description in the
repository of the `safetensors` library.
"""

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, TypeGuard

from ..errors import FormatError, UnsupportedError
from ..files import PartialFile, open_within, parse_json, read_at, size_of
from ..formats import HostTensor, host_tensor
from ..formats.tensor import TensorSpec
from .scratch import Scratch

__all__ = ["DTYPES", "INTEGER_DTYPES", "SafetensorsFile"]

DTYPES = ("F32", "F16", "BF16")  # the file's types that are also formats here, with the same names
# types of the parts of packed matrices; a tensor of one has the type's name in place of a format
INTEGER_DTYPES = ("I8", "I32", "I64")
# bits of one number, by type
_BITS = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
    | dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8)
    | dict.fromkeys(("I8", "U8", "BOOL"), 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)
MAX_HEADER_BYTES = 64 << 20
MAX_DIMS = 8
MAX_DIM = 1 << 40
_CHUNK = 1 << 20  # bytes that are read at a time for comparison


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int


class SafetensorsFile:
    """An open file. `close` closes it, or the end of the last reference to it."""

    def __init__(self, path: Path, entries: Mapping[str, _Entry], file: BinaryIO) -> None:
        """Use `SafetensorsFile.open`."""
        self.path = path
        self.specs: dict[str, TensorSpec] = {
            name: TensorSpec(entry.dtype, entry.shape) for name, entry in entries.items()
        }
        self._entries = entries
        self._file = file
        self.is_partial = isinstance(file, PartialFile)  # to read all of it would fetch it
        self.close = weakref.finalize(self, file.close)

    @classmethod
    def open(cls, path: Path, file: PartialFile | None = None) -> Self:
        """Open a file of the model's folder `path.parent`, and check its header. `file`: bytes that
        come from elsewhere; `path` is then its name in messages.
        """
        opened = open_within(path.parent, path.name) if file is None else file
        try:
            return cls(path, _read_header(path, opened), opened)
        except BaseException:
            opened.close()
            raise

    def num_bytes(self, name: str) -> int:
        """The bytes that a tensor takes in the file."""
        return self._entries[name].stop - self._entries[name].start

    def tensor(self, name: str, scratch: Scratch | None = None) -> HostTensor:
        """One tensor, read into `scratch` or into new memory. Raises UnsupportedError for types
        other than DTYPES and INTEGER_DTYPES, and FormatError if it cannot be read.
        """
        entry = self._entries[name]
        if entry.dtype not in DTYPES + INTEGER_DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is of type {entry.dtype}; those that can be read "
                f"are {', '.join(DTYPES + INTEGER_DTYPES)}"
            )
        data = (scratch or Scratch()).array(entry.stop - entry.start)
        read_at(self._file, entry.start, data.data, f"tensor {name!r}")
        data.flags.writeable = False
        if entry.dtype in INTEGER_DTYPES:
            return HostTensor(entry.dtype, entry.shape, data)
        return host_tensor(entry.dtype, entry.shape, data)

    def place(self, name: str) -> tuple[BinaryIO, int, str]:
        """Where a tensor lies: the file, the offset of its first byte, its name in errors."""
        return self._file, self._entries[name].start, f"tensor {name!r}"

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, in pieces."""
        entry = self._entries[name]
        for start in range(entry.start, entry.stop, _CHUNK):
            chunk = bytearray(min(_CHUNK, entry.stop - start))
            read_at(self._file, start, memoryview(chunk), f"tensor {name!r}")
            yield bytes(chunk)


def _read_header(path: Path, file: BinaryIO) -> dict[str, _Entry]:
    """The tensors of the header by name, checked against the size of the file."""
    size = size_of(file)
    if size < 8:
        raise _unsound(path, f"it has {size} bytes, and the length of its header alone takes 8")
    length = bytearray(8)
    read_at(file, 0, memoryview(length), "the length of the header")
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise _unsound(
            path,
            f"its header is said to take {num_bytes} bytes; the file has {size - 8} after that "
            f"number, and at most {MAX_HEADER_BYTES} are read",
        )
    # the header's text, and its entries
    text = bytearray(num_bytes)
    read_at(file, 8, memoryview(text), "the header")
    header = parse_json(bytes(text), f"{path} is not a sound safetensors file: the header")
    header.pop("__metadata__", None)
    first = 8 + num_bytes
    entries = {name: _entry(path, name, value, first) for name, value in header.items()}

    # tensors lie one after another, without a gap, to the end of the file
    end = first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise _unsound(
                path, f"tensor {name[:80]!r} begins at {entry.start}; the one before ends at {end}"
            )
        end = entry.stop
    if end != size:
        raise _unsound(path, f"its tensors end at {end}; the file has {size} bytes")
    return entries


def _entry(path: Path, name: str, value: object, first: int) -> _Entry:
    """An entry of the header, checked by itself. `first` is the offset of the first tensor byte."""
    if not isinstance(value, dict):
        raise _unsound(path, f"tensor {name[:80]!r} is not described by an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _unsound(path, f"tensor {name[:80]!r} is of the unknown type {str(dtype)[:40]!r}")
    if not _are_sizes(shape, MAX_DIM) or len(shape) > MAX_DIMS:
        raise _unsound(
            path,
            f"the shape of tensor {name[:80]!r} is no list of at most {MAX_DIMS} integers from 0 "
            f"to {MAX_DIM}",
        )
    if not _are_sizes(offsets, 1 << 62) or len(offsets) != 2:
        raise _unsound(path, f"data_offsets of tensor {name[:80]!r} are not two offsets")
    # the bytes must match the type and the shape
    start, stop = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if 8 * (stop - start) != bits:
        raise _unsound(
            path,
            f"tensor {name[:80]!r} lies from {start} to {stop}, and {dtype} of shape {shape} takes "
            f"{bits / 8:g} bytes",
        )
    return _Entry(dtype, tuple(shape), first + start, first + stop)


def _are_sizes(value: object, limit: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= limit for v in value
    )


def _unsound(path: Path, problem: str) -> FormatError:
    return FormatError(f"{path} is not a sound safetensors file: {problem}")
