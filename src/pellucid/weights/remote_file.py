"""Model files of which only the front comes, from elsewhere, so that a header can be read without
the weights behind it.

The file is a sparse one on this machine, of the size that it has elsewhere. A part comes when it is
first read (`files.PartialFile`).
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import DownloadError
from ..files import PartialFile

__all__ = ["RemoteFile", "read_range"]


class RemoteFile(PartialFile):
    """A file that comes in parts."""

    def __init__(self, path: Path, size: int) -> None:
        """`path`: its name in messages."""
        with tempfile.TemporaryFile() as scratch:
            try:
                os.ftruncate(scratch.fileno(), size)
            except OSError as error:
                raise DownloadError(f"{path} is said to have {size} bytes: {error}") from error
            super().__init__(os.dup(scratch.fileno()), "rb+")
        self.path, self.fetched = path, 0  # bytes that came
        self.num_bytes = size

    def put(self, offset: int, pieces: Iterator[bytes]) -> int:
        """Write bytes that came at `offset`. Returns the offset behind them."""
        for piece in pieces:
            os.pwrite(self.fileno(), piece, offset)
            offset += len(piece)
            self.fetched += len(piece)
        return offset


def read_range(
    url: str, start: int, stop: int, *, name: str, headers: Mapping[str, str] | None = None
) -> Iterator[bytes]:
    """The bytes `start` … `stop - 1` of `url`, in pieces. A server that sends more is not read
    further.

    `name` begins the message of a DownloadError: the server has no ranges, or sent too little.
    Errors of the HTTP library pass through.
    """
    from huggingface_hub import get_session

    asked = {**(headers or {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    left = stop - start
    with get_session().stream("GET", url, headers=asked, follow_redirects=True) as reply:
        reply.raise_for_status()
        if reply.status_code != 206:
            raise DownloadError(f"{name} comes only as a whole: its server does not serve parts")
        for piece in reply.iter_raw():
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return
    raise DownloadError(f"{name}: {stop - start - left} of {stop - start} bytes came")
