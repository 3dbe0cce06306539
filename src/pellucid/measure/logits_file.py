"""A file of a base model's log-probabilities, so that many models can be compared with a base that
ran once.

    header   8 bytes  b"PLCDLOGP"
             uint32   version 1, bits of a number (16 or 32), V, n_ctx, first position that is
                      scored, number of windows
             32 bytes sha256 of the windows' token ids, as int32
             64 bytes the name of the base, UTF-8, filled up with zeros
    rows     for each scored token, in the order of the text:
             float32  log-probability of the token that follows
             uint32   the likeliest token
             V times  float16 or float32: the log-probabilities of the vocabulary

Everything is little-endian. float16 keeps 11 bits; rows are normalized again when they are used, so
a rounded row is still a distribution. An untrusted file is safe to read: its size must match its
header, nothing is mapped, and every number is checked. The file is written under another name and
renamed when it is complete. llama.cpp's file has another format and is not read.
"""

import hashlib
import os
import secrets
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import CapacityError, FormatError, RequestError
from ..files import open_regular, publish, read_at, size_of
from .divergence import Base, BaseRows, ReadPart
from .scoring import Windows

__all__ = ["LogitsDtype", "SavedBase", "SavingBase", "file_bytes"]

LogitsDtype = Literal["float16", "float32"]
_MAGIC = b"PLCDLOGP"
_HEADER = struct.Struct("<8s6I32s64s")
_VERSION = 1
_LIMIT = 1 << 24  # of V, n_ctx and the number of windows


def file_bytes(windows: Windows, vocab_size: int, dtype: LogitsDtype) -> int:
    """The size of the file for these windows."""
    rows = len(windows) * windows.rows_per_window
    return _HEADER.size + rows * _row(vocab_size, dtype).itemsize


def _row(vocab_size: int, dtype: LogitsDtype) -> np.dtype[np.void]:
    number = "<f2" if dtype == "float16" else "<f4"
    return np.dtype([("target", "<f4"), ("top", "<u4"), ("log_probs", number, (vocab_size,))])


def _digest(token_ids: NDArray[np.int32]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").tobytes()).digest()


class SavingBase:
    """Passes on the rows of a base, rounded as in the file, and writes them to the file."""

    def __init__(
        self,
        path: Path,
        base: Base,
        windows: Windows,
        *,
        vocab_size: int,
        name: str,
        dtype: LogitsDtype,
    ) -> None:
        """Raises CapacityError if the disk has no room, OSError if the file cannot be created."""
        size = file_bytes(windows, vocab_size, dtype)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise CapacityError(
                f"{path} would have {size} bytes, and the disk has {free} free; give --chunks, or "
                "float16 numbers"
            )
        self._path, self._base = path, base
        self._row = _row(vocab_size, dtype)
        self._next = 0  # row
        self._missing = len(windows) * windows.rows_per_window  # rows
        self._lock = Lock()
        self._scratch = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        self._fd = os.open(
            self._scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
        )
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            16 if dtype == "float16" else 32,
            vocab_size,
            windows.n_ctx,
            windows.first,
            len(windows),
            _digest(windows.token_ids),
            name.encode()[:64],
        )
        self._write(0, memoryview(header))

    def take(self, count: int) -> ReadPart:
        inner, start = self._base.take(count), self._next
        self._next += count

        def read(part: slice) -> BaseRows:
            rows = inner(part)
            saved = np.empty(len(rows.top), self._row)
            saved["target"], saved["top"] = rows.targets, rows.top
            # float16 ends at -65504; less likely tokens have no weight either
            saved["log_probs"] = np.maximum(rows.log_probs, -65504)
            offset = _HEADER.size + (start + part.start) * self._row.itemsize
            self._write(offset, saved.view(np.uint8).data)
            with self._lock:
                self._missing -= len(saved)
            return _base_rows(saved)

        return read

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the file its name if all rows are there; otherwise delete it."""
        os.close(self._fd)
        if kind is None and not self._missing:
            publish(self._scratch, self._path)
        else:
            with suppress(OSError):
                self._scratch.unlink()

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            try:
                count = os.pwrite(self._fd, data, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            data, offset = data[count:], offset + count


class SavedBase:
    """A base whose rows are read from a file."""

    def __init__(self, path: Path) -> None:
        """Open a file. Raises FormatError if it is of another format or damaged."""
        self._path = path
        self._file = open_regular(path)
        try:
            header = bytearray(_HEADER.size)
            if size_of(self._file) < _HEADER.size:
                raise FormatError(f"{path} is no file of log-probabilities: it is too short")
            read_at(self._file, 0, memoryview(header), "the header")
            magic, version, bits, vocab_size, n_ctx, first, count, digest, name = _HEADER.unpack(
                header
            )
            if magic == b"_logits_":
                raise FormatError(f"{path} is llama.cpp's file of logits, which is not read")
            if magic != _MAGIC or version != _VERSION or bits not in (16, 32):
                raise FormatError(f"{path} is no file of log-probabilities of this version")
            if not (
                0 < vocab_size <= _LIMIT and 0 < count <= _LIMIT and first + 1 < n_ctx <= _LIMIT
            ):
                raise FormatError(f"{path}: the sizes in its header are impossible")
            self.n_ctx: int = n_ctx
            self.num_windows: int = count
            self.name: str = name.rstrip(b"\0").decode(errors="replace")
            self._vocab_size, self._first, self._digest = vocab_size, first, digest
            self._row = _row(vocab_size, "float16" if bits == 16 else "float32")
            size = _HEADER.size + count * (n_ctx - 1 - first) * self._row.itemsize
            if size_of(self._file) != size:
                raise FormatError(
                    f"{path} has {size_of(self._file)} bytes; its header says {size}: it was cut "
                    "short, or is damaged"
                )
        except BaseException:
            self._file.close()
            raise
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, windows: Windows, vocab_size: int) -> None:
        """Raise RequestError unless the file holds the rows of these windows."""
        if self._vocab_size != vocab_size:
            raise RequestError(
                f"{self._path} is of a model with {self._vocab_size} tokens; the model that is "
                f"measured has {vocab_size}: only models of one vocabulary can be compared"
            )
        if (self._first, self.n_ctx) != (windows.first, windows.n_ctx):
            raise RequestError(
                f"{self._path} was made with n_ctx {self.n_ctx}, scored from position "
                f"{self._first}; now n_ctx is {windows.n_ctx}, scored from {windows.first}"
            )
        if _digest(windows.token_ids) != self._digest:
            raise RequestError(
                f"{self._path} was made from another text, or with another tokenizer"
            )

    def take(self, count: int) -> ReadPart:
        start = self._next
        self._next += count

        def read(part: slice) -> BaseRows:
            saved = np.empty(part.stop - part.start, self._row)
            offset = _HEADER.size + (start + part.start) * self._row.itemsize
            read_at(self._file, offset, saved.view(np.uint8).data, "log-probabilities")
            rows = _base_rows(saved)
            largest = rows.log_probs.max(axis=1)
            # A vocabulary would have to hold 1e17 tokens for the likeliest to have -40.
            if not (
                np.isfinite(rows.log_probs).all()
                and np.isfinite(rows.targets).all()
                and (largest > -40).all()
                and (largest < 0.01).all()
                and (rows.targets < 0.01).all()
                and (rows.top < self._vocab_size).all()
            ):
                raise FormatError(f"{self._path} holds numbers that are no log-probabilities")
            return rows

        return read


def _base_rows(saved: NDArray[np.void]) -> BaseRows:
    return BaseRows(
        saved["log_probs"].astype(np.float32),
        saved["top"].astype(np.int64),
        saved["target"].astype(np.float64),
    )
