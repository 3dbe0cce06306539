"""Writes GGUF version 3 files, for `gguf.py`, the `gguf` package and llama.cpp.

The file appears whole or not at all: it is written under another name and renamed when every byte
has reached the disk.

The type of a metadata value follows from its Python type, unless it is a `Typed`. Tensors are
written unchanged, in the given order. Sizes are in bytes. This module does not quantize and knows
only the key `general.alignment`.
"""

import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, UnsupportedError
from ..files import publish
from ..formats import FORMATS, HostTensor, host_tensor, packed_bytes
from ..formats.tensor import TensorSpec
from .gguf import DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_KEY_BYTES, MAX_NAME_BYTES, check_alignment
from .gguf_metadata import U64, Metadata, Typed, ValueType

__all__ = ["GGUFWriter", "Typed", "ValueType", "write_gguf"]

VERSION = 3
_INTEGER_RANGES = (
    (ValueType.UINT32, 0, (1 << 32) - 1),
    (ValueType.INT32, -(1 << 31), (1 << 31) - 1),
    (ValueType.UINT64, 0, (1 << 64) - 1),
    (ValueType.INT64, -(1 << 63), (1 << 63) - 1),
)


class GGUFWriter:
    """Writes one file as a context manager. The shapes and formats of all tensors are known at
    first; their bytes then come tensor by tensor, in order, in pieces of any size.

    `metadata` may be another file's `Metadata`, whose types are kept, or any mapping. Of a mapping,
    a bool, str or float is written as that type (float32), an int as the first of UINT32, INT32,
    UINT64, INT64 that holds it, and a list as an array of one of these types. Integers of a list
    try INT32 first, as ggml's readers expect. Raises ConfigError for values that cannot be written,
    and where the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, object],
        tensors: Sequence[tuple[str, TensorSpec]],
    ) -> None:
        self._path = Path(path)
        values = metadata.typed() if isinstance(metadata, Metadata) else metadata
        self._alignment = _alignment(values, self._path)
        header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(values)))
        for key, value in values.items():
            header += _string(key, "a metadata key", MAX_KEY_BYTES) + _value(key, value)
        header += _tensor_infos(tensors, self._alignment)
        header += bytes(-len(header) % self._alignment)
        self._header = header
        # bytes that the tensors still lack, the next one last
        self._missing = [packed_bytes(spec) for _, spec in reversed(tensors)]
        self._size = self._missing[-1] if tensors else 0  # of the tensor that is being written
        self._scratch = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}.part")
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            with self._disk():
                self._file = self._scratch.open("xb")
            self._put(self._header)
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, data: NDArray[np.uint8]) -> None:
        """The next bytes: the rest of a tensor, or a part of it."""
        if not self._missing or data.nbytes > self._missing[-1]:
            raise ValueError("more bytes than the tensors have")
        self._put(np.ascontiguousarray(data).data)
        self._missing[-1] -= data.nbytes
        if not self._missing[-1]:
            self._put(bytes(-self._size % self._alignment))
            self._missing.pop()
            self._size = self._missing[-1] if self._missing else 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the file its name, or leave nothing after an error."""
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{len(self._missing)} tensors were not written")
                with self._disk():
                    self._opened.close()
                    publish(self._scratch, self._path)
        finally:
            self._abandon()

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise ValueError("the writer is not open")
        return self._file

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        with self._disk():
            self._opened.write(data)

    def _abandon(self) -> None:
        """Close and remove the unfinished file."""
        if self._file is not None:
            with suppress(OSError):  # the disk is full: what could not be written is given up
                self._file.close()
        with suppress(OSError):  # it is not there, or the disk fails; the first error is the one
            self._scratch.unlink()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """An error of the disk as one sentence."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}") from error


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, object],
    tensors: Iterable[tuple[str, HostTensor]],
) -> None:
    """Write tensors that are in memory; `GGUFWriter` explains `metadata` and the errors."""
    listed = list(tensors)
    for _, tensor in listed:
        host_tensor(tensor.format, tensor.shape, tensor.data)  # checks the number of its bytes
    with GGUFWriter(path, metadata, [(name, tensor.spec) for name, tensor in listed]) as writer:
        for _, tensor in listed:
            writer.write(tensor.data)


def _alignment(values: Mapping[str, object], path: Path) -> int:
    value = values.get("general.alignment", DEFAULT_ALIGNMENT)
    value = value.value if isinstance(value, Typed) else value
    if not isinstance(value, int):
        raise ConfigError(f"metadata 'general.alignment' is {value!r}; it must be an integer")
    return check_alignment(value, str(path))


def _tensor_infos(tensors: Sequence[tuple[str, TensorSpec]], alignment: int) -> bytes:
    infos = bytearray()
    offset = 0
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ConfigError(f"the tensor {name!r} is given twice")
        seen.add(name)
        if len(tensor.shape) > MAX_DIMS:
            raise ConfigError(
                f"the tensor {name!r} has {len(tensor.shape)} dimensions; a GGUF file allows at "
                f"most {MAX_DIMS}"
            )
        if tensor.format not in FORMATS:
            raise UnsupportedError(
                f"the tensor {name!r} is {tensor.format}; a GGUF file holds {', '.join(FORMATS)}"
            )
        # llama.cpp needs room for a final zero
        infos += _string(name, "a tensor's name", MAX_NAME_BYTES - 1)
        infos += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        infos += struct.pack("<IQ", FORMATS[tensor.format].ggml_type, offset)
        offset += -(-packed_bytes(tensor) // alignment) * alignment
    return bytes(infos)


def _value(key: str, value: object) -> bytes:
    """A value as written to the file: its type, then the value."""
    typed = value if isinstance(value, Typed) else Typed(value, _infer_type(key, value))
    if typed.type is ValueType.ARRAY:
        raise ConfigError(
            f"metadata {key!r} is given the type ARRAY; give a list the type of its elements"
        )
    if not isinstance(typed.value, list):
        return struct.pack("<I", typed.type) + b"".join(_elements(key, [typed.value], typed.type))
    return struct.pack("<IIQ", ValueType.ARRAY, typed.type, len(typed.value)) + b"".join(
        _elements(key, typed.value, typed.type)
    )


def _elements(key: str, values: list[object], value_type: ValueType) -> Iterator[bytes]:
    if value_type is ValueType.STRING:
        for value in values:
            if not isinstance(value, str):
                raise ConfigError(f"metadata {key!r} holds {value!r}; it must be a string")
            yield _string(value, f"metadata {key!r}", None)
        return
    allowed = {
        ValueType.BOOL: (bool,),
        ValueType.FLOAT32: (float, int),
        ValueType.FLOAT64: (float, int),
    }.get(value_type, (int,))
    for value in values:
        if type(value) not in allowed:
            raise ConfigError(
                f"metadata {key!r} holds {value!r}, which cannot be written as {value_type.name}"
            )
    try:
        yield struct.pack(f"<{len(values)}{value_type.code}", *values)
    except (struct.error, OverflowError) as error:
        raise ConfigError(f"metadata {key!r} does not fit {value_type.name}: {error}") from None


def _infer_type(key: str, value: object) -> ValueType:
    elements = value if isinstance(value, list) else [value]
    # one type for all elements
    kinds = {type(element) for element in elements}
    if kinds == {bool}:
        return ValueType.BOOL
    if kinds == {str}:
        return ValueType.STRING
    if kinds == {float}:
        return ValueType.FLOAT32
    # the first integer type that holds them all
    if kinds == {int}:
        ranges = (
            sorted(_INTEGER_RANGES, key=lambda entry: entry[0] is not ValueType.INT32)
            if isinstance(value, list)
            else _INTEGER_RANGES
        )
        for value_type, low, high in ranges:
            if low <= min(elements) and max(elements) <= high:
                return value_type
    names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
    raise ConfigError(
        f"metadata {key!r} holds {names}; it must be bool, int (of 64 bits), float or str, or a "
        "list of one of these"
    )


def _string(text: str, what: str, limit: int | None) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} cannot be written as UTF-8: {error.reason}") from None
    if limit is not None and not 1 <= len(encoded) <= limit:
        raise ConfigError(
            f"{what} is {text!r}, of {len(encoded)} bytes; it must be of 1 to {limit}"
        )
    return U64.pack(len(encoded)) + encoded
