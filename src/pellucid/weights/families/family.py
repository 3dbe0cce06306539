"""What this house must know of a model family to read its files: how its config is read, and where
each declared parameter lies, in Hugging Face folders and in GGUF files.

A family is data: a name and one reader for each kind of file. The files beside this one each hold
one family, or families that are nearly alike. `hf.py` and `gguf.py` hold what most have in common.
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
    """What a GGUF file says of a model, without its weights."""

    fields: Fields  # the keys that begin with the architecture's name
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, by name
    # by what tensors of rotary factors are called: what each inverse frequency is divided by
    rope_factors: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class HFReader:
    """How a Hugging Face folder holds a family."""

    model_type: str  # of config.json
    config: Callable[[Fields], ModelConfig]
    source: SourceOf
    # how the names of all tensors but lm_head begin; some files of the bare model leave it out
    prefix: str = "model."


@dataclass(frozen=True, slots=True)
class GGUFReader:
    """How a GGUF file holds a family."""

    architecture: str  # of general.architecture
    config: Callable[[GGUFHeader], ModelConfig]
    source: SourceOf


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family by the name that `ModelConfig.architecture` gives it. `gguf` is None where GGUF
    files call the family by the name of another one.
    """

    name: str
    hf: HFReader
    gguf: GGUFReader | None
