"""The header of a GGUF file on the hub: only the parts that are read come, by HTTP ranges.

The file is a sparse one on this machine, of the size that it has on the hub. A part comes when it
is first read (`files.PartialFile`). The header grows in pieces that double, so a header of 6 MB
takes about four requests.
"""

import os
import tempfile
from pathlib import Path

from ..errors import DownloadError
from ..files import PartialFile
from .hub import choose_files, parse_hub_name
from .hub_config import hub_errors

__all__ = ["HubFile", "open_hub_gguf"]

FIRST_PIECE = 1 << 20
LARGEST_PIECE = 16 << 20


def open_hub_gguf(name: str) -> "HubFile":
    """The GGUF file that `name` (ORG/NAME, ORG/NAME:QUANT, ORG/NAME/FILE.gguf) means on the hub.
    Raises DownloadError in one sentence: no such model, no network, or a server without ranges.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    wanted = parse_hub_name(name)
    with hub_errors(str(wanted), wanted.repo):
        files = [entry.rfilename for entry in HfApi().model_info(wanted.repo).siblings or ()]
        if wanted.file is None and wanted.quant is None:
            files = [file for file in files if file.endswith(".gguf")]
        (file,) = choose_files(str(wanted), files, quant=wanted.quant, file=wanted.file)
        url = hf_hub_url(wanted.repo, file)
        size = get_hf_file_metadata(url).size
    if not size:
        raise DownloadError(f"the hub does not say how many bytes {wanted.repo}/{file} has")
    return HubFile(Path(wanted.repo) / file, wanted.repo, url, size)


class HubFile(PartialFile):
    """A file of the hub that comes in parts."""

    def __init__(self, path: Path, repo: str, url: str, size: int) -> None:
        """`path`: its name in messages."""
        with tempfile.TemporaryFile() as scratch:
            try:
                os.ftruncate(scratch.fileno(), size)
            except OSError as error:
                raise DownloadError(f"{path} is said to have {size} bytes: {error}") from error
            super().__init__(os.dup(scratch.fileno()), "rb+")
        self.path, self.fetched = path, 0  # bytes that came
        self._repo, self._url, self._size = repo, url, size
        self._front = 0  # bytes of the file's front that are here

    def need(self, offset: int, count: int) -> None:
        stop = min(self._size, offset + count)
        if stop <= self._front:
            return
        if offset <= self._front:  # the header goes on
            piece = min(max(FIRST_PIECE, self._front), LARGEST_PIECE)
            stop = min(self._size, max(stop, self._front + piece))
            self._fetch(self._front, stop)
            self._front = stop
        else:
            self._fetch(offset, stop)

    def _fetch(self, start: int, stop: int) -> None:
        """Bring the bytes `start` … `stop - 1`. A server that sends more is not read further."""
        from huggingface_hub import get_session
        from huggingface_hub.utils._headers import build_hf_headers

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        headers["Accept-Encoding"] = "identity"
        at = start
        with (
            hub_errors(str(self.path), self._repo),
            get_session().stream("GET", self._url, headers=headers, follow_redirects=True) as reply,
        ):
            reply.raise_for_status()
            if reply.status_code != 206:
                raise DownloadError(
                    f"{self.path} comes only as a whole: its server does not serve parts"
                )
            for piece in reply.iter_raw():
                piece = piece[: stop - at]
                os.pwrite(self.fileno(), piece, at)
                at += len(piece)
                if at == stop:
                    break
        self.fetched += at - start
        if at < stop:
            raise DownloadError(f"{self.path}: {at - start} of {stop - start} bytes came")
