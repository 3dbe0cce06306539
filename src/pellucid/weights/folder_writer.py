"""Writes a folder in Hugging Face's layout: tensors in .safetensors files of bounded size, their
index, and small files beside them.

The folder appears whole or not at all: it is written under another name beside its place, and
renamed when every byte has reached the disk. The formats and shapes of all tensors are known at
first, so their places are too, and their bytes may come in any order. Sizes are in bytes.

    u64 length of the header | the header, JSON: name -> {dtype, shape, data_offsets} | bytes

References: the format's description in the repository of the `safetensors` library; the names of
files in `huggingface_hub`.
"""

import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..files import sync
from ..formats.tensor import TensorSpec

__all__ = ["MAX_SHARD_BYTES", "FolderWriter", "check_target", "tensor_bytes"]

MAX_SHARD_BYTES = 5_000_000_000  # of a file's tensors, as in huggingface_hub
INDEX = "model.safetensors.index.json"
_SIZES = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1}
_SPARE_BYTES = 64 << 20  # for headers, the tokenizer and configs, which are not counted
_PIECE = 1 << 30  # of one call: Linux takes up to 2 GiB at a time


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor whose format is a type of safetensors files."""
    return math.prod(spec.shape) * _SIZES[spec.format]


def check_target(out: Path, num_bytes: int) -> None:
    """Raise ConfigError unless a folder of tensors of `num_bytes` can be written as `out`."""
    if out.is_file():
        raise ConfigError(f"out is {str(out)!r}, which is a file; give the name of a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"out is {str(out)!r}, a folder that is not empty; give the name of a new one"
        )
    if not out.parent.is_dir():
        raise ConfigError(f"out is {str(out)!r}; there is no folder {str(out.parent)!r}")
    free, needed = shutil.disk_usage(out.parent).free, num_bytes + _SPARE_BYTES
    if free < needed:
        raise ConfigError(
            f"{out} will take {needed} bytes, and its disk has {free} left; free {needed - free} "
            "first"
        )


class FolderWriter:
    """Writes one folder as a context manager. Raises ConfigError where the disk is full."""

    def __init__(
        self, out: Path, tensors: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """`tensors`: format and shape of each, by name, in the order in which files are filled."""
        self._out = out
        self._scratch = out.with_name(f".{out.name}.{secrets.token_hex(8)}.part")
        self._shards = _assign(tensors, max_shard_bytes)
        self._tensors = tensors
        self._places: dict[str, tuple[int, int]] = {}  # number of the file, offset in it
        self._missing = set(tensors)
        self._files: list[int] = []  # descriptors of the files that are open

    def __enter__(self) -> Self:
        try:
            with self._disk():
                self._scratch.mkdir()
                self._open_files()
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, data: NDArray[Any]) -> None:
        """The values or bytes of one tensor, in any order among the tensors."""
        if name not in self._missing:
            raise ValueError(f"{name} was written already, or is no tensor of this folder")
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if len(view) != tensor_bytes(self._tensors[name]):
            raise ValueError(f"{name} takes {self._tensors[name]}, not {len(view)} bytes")
        number, offset = self._places[name]
        self._put(self._files[number], view, offset)
        self._missing.remove(name)

    def write_file(self, name: str, data: bytes) -> None:
        """A small file of the folder. `name` may have folders in it."""
        with self._disk():
            path = self._scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the folder its name, or leave nothing after an error."""
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{len(self._missing)} tensors were not written")
                with self._disk():
                    for fd in self._files:
                        os.fsync(fd)
                    sync(self._scratch)
                    self._scratch.rename(self._out)  # in place of an empty folder, if there is one
                    sync(self._out.parent)
        finally:
            self._abandon()

    def _open_files(self) -> None:
        """Create the files with their headers, and their index if there are several."""
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards):
            file = "model.safetensors"
            if count > 1:
                file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            header, offsets = _header({name: self._tensors[name] for name in names})
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._files.append(os.open(self._scratch / file, flags, 0o666))
            self._put(self._files[-1], memoryview(header), 0)
            for name, offset in offsets.items():
                self._places[name] = number, len(header) + offset
                weight_map[name] = file
        if count > 1:
            total = sum(map(tensor_bytes, self._tensors.values()))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.write_file(INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _put(self, fd: int, view: memoryview, offset: int) -> None:
        with self._disk():
            done = 0
            while done < len(view):
                done += os.pwrite(fd, view[done : done + _PIECE], offset + done)

    def _abandon(self) -> None:
        """Close the files, and remove the unfinished folder."""
        for fd in self._files:
            with suppress(OSError):
                os.close(fd)
        self._files.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """An error of the disk as one sentence."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self._out} cannot be written: {error.strerror}") from error


def _assign(tensors: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    """The names of each file's tensors. A tensor of more than `limit` has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.items():
        more = tensor_bytes(spec)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and the offset of each tensor behind it. Wide types come first, so
    that each tensor is aligned to the size of its numbers.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    start = 0
    for name, spec in sorted(tensors.items(), key=lambda item: (-_SIZES[item[1].format], item[0])):
        stop = start + tensor_bytes(spec)
        header[name] = {
            "dtype": spec.format,
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        offsets[name], start = start, stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, offsets
