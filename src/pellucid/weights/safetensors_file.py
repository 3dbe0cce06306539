"""One .safetensors file, memory-mapped: names, shapes, formats and bytes.

One idea: the `safetensors` library checks the file (that its header is sound, and that the tensors
lie one after another, inside it, as long as their shapes say), and the bytes are then read in
place. The library's own NumPy reader knows no bfloat16 and copies; a `HostTensor` needs neither
values nor a copy, only where the bytes are.

    u64 length of the header | the header, JSON: name -> {dtype, shape, data_offsets} | the tensors'
    bytes

Little-endian. Sizes and offsets are in bytes, offsets count from the end of the header.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, UnsupportedError
from ..files import parse_json
from ..formats import HostTensor, host_tensor
from ..formats.tensor import TensorSpec

__all__ = ["DTYPES", "SafetensorsFile"]

DTYPES = ("F32", "F16", "BF16")  # the file's types that are formats here, under the same names


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int


class SafetensorsFile:
    """An open file. Tensors are views of the memory map, which stays mapped until the last of them
    is gone.
    """

    def __init__(self, path: Path, entries: Mapping[str, _Entry], data: NDArray[np.uint8]) -> None:
        """Use `SafetensorsFile.open`."""
        self.path = path
        self.specs: dict[str, TensorSpec] = {
            name: TensorSpec(entry.dtype, entry.shape) for name, entry in entries.items()
        }
        self._entries = entries
        self._data = data

    @classmethod
    def open(cls, path: Path) -> Self:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np"):
                pass  # what it would refuse, it has refused
            data = np.memmap(path, np.uint8, mode="r")
        except SafetensorError as error:
            raise FormatError(f"{path} is not a sound safetensors file: {error}") from error
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
        first = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = parse_json(data[8:first].tobytes(), f"{path}: the header")
        header.pop("__metadata__", None)
        entries = {name: _entry(value, first) for name, value in header.items()}
        return cls(path, entries, data)

    def tensor(self, name: str) -> HostTensor:
        """The bytes of one tensor, in place. Types other than float32, float16 and bfloat16 are
        refused.
        """
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is of type {entry.dtype}; those that can be read "
                f"are {', '.join(DTYPES)}"
            )
        return host_tensor(entry.dtype, entry.shape, self._data[entry.start : entry.stop])


def _entry(value: Any, first: int) -> _Entry:
    """An entry of a header that the library has found sound. `first` is the offset of the tensors'
    first byte.
    """
    start, stop = value["data_offsets"]
    return _Entry(value["dtype"], tuple(value["shape"]), first + start, first + stop)
