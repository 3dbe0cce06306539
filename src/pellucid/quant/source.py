"""The model that is quantized, as a GGUF file would hold it: metadata and named tensors.

A GGUF file is one already. Of a Hugging Face folder, `FolderSource` makes the keys and the tensors
that llama.cpp's converter would write, each tensor when it is asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ..config import ModelConfig
from ..files import Closing
from ..formats import dequantize, encode_dense
from ..formats.tensor import HostTensor, TensorSpec
from ..tokenizer.to_gguf import gguf_tokenizer
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.families import gguf_source_of
from ..weights.generation_config import gguf_sampling
from ..weights.gguf_checkpoint import GGUFCheckpoint
from ..weights.gguf_header import gguf_header
from ..weights.unfold import file_tensors

__all__ = ["FolderSource", "GGUFSource", "Source", "open_source"]


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


class GGUFSource(Closing):
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

    def close(self) -> None:
        """Close the model's files."""
        self.checkpoint.close()


class FolderSource(Closing):
    """A Hugging Face folder. Matrices keep their format, and everything else becomes F32, as ggml
    needs it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UnsupportedError where GGUF files cannot hold the model or its tokenizer."""
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.config = checkpoint.config
        # the tensors, as the family places them in GGUF files
        self._tensors = file_tensors(self.config, gguf_source_of(self.config.architecture))
        stored = checkpoint.specs()
        self._names = stored.keys()
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        keys, self._factors = gguf_header(self.config, shapes, str(self.path))
        self.specs = {
            name: TensorSpec(_format(name, tensor.shape, tensor.format(stored)), tensor.shape)
            for name, tensor in self._tensors.items()
        }
        self.specs |= {name: TensorSpec("F32", f.shape) for name, f in self._factors.items()}
        # the keys
        general: dict[str, object] = {
            **keys,
            "general.type": "model",
            "general.name": self.path.resolve().name,
            **gguf_sampling(self.path),
        }
        self.metadata: Mapping[str, object] = {
            **general,
            **gguf_tokenizer(self.path, self.config.vocab_size, general),
        }

    def tensor(self, name: str) -> HostTensor:
        if name in self._factors:
            return encode_dense(self._factors[name])
        tensor = self._tensors[name]
        others = self._names - set(tensor.parameters)
        built = tensor.build(dict(self.checkpoint.parameters(without=others)))
        if self.specs[name].format == "F32" and built.format != "F32":
            return encode_dense(dequantize(built))
        return built

    def close(self) -> None:
        """Close the model's files."""
        self.checkpoint.close()


def open_source(path: Path) -> Source:
    """Open a model that Pellucid can run. Raises UnsupportedError for a folder that GGUF files
    cannot hold.
    """
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, GGUFCheckpoint):
        return GGUFSource(checkpoint)
    try:
        return FolderSource(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _format(name: str, shape: tuple[int, ...], stored: str) -> str:
    """The format of a tensor before it is quantized: vectors and positions are F32."""
    return "F32" if len(shape) == 1 or name == "position_embd.weight" else stored
