"""The headers of a model on the hub, by HTTP ranges: of its GGUF file, or of its safetensors.

A header grows in pieces that double, so a header of 6 MB takes about four requests.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError
from .hub import HubName, choose_files, parse_hub_name
from .hub_config import fetch_file, hub_errors, list_files
from .remote_file import RemoteFile, read_range
from .safetensors_checkpoint import INDEX, QUANTIZE_CONFIG

__all__ = ["HubFile", "HubFolder", "find_on_hub"]

GGUF_PIECE = 1 << 20  # the first that comes: a GGUF header holds the tokenizer
SAFETENSORS_PIECE = 1 << 16
LARGEST_PIECE = 16 << 20
CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A model of safetensors on the hub."""

    path: Path  # a folder here with its JSON files
    repo: str
    weights: tuple[str, ...]

    def open_weights(self) -> Mapping[str, "HubFile"]:
        """Its .safetensors files by name. Close them."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = pool.map(lambda f: _open_file(self.repo, f, SAFETENSORS_PIECE), self.weights)
            files = dict(zip(self.weights, found, strict=True))
            list(pool.map(lambda file: file.need(0, 8), files.values()))
        return files


def find_on_hub(name: str) -> "HubFile | HubFolder | Path":
    """What `name` (ORG/NAME, ORG/NAME:QUANT, ORG/NAME/FILE.gguf) means on the hub: the JSON files
    of its safetensors, the config.json of a model whose weights cannot be read, or a GGUF file.

    Raises DownloadError in one sentence: no such model, no network, or a server without ranges.
    """
    wanted = parse_hub_name(name)
    files = list_files(wanted.repo)
    if wanted.quant is None and wanted.file is None and "config.json" in files:
        return _find_folder(wanted, files)
    (file,) = choose_files(str(wanted), files, quant=wanted.quant, file=wanted.file)
    return _open_file(wanted.repo, file, GGUF_PIECE)


def _find_folder(wanted: HubName, files: list[str]) -> HubFolder | Path:
    config = fetch_file(wanted.repo, "config.json")
    if not any(file.endswith(".safetensors") for file in files):
        return config
    chosen = choose_files(str(wanted), files)
    weights = tuple(file for file in chosen if file.endswith(".safetensors"))
    for file in (INDEX, QUANTIZE_CONFIG):
        if file in files:
            fetch_file(wanted.repo, file)
    return HubFolder(config.parent, wanted.repo, weights)


def _open_file(repo: str, file: str, first_piece: int) -> "HubFile":
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with hub_errors(f"{repo}/{file}", repo):
        url = hf_hub_url(repo, file)
        size = get_hf_file_metadata(url).size
    if not size:
        raise DownloadError(f"the hub does not say how many bytes {repo}/{file} has")
    return HubFile(Path(repo) / file, repo, url, size, first_piece)


class HubFile(RemoteFile):
    """A file of the hub that comes in parts."""

    def __init__(self, path: Path, repo: str, url: str, size: int, first_piece: int) -> None:
        """`path`: its name in messages. `first_piece`: bytes that come at once at the front."""
        super().__init__(path, size)
        self._repo, self._url, self._first_piece = repo, url, first_piece
        self._front = 0  # bytes of the file's front that are here

    def need(self, offset: int, count: int) -> None:
        stop = min(self.num_bytes, offset + count)
        if stop <= self._front:
            return
        if offset <= self._front:  # the header goes on
            piece = min(max(self._first_piece, self._front), LARGEST_PIECE)
            stop = min(self.num_bytes, max(stop, self._front + piece))
            self._fetch(self._front, stop)
            self._front = stop
        else:
            self._fetch(offset, stop)

    def _fetch(self, start: int, stop: int) -> None:
        """Bring the bytes `start` … `stop - 1`."""
        from huggingface_hub.utils._headers import build_hf_headers

        with hub_errors(str(self.path), self._repo):
            self.put(
                start,
                read_range(self._url, start, stop, name=str(self.path), headers=build_hf_headers()),
            )
