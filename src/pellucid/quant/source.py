"""The model that is quantized, as a GGUF file would hold it: metadata and named tensors.

A GGUF file is one already. The rooms above see only this protocol, so that other sources can stand
beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ..config import ModelConfig
from ..errors import UnsupportedError
from ..formats.tensor import HostTensor, TensorSpec
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.gguf_checkpoint import GGUFCheckpoint

__all__ = ["GGUFSource", "Source", "open_source"]


class Source(Protocol):
    """An open model. Use it as a context manager."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def checkpoint(self) -> Checkpoint:
        """The same model by canonical names: what a writer of folders reads."""
        ...

    @property
    def metadata(self) -> Mapping[str, object]:
        """The values of the file, with their types."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Format and shape of each tensor, by its name in GGUF files."""
        ...

    def tensor(self, name: str) -> HostTensor:
        """One tensor, read from the disk."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class GGUFSource:
    """A GGUF file, unchanged."""

    def __init__(self, checkpoint: GGUFCheckpoint) -> None:
        self.checkpoint: Checkpoint = checkpoint
        self._file = checkpoint.gguf
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.metadata: Mapping[str, object] = dict(self._file.metadata.typed())
        self.specs = {n: TensorSpec(t.format, t.shape) for n, t in self._file.tensors.items()}

    def tensor(self, name: str) -> HostTensor:
        return self._file.tensor(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.checkpoint.close()


def open_source(path: Path) -> Source:
    """Open a model that Pellucid can run. Raises UnsupportedError for any other."""
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, GGUFCheckpoint):
        return GGUFSource(checkpoint)
    checkpoint.close()
    raise UnsupportedError(f"{path} is a folder; only GGUF files can be quantized")
