"""The file of answers that `pellucid batch` writes: one JSON object per line, complete lines only.

The same command continues a run that was interrupted. Every answer names its request, by its id or
else its line number, and has a digest of the request. So the next run skips the requests that are
answered, and detects a file that belongs to other requests. A partial last line, and records of
requests that failed, are dropped first: a new file is written beside the old one and replaces it.

Each answer is appended with one write, and the file is synced about once a second. If the disk is
full, a partial last line is removed again.
"""

import errno
import fcntl
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from ..errors import ConfigError, RequestError
from ..files import publish
from .terminal import say

__all__ = ["MAX_ANSWER", "AnswersFile", "dump_line"]

MAX_ANSWER = 1 << 30  # bytes of one line
_SYNC_SECONDS = 1.0
# JSON allows these characters unescaped in strings, but some readers take them for line ends
_LINE_ENDS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})


class AnswersFile:
    """The destination of the answers, and the requests that are answered already."""

    def __init__(self, path: Path | None, source: int | None, *, overwrite: bool) -> None:
        """`path`: the file, None for standard output. `source`: the open file of the requests.

        Raises ConfigError if the file cannot be used: it is the file of requests, another run
        writes to it, or it holds something other than answers.
        """
        self._done: dict[str, str | None] = {}  # key of a request -> its digest
        self._name = "standard output" if path is None else str(path)
        self._stream: BinaryIO | None = None
        self._synced = time.monotonic()
        self._begin_anew = False
        if path is None:
            self._stream = sys.stdout.buffer
            self._fd = _fileno(self._stream)
            self._check_not(source)
            return
        # Resolve links now, so that a new file replaces the link's target and not the link.
        self._fd = _open(path.resolve())
        try:
            self._check_not(source)
            self._lock()
            self._begin_anew = overwrite and self._is_regular()  # opened with the first answer
            if self._is_regular() and not overwrite:
                self._resume(path.resolve())
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_terminal(self) -> bool:
        """Whether answers go to a terminal. Then no progress bar may be drawn there."""
        return self._fd is not None and os.isatty(self._fd)

    def is_done(self, key: str, digest: str) -> bool:
        """Whether the request is answered. Raises RequestError if the file has the answer to
        another request with the same key.
        """
        if key not in self._done:
            return False
        if self._done[key] not in (None, digest):
            raise RequestError(
                f"{self._name} holds the answer to another request under {key}; give another -o, "
                "or --overwrite"
            )
        return True

    def write(self, record: dict[str, Any]) -> None:
        """Append one answer."""
        line = dump_line(record)
        if self._stream is not None:
            self._stream.write(line)
            self._stream.flush()
            return
        assert self._fd is not None
        if self._begin_anew:
            os.ftruncate(self._fd, 0)
            self._begin_anew = False
        start = os.lseek(self._fd, 0, os.SEEK_END) if self._is_regular() else None
        try:
            _write_all(self._fd, line)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            if start is not None:
                os.ftruncate(self._fd, start)
            raise OSError(error.errno, error.strerror, self._name) from None

    def close(self) -> None:
        """Sync the file and close it."""
        if self._stream is None and self._fd is not None:
            self._sync()
            os.close(self._fd)

    def _is_regular(self) -> bool:
        return self._fd is not None and stat.S_ISREG(os.fstat(self._fd).st_mode)

    def _sync(self) -> None:
        if self._fd is not None and self._is_regular():
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def _check_not(self, source: int | None) -> None:
        """Refuse to write to the file that is read, even if it is named by a link."""
        if source is None or self._fd is None or not self._is_regular():
            return
        if os.path.samestat(os.fstat(source), os.fstat(self._fd)):
            raise ConfigError(
                f"the answers would go to the file of the requests ({self._name}); give another -o"
            )

    def _lock(self) -> None:
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run writes to {self._name}") from None
        except OSError:  # a pipe, or a file system without locks
            return

    def _resume(self, path: Path) -> None:
        """Read which requests are answered, and drop all other records."""
        with open(path, "rb") as old:
            kept = 0
            for line, key, digest in self._answers(old):
                if key is not None:
                    self._done[key] = digest
                    kept += len(line)
            if kept != os.fstat(old.fileno()).st_size:
                old.seek(0)
                self._replace(path, old)

    def _replace(self, path: Path, old: BinaryIO) -> None:
        """Replace `path` by a file that has only the valid answers of `old`."""
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "wb", closefd=False) as new:
                for line, key, _ in self._answers(old):
                    if key is not None:
                        new.write(line)
            os.fchmod(fd, stat.S_IMODE(os.fstat(old.fileno()).st_mode))
            with suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            publish(Path(name), path)
        except BaseException:
            os.close(fd)
            os.unlink(name)
            raise
        if self._fd is not None:
            os.close(self._fd)
        self._fd = fd

    def _answers(self, file: BinaryIO) -> Iterator[tuple[bytes, str | None, str | None]]:
        """(line, key of its request, digest of its request) of each record. The key is None if the
        request failed, or if the last line is partial.
        """
        for number, line in enumerate(iter(lambda: file.readline(MAX_ANSWER), b""), 1):
            try:
                record = json.loads(line)
                key, digest = _identity(record)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                if not line.endswith(b"\n") and line.startswith(b'{"'):
                    yield line, None, None
                    return
                raise ConfigError(
                    f"{self._name}, line {number}, is not an answer of `pellucid batch`; give "
                    "another -o, or --overwrite"
                ) from None
            failed = record.get("error") is not None
            yield line if line.endswith(b"\n") else line + b"\n", None if failed else key, digest


def dump_line(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON. A lone surrogate, which UTF-8 cannot encode, is escaped."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)
        return (text + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record) + "\n").encode()


def _identity(record: dict[str, Any]) -> tuple[str, str | None]:
    """The key and the digest of the request that a record answers."""
    if "custom_id" in record:
        digest = record["id"].removeprefix("batch_req_")
        return f"custom_id {record['custom_id']!r}", digest
    if record["line"] is None or not ("outputs" in record or "error" in record):
        raise KeyError("line")
    name = record.get("id")
    key = f"line {record['line']}" if name is None else f"id {name!r}"
    return key, record.get("digest")


def _fileno(stream: BinaryIO) -> int | None:
    try:
        return stream.fileno()
    except OSError:  # a test's stream, which has no file descriptor
        return None


def _open(path: Path) -> int:
    """Open for appending, and also for reading if it is a regular file."""
    special = path.exists() and not path.is_file()  # a pipe, a device, a folder
    if not special:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO or not path.is_fifo():
            raise
        say(f"[waiting for a program that reads {path}]")
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    os.set_blocking(fd, True)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
