"""A GGUF file as a checkpoint. `gguf.py` reads the file, `gguf_config.py` builds the config, and
the family (`families/`) says where each parameter lies.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..config import MAX_HEAD_DIM, ModelConfig
from ..errors import FormatError
from ..files import Closing, PartialFile
from ..formats import dequantize
from ..formats.tensor import HostTensor, StoredMatrix, TensorSpec
from .families.gguf import ROPE_FACTORS
from .gguf import GGUFFile
from .gguf_config import build_gguf_config, gguf_reader
from .plan import Plan, build_plan, read_plan, stored_matrices

__all__ = ["GGUFCheckpoint"]

MAX_ROPE_FACTORS = MAX_HEAD_DIM // 2


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint(Closing):
    """One open .gguf file. `gguf` is the file itself: metadata and table of tensors."""

    path: Path
    gguf: GGUFFile
    config: ModelConfig
    _plan: Plan

    @classmethod
    def open(cls, path: Path, file: PartialFile | None = None) -> Self:
        """Read the header and the config, and check the tensors against the architecture's
        declaration. `file`: bytes that come from elsewhere; `path` is then its name in messages.
        """
        gguf = GGUFFile.open(path, file)
        try:
            specs = {name: TensorSpec(i.format, i.shape) for name, i in gguf.tensors.items()}
            shapes = {name: spec.shape for name, spec in specs.items()}
            factors = _rope_factors(gguf)
            config = build_gguf_config(gguf.metadata, shapes, factors, str(path))
            for name in factors:
                del specs[name]  # it is part of the config
            source = gguf_reader(gguf.metadata, str(path)).source
            return cls(path, gguf, config, build_plan(config, source, specs, str(path)))
        except BaseException:
            gguf.close()
            raise

    @property
    def tokenizer_source(self) -> Mapping[str, object]:
        return self.gguf.metadata

    def specs(self) -> dict[str, TensorSpec]:
        return {planned.name: planned.spec for planned in self._plan}

    def stored_matrices(self) -> dict[str, StoredMatrix]:
        return stored_matrices(self._plan, self.gguf.place)

    def parameters(self, without: Collection[str] = ()) -> Iterator[tuple[str, HostTensor]]:
        return read_plan([p for p in self._plan if p.name not in without], self.gguf.tensor)

    def close(self) -> None:
        self.gguf.close()


def _rope_factors(gguf: GGUFFile) -> dict[str, list[float]]:
    """The tensors of rotary factors that the file has, by name."""
    found = {}
    for name in ROPE_FACTORS:
        if name not in gguf.tensors:
            continue
        shape = gguf.tensors[name].shape
        if len(shape) != 1 or shape[0] > MAX_ROPE_FACTORS:
            raise FormatError(
                f"{gguf.path}: tensor {name!r} has shape {list(shape)}; it must be one row of at "
                f"most {MAX_ROPE_FACTORS}"
            )
        found[name] = [float(f) for f in dequantize(gguf.tensor(name))]
    return found
