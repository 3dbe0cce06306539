"""A GGUF file as a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ..config import ModelConfig
from ..formats import dequantize
from ..formats.tensor import HostTensor
from .checkpoint import Plan, build_plan, read_plan
from .gguf import GGUFFile
from .gguf_config import ROPE_FREQS, build_gguf_config
from .names import gguf_recipe

__all__ = ["GGUFCheckpoint"]


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """One .gguf file, memory-mapped. `gguf` is the file itself: metadata and tensor table."""

    path: Path
    gguf: GGUFFile
    config: ModelConfig
    _plan: Plan

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map the file, read its config and check its tensors against what the architecture declares."""
        gguf = GGUFFile.open(path)
        try:
            shapes = {name: info.shape for name, info in gguf.tensors.items()}
            freqs = dequantize(gguf.tensor(ROPE_FREQS)).ravel().tolist() if ROPE_FREQS in shapes else None
            config = build_gguf_config(gguf.metadata, shapes, freqs, str(path))
            shapes.pop(ROPE_FREQS, None)  # it is part of the config now
            return cls(path, gguf, config, build_plan(config, gguf_recipe, shapes, str(path)))
        except BaseException:
            gguf.close()
            raise

    @property
    def tokenizer_source(self) -> Mapping[str, object]:
        return self.gguf.metadata

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        return read_plan(self._plan, self.gguf.tensor)

    def close(self) -> None:
        self.gguf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
