"""A program in a pseudo-terminal: what it writes, and what is typed."""

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pellucid

COMMAND = [sys.executable, "-m", "pellucid"]
# Makes its standard input the controlling terminal, so that a typed Ctrl-C becomes a signal, and
# becomes the command.
IN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A program in a pseudo-terminal: what it writes, and what is typed."""

    def __init__(
        self, command: list[str], term: str = "dumb", columns: int = 100, rows: int = 40
    ) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = dict(
            os.environ,
            PYTHONPATH=str(Path(pellucid.__file__).parents[1]),
            TERM=term,
            PYTHONUNBUFFERED="1",
            PROMPT_TOOLKIT_NO_CPR="1",  # nobody answers where the cursor is
        )
        command = [sys.executable, "-c", IN_TERMINAL, *command]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = b""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def wait_for(self, pattern: bytes, seconds: float = 600) -> re.Match[bytes]:
        """Read until `pattern` has come since the last match; what was read is then done with."""
        match = self._find(pattern, seconds)
        assert match is not None, f"{pattern!r} did not come; this did: {self.seen!r}"
        return match

    def type_until(self, text: bytes, pattern: bytes) -> None:
        """Type `text` again and again, until `pattern` comes: a signal that finds input() between
        its prompt and its waiting is noticed with the next one only (CPython's readline module)."""
        for _ in range(20):
            self.type(text)
            if self._find(pattern, 3) is not None:
                return
        raise AssertionError(f"{pattern!r} did not come; this did: {self.seen!r}")

    def wait_for_end(self, seconds: float = 600) -> tuple[int, bytes]:
        """(exit code, all that was written and not yet waited for)."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(1.0, deadline - time.monotonic())), self.seen

    def _find(self, pattern: bytes, seconds: float) -> re.Match[bytes] | None:
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen, re.DOTALL)) is None:
            if not self._read(deadline - time.monotonic()):
                return None
        self.seen = self.seen[match.end() :]
        return match

    def _read(self, seconds: float) -> bool:
        if seconds <= 0 or not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # Linux says so where others give b"": the other side is closed
            return False
        self.seen += piece
        return bool(piece)


@contextmanager
def terminal(*arguments: str | Path, term: str = "dumb", columns: int = 100) -> Iterator[Terminal]:
    """The program in a terminal of this type and width."""
    opened = Terminal([*COMMAND, *map(str, arguments)], term, columns)
    try:
        yield opened
    finally:
        opened.close()
