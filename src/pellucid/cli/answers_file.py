"""The file of answers that `pellucid batch` writes: one JSON object per line, whole lines only.

A run that was interrupted is continued by the same command. Every answer says which request it
belongs to, by its id or else its line number, and has a digest of the request. So the next run
skips the requests that are answered, and notices if the file belongs to other requests. What a
crash left of a last line, and records of requests that failed, are dropped first: a new file is
written beside the old one and takes its place.

Each answer is appended with one write, and the disk is told to keep it about once a second. Where
the disk is full, what was written of the last line is taken back.
"""

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

__all__ = ["MAX_ANSWER", "AnswersFile", "dump_line"]

MAX_ANSWER = 1 << 30  # bytes of one line
_SYNC_SECONDS = 1.0
# line ends that JSON lets stand in a string, and at which some readers of lines cut
_LINE_ENDS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})


class AnswersFile:
    """Where answers go, and which requests have theirs already."""

    def __init__(self, path: Path | None, source: int | None, *, overwrite: bool) -> None:
        """`path`: the file, None for standard output. `source`: the open file of the requests.

        Raises ConfigError where the file cannot be used: it is the file of requests, another run
        writes to it, or it holds something else than answers.
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
        # A link is followed now: a new file must take the place of the one that is meant.
        self._fd = _open(path.resolve())
        try:
            self._check_not(source)
            self._lock()
            self._begin_anew = overwrite and self._is_regular()  # with the first answer, not before
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
        """Whether answers are shown on a terminal, where nothing else may be drawn meanwhile."""
        return self._fd is not None and os.isatty(self._fd)

    def is_done(self, key: str, digest: str) -> bool:
        """Whether the request has its answer. Raises RequestError where that is the answer to
        another request of the same name.
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
        """Wait until the disk has everything."""
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
        """Refuse to write to the file that is read, by whatever name or link."""
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
        """Learn which requests are answered, and drop what is no answer."""
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
        """Put a file that has only the good answers of `old` in the place of `path`."""
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "wb", closefd=False) as new:
                for line, key, _ in self._answers(old):
                    if key is not None:
                        new.write(line)
            os.fchmod(fd, stat.S_IMODE(os.fstat(old.fileno()).st_mode))
            os.fsync(fd)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            os.replace(name, path)
        except BaseException:
            os.close(fd)
            os.unlink(name)
            raise
        if self._fd is not None:
            os.close(self._fd)
        self._fd = fd

    def _answers(self, file: BinaryIO) -> Iterator[tuple[bytes, str | None, str | None]]:
        """(line, key of its request, digest of it) of each record. The key is None where the
        request failed, or the last line is not whole.
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
    """A record as a line of JSON. Half a surrogate pair, which UTF-8 cannot hold, is escaped."""
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
    except OSError:  # a stream of a test, which has no file
        return None


def _open(path: Path) -> int:
    """Open for appending, and for reading what is there where that is a file."""
    special = path.exists() and not path.is_file()  # a pipe, a device, a folder
    flags = os.O_WRONLY if special else os.O_RDWR | os.O_APPEND | os.O_CREAT
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
