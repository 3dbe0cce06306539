"""A strict reader of GGUF, the one-file format of ggml and llama.cpp: metadata, then tensors, then
their bytes.

The file is untrusted. No count, length, type or offset is used before it is checked against the
rest of the file, so a damaged or hostile file gives one clear sentence and never takes much memory.
After opening, no further checks are needed: each value and each tensor lies whole inside the file,
and no two tensors share a byte.

Bytes are copied into new memory (`pread`), never mapped. So a file that is cut short while it is
read, or a disk that fails, is an error. With a memory map, either would end the process with
SIGBUS.

    "GGUF" | u32 version | u64 tensors | u64 values | metadata | names, shapes, types, offsets of
    tensors | padding | bytes of tensors

Versions 2 and 3, little-endian. Reference: docs/gguf.md in ggml. Offsets and sizes are in bytes.
This module has no knowledge of architectures or names of tensors, and never writes to the file.
"""

import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import BinaryIO, Self

from ..errors import FormatError, UnsupportedError
from ..files import Closing, PartialFile, open_regular, read_at, size_of
from ..formats import HostTensor, format_of_ggml_type, host_tensor, row_bytes
from .gguf_metadata import U64, Field, Metadata, ValueType, quote
from .scratch import Scratch

__all__ = ["DEFAULT_ALIGNMENT", "GGUFFile", "TensorInfo", "check_alignment"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_VALUES = 1 << 16  # metadata keys
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 64
MAX_HEADER_BYTES = 1 << 28  # everything before the tensors' bytes: ten times the largest known
MAX_DIMS = 4
MAX_ELEMENTS = 1 << 20  # of one metadata array: twice the longest known list of merges
_FIRST_READ = 1 << 16
MIN_VALUE_BYTES = 8 + 1 + 4 + 1  # a key of one letter, a type, a byte
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # a name of one letter, one dimension, a type, an offset


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The checked description of one tensor."""

    name: str
    shape: tuple[int, ...]  # row-major: the file's own order reversed
    format: str  # a key of formats.FORMATS
    offset: int  # of its first byte, from the beginning of the file
    nbytes: int


class GGUFFile(Closing):
    """An open GGUF file. `close` closes it, or the end of the last reference to it."""

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: Metadata,
        tensors: Mapping[str, TensorInfo],
        file: BinaryIO,
    ) -> None:
        """Use `GGUFFile.open`."""
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._file = file
        self._close = weakref.finalize(self, file.close)

    @classmethod
    def open(cls, path: str | os.PathLike[str], file: PartialFile | None = None) -> Self:
        """Read and check the header. Takes some hundredths of a second, independent of the size of
        the tensors. `file`: bytes that come from elsewhere; `path` is then its name in messages.
        """
        path = Path(path)
        opened = open_regular(path) if file is None else file
        try:
            return cls(path, *_read_header(path, opened), opened)
        except BaseException:
            opened.close()
            raise

    def tensor(self, name: str, scratch: Scratch | None = None) -> HostTensor:
        """One tensor, read into `scratch` or into new memory. Raises FormatError if it cannot be
        read.
        """
        if self._file.closed:
            raise ValueError(f"{self.path} is closed")
        if name not in self.tensors:
            raise FormatError(f"{self.path}: there is no tensor {name!r}")
        info = self.tensors[name]
        data = (scratch or Scratch()).array(info.nbytes)
        read_at(self._file, info.offset, data.data, f"tensor {quote(name)}")
        data.flags.writeable = False
        return host_tensor(info.format, info.shape, data)

    def place(self, name: str) -> tuple[BinaryIO, int, str]:
        """Where a tensor lies: the file, the offset of its first byte, its name in errors."""
        return self._file, self.tensors[name].offset, f"tensor {quote(name)}"

    def close(self) -> None:
        """Close the file. No more tensors can be read; earlier ones and the metadata stay
        readable.
        """
        self._close()


def check_alignment(alignment: int, where: str) -> int:
    """`alignment` itself, if tensors can be aligned to it: a power of two, 8 or more."""
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FormatError(
            f"{where}: metadata 'general.alignment' is {alignment}; it must be a power of two "
            f"from 8 to {MAX_ALIGNMENT}"
        )
    return alignment


class _Cursor:
    """Reads the header from front to back, and never past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size, self.position = path, file, size_of(file), 0
        self.buffer = bytearray()  # the part of the file that has been read, from its beginning

    def read_to(self, stop: int) -> None:
        """Read until `buffer` holds the first `stop` bytes of the file; `stop` lies within the
        file.
        """
        have = len(self.buffer)
        if stop <= have:
            return
        if stop > MAX_HEADER_BYTES:
            raise FormatError(
                f"{self.path}: metadata and names of tensors take more than {MAX_HEADER_BYTES} "
                "bytes, which is as much as is read"
            )
        # a quarter more each time, so that a long header needs few reads
        stop = min(self.size, max(stop, have + have // 4, _FIRST_READ))
        self.buffer += bytes(stop - have)
        with memoryview(self.buffer) as whole, whole[have:] as fresh:
            read_at(self.file, have, fresh, "the header")

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` and return where they begin."""
        start = self.position
        if nbytes > self.size - start:
            raise FormatError(
                f"{self.path}: {what} takes {nbytes} bytes at offset {start}, but the file ends "
                f"after {self.size}"
            )
        self.read_to(start + nbytes)
        self.position = start + nbytes
        return start

    def u32(self, what: str) -> int:
        start = self.take(4, what)
        return int.from_bytes(self.buffer[start : start + 4], "little")

    def u64(self, what: str) -> int:
        start = self.take(8, what)
        return int.from_bytes(self.buffer[start : start + 8], "little")

    def count(self, what: str, limit: int, min_bytes: int) -> int:
        """The number of items that follow, each of at least `min_bytes`."""
        count = self.u64(f"the number of {what}")
        if count > limit:
            raise FormatError(
                f"{self.path}: the number of {what} is {count}; it must be at most {limit}"
            )
        if count * min_bytes > self.size - self.position:
            left = self.size - self.position
            raise FormatError(
                f"{self.path}: {count} {what} take at least {count * min_bytes} bytes, but the "
                f"file has {left} left"
            )
        return count

    def name(self, what: str, limit: int) -> str:
        """A name: a string of 1 to `limit` bytes."""
        length = self.u64(f"the length of {what}")
        if not 1 <= length <= limit:
            raise FormatError(
                f"{self.path}: {what} is {length} bytes long; it must be from 1 to {limit}"
            )
        start = self.take(length, what)
        try:
            return self.buffer[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.path}: {what} is not valid UTF-8 ({error.reason} at its byte {error.start})"
            ) from None

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings. Opening a file spends most of its time in this loop, hence the
        local names.
        """
        buffer, unpack, position = self.buffer, U64.unpack_from, self.position
        last = len(buffer) - 8  # the last place in the buffer at which a length may begin
        for _ in repeat(None, count):
            if position > last:
                if position > self.size - 8:
                    raise self._past_the_end(what)
                self.read_to(position + 8)
                last = len(buffer) - 8
            position += 8 + unpack(buffer, position)[0]
        if position > self.size:
            raise self._past_the_end(what)
        self.read_to(position)
        self.position = position

    def _past_the_end(self, what: str) -> FormatError:
        return FormatError(
            f"{self.path}: {what} runs past the end of the file, which is at {self.size}"
        )


def _read_header(path: Path, file: BinaryIO) -> tuple[int, Metadata, dict[str, TensorInfo]]:
    """Version, metadata and table of tensors."""
    cursor = _Cursor(path, file)
    if not cursor.size:
        raise FormatError(f"{path} is empty")
    version = _read_version(cursor)
    num_tensors = cursor.count("tensors", MAX_TENSORS, MIN_TENSOR_BYTES)
    num_values = cursor.count("metadata values", MAX_VALUES, MIN_VALUE_BYTES)
    metadata = Metadata(path, cursor.buffer, _read_fields(cursor, num_values))
    alignment = check_alignment(
        metadata.integer("general.alignment", 1, MAX_ALIGNMENT, DEFAULT_ALIGNMENT), str(path)
    )
    parts = metadata.integer("split.count", 0, MAX_TENSORS, 1)
    if parts > 1:
        raise UnsupportedError(
            f"{path} is one of the {parts} parts of a split model; merge them into one file first"
        )
    tensors = _read_tensors(cursor, num_tensors, alignment)
    del cursor.buffer[cursor.position :]  # without tensors' bytes that were read too
    return version, metadata, tensors


def _read_version(cursor: _Cursor) -> int:
    cursor.read_to(min(len(MAGIC), cursor.size))
    magic = bytes(cursor.buffer[: len(MAGIC)])
    if magic != MAGIC:
        raise FormatError(
            f"{cursor.path} is not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}"
        )
    cursor.take(len(MAGIC), "the magic")
    version = cursor.u32("the version")
    if version and version % (1 << 16) == 0:  # a small number in big-endian order
        raise UnsupportedError(
            f"{cursor.path} is a big-endian GGUF file; only little-endian ones can be read"
        )
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{cursor.path} is of GGUF version {version}; versions 2 and 3 can be read"
        )
    return version


def _read_fields(cursor: _Cursor, num_values: int) -> dict[str, Field]:
    """Find the place of every metadata value, without decoding any."""
    fields: dict[str, Field] = {}
    for i in range(num_values):
        key = cursor.name(f"metadata key {i}", MAX_KEY_BYTES)
        what = f"metadata {quote(key)}"
        if key in fields:
            raise FormatError(f"{cursor.path}: {what} occurs twice")
        # its type, and the number of its elements
        value_type = _read_value_type(cursor, what)
        count = None
        if value_type is ValueType.ARRAY:
            value_type = _read_value_type(cursor, what)
            if value_type is ValueType.ARRAY:
                raise UnsupportedError(
                    f"{cursor.path}: {what} is an array of arrays; only flat arrays can be read"
                )
            count = cursor.count(f"elements of {what}", MAX_ELEMENTS, value_type.size)
        fields[key] = Field(value_type, cursor.position, count)
        if value_type is ValueType.STRING:
            cursor.skip_strings(1 if count is None else count, what)
        else:
            cursor.take(value_type.size * (1 if count is None else count), what)
    return fields


def _read_value_type(cursor: _Cursor, what: str) -> ValueType:
    number = cursor.u32(f"the type of {what}")
    if number > max(ValueType):
        raise FormatError(
            f"{cursor.path}: {what} is of value type {number}; it must be from 0 to "
            f"{max(ValueType):d}"
        )
    return ValueType(number)


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    """The place of every tensor. Checks that they lie inside the file and do not overlap."""
    claims = [_read_tensor(cursor, i) for i in range(num_tensors)]
    # tensors' bytes begin here, and their offsets count from here
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, format, offset, nbytes in claims:
        what = f"{cursor.path}: tensor {quote(name)}"
        if name in tensors:
            raise FormatError(f"{what} occurs twice")
        if offset % alignment:
            raise FormatError(
                f"{what} begins at offset {offset}, which is not a multiple of the alignment, "
                f"{alignment}"
            )
        if start + offset + nbytes > cursor.size:
            raise FormatError(
                f"{what} takes {nbytes} bytes at offset {start + offset}, but the file ends after "
                f"{cursor.size}"
            )
        tensors[name] = TensorInfo(name, shape, format, start + offset, nbytes)
    # no two may overlap
    by_offset = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in pairwise(by_offset):
        if before.offset + before.nbytes > after.offset:
            raise FormatError(
                f"{cursor.path}: the tensors {quote(before.name)} and {quote(after.name)} overlap "
                f"at offset {after.offset}"
            )
    return tensors


def _read_tensor(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], str, int, int]:
    """(name, shape, format, offset from the first tensor byte, bytes) of one tensor, not checked
    yet against the size of the file.
    """
    name = cursor.name(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {quote(name)}"
    # the shape, in the file's reversed order
    num_dims = cursor.u32(f"the number of dimensions of {what}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise FormatError(
            f"{cursor.path}: {what} has {num_dims} dimensions; it must have from 1 to {MAX_DIMS}"
        )
    shape = tuple(cursor.u64(f"dimension {i} of {what}") for i in range(num_dims))[::-1]
    if min(shape) < 1:
        raise FormatError(f"{cursor.path}: {what} has the shape {shape}; no dimension may be 0")
    # the format, and with it the number of bytes
    ggml_type = cursor.u32(f"the type of {what}")
    try:
        format = format_of_ggml_type(ggml_type).name
        nbytes = row_bytes(format, shape[-1]) * math.prod(shape[:-1])
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{cursor.path}: {what}: {error}") from None
    return name, shape, format, cursor.u64(f"the offset of {what}"), nbytes
