"""What a model family says about its files: how to read its config, and where each declared
parameter lies, in Hugging Face folders and in GGUF files.

A family is data: a name and one reader for each kind of file. Each file beside this one holds one
family or a few similar ones. `hf.py` and `gguf.py` hold what most families have in common.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...config import ModelConfig
from ...models.params import Param
from ..fields import Fields
from ..plan import ParamSource

__all__ = ["Family", "GGUFHeader", "GGUFReader", "HFReader", "SourceOf"]

SourceOf = Callable[[ModelConfig, Param], ParamSource]


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The description of a model in a GGUF file, without its weights."""

    fields: Fields  # the keys that begin with the architecture's name
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, by name
    # tensors of rotary factors, by name: each inverse frequency is divided by its factor
    rope_factors: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class HFReader:
    """How to read a family from a Hugging Face folder."""

    model_type: str  # of config.json
    config: Callable[[Fields], ModelConfig]
    source: SourceOf
    # the prefix of all names of tensors but lm_head; some files of the bare model leave it out
    prefix: str = "model."


@dataclass(frozen=True, slots=True)
class GGUFReader:
    """How to read a family from a GGUF file, and how to write its keys."""

    architecture: str  # of general.architecture
    config: Callable[[GGUFHeader], ModelConfig]
    source: SourceOf
    # the inverse of `config`: the values of its keys, for writing a file
    values: Callable[[ModelConfig], Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family, with its name in `ModelConfig.architecture`. `gguf` is None if GGUF files use the
    name of another family.
    """

    name: str
    hf: HFReader
    gguf: GGUFReader | None
