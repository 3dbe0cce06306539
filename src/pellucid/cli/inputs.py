"""Opening the texts that a user names: prompts, requests, texts to measure on.

Such a text may come from a pipe, as of `<(command)` in a shell, or be typed at a terminal. Files of
models may not (`files.py`).
"""

import io
import os
import select
import stat
import sys
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import FormatError
from .terminal import say

__all__ = ["open_input", "open_stdin"]


class _Input(io.FileIO):
    """A file whose errors name it and say that it could not be read."""

    def __init__(self, fd: int, shown: str, *, closefd: bool = True) -> None:
        super().__init__(fd, "rb", closefd=closefd)
        self._shown = shown

    def readinto(self, buffer: object) -> int | None:
        try:
            return super().readinto(buffer)  # type: ignore[arg-type]
        except OSError as error:
            raise FormatError(f"{self._shown} cannot be read: {error.strerror}") from error

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise FormatError(f"{self._shown} cannot be read: {error.strerror}") from error


def open_input(path: Path) -> BinaryIO:
    """Open a regular file, a pipe or a terminal. If it is a pipe that has no data yet, a line on
    standard error says that the program waits.

    Raises FormatError for other devices, for folders and sockets, and, here and in each read, for
    an error of the system.
    """
    try:
        mode = os.stat(path).st_mode
        if not any(test(mode) for test in (stat.S_ISREG, stat.S_ISFIFO, stat.S_ISCHR)):
            raise FormatError(f"{path} is neither a file nor a pipe")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            if stat.S_ISCHR(mode) and not (os.isatty(fd) or os.path.samefile(path, os.devnull)):
                raise FormatError(f"{path} is a device; it must be a file, a pipe or a terminal")
            if stat.S_ISFIFO(mode):
                _wait_for_data(path, fd)
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    return cast(BinaryIO, io.BufferedReader(_Input(fd, str(path))))


def open_stdin() -> BinaryIO:
    """Standard input as a file of its own: a thread may still be blocked in a read of it when the
    interpreter exits.
    """
    try:
        fd = sys.stdin.fileno()
    except OSError:  # a stream of a test, which has no file
        return sys.stdin.buffer
    return cast(BinaryIO, io.BufferedReader(_Input(fd, "standard input", closefd=False)))


def _wait_for_data(path: Path, fd: int) -> None:
    """Wait until a pipe has data, or its writer has left. A named pipe that no writer has opened
    yet would otherwise look like an empty file.
    """
    if not select.select([fd], [], [], 0)[0]:
        say(f"[waiting for input from {path}]")
        select.select([fd], [], [])
