"""A model on disk, ready to be read: its config and its parameters, whatever the file format.

A `Checkpoint` yields exactly the parameters that the architecture declares, with canonical names
and shapes, after folding (`folds.py`). Opening it checks the whole plan (`plan.py`) against the
file's table of contents and reads no weights. So a missing, unknown or misshapen tensor is refused
at once, by its name. Tensors are read one at a time, and the checkpoint keeps none of them.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ..config import ModelConfig
from ..errors import ConfigError, UnsupportedError
from ..formats.tensor import HostTensor, StoredMatrix, TensorSpec
from .gguf_checkpoint import GGUFCheckpoint

__all__ = ["Checkpoint", "open_checkpoint"]


class Checkpoint(Protocol):
    """An open model. Use it as a context manager. Its tensors stay readable after it is closed."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def path(self) -> Path: ...

    @property
    def tokenizer_source(self) -> Path | Mapping[str, object]:
        """The source of the tokenizer: a GGUF file's metadata, or the folder."""
        ...

    def specs(self) -> dict[str, TensorSpec]:
        """Format and shape of every declared parameter by canonical name, in the order of
        `parameters`. Reads no weights.
        """
        ...

    def stored_matrices(self) -> dict[str, StoredMatrix]:
        """The parameters that are one matrix of a file, at most with the rows of heads in another
        order: where each lies, by canonical name, in the order of `parameters`.
        """
        ...

    def parameters(self, without: Collection[str] = ()) -> Iterator[tuple[str, HostTensor]]:
        """Every declared parameter once but those `without`, as canonical name and tensor. May be
        called again.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file, or a folder that holds config.json and safetensors."""
    if path.is_dir():
        from .safetensors_checkpoint import SafetensorsCheckpoint  # not needed for a GGUF file

        return SafetensorsCheckpoint.open(path)
    if not path.exists():
        raise ConfigError(f"model path is {str(path)!r}; there is no such file or folder")
    if path.suffix == ".safetensors":
        raise ConfigError(
            f"model path is {str(path)!r}; give the folder, which holds config.json beside it"
        )
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(
            f"{path} is a pickled checkpoint, which can run code when it is read; convert it to "
            "safetensors"
        )
    return GGUFCheckpoint.open(path)
