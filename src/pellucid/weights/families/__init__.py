"""The model families that can be read. Each is a file of this folder and an entry of `FAMILIES`."""

from ...errors import UnsupportedError
from .family import Family, GGUFHeader, GGUFReader, HFReader, SourceOf
from .gemma import GEMMA2, GEMMA3
from .gpt2 import GPT2
from .llama import LLAMA, MISTRAL
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3

__all__ = [
    "FAMILIES",
    "Family",
    "GGUFHeader",
    "GGUFReader",
    "HFReader",
    "SourceOf",
    "find_gguf_reader",
    "find_hf_reader",
    "gguf_reader_of",
    "gguf_source_of",
    "hf_source_of",
]

FAMILIES: tuple[Family, ...] = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)


def find_hf_reader(model_type: str, where: str) -> HFReader:
    """The reader of folders whose config.json has this `model_type`. `where` names the file in
    messages.
    """
    known = {family.hf.model_type: family.hf for family in FAMILIES}
    if model_type not in known:
        raise UnsupportedError(
            f"{where}: model_type is {model_type!r}; known ones are: {', '.join(known)}"
        )
    return known[model_type]


def find_gguf_reader(architecture: str, where: str) -> GGUFReader:
    """The reader of GGUF files with this `general.architecture`. `where` names the file in
    messages.
    """
    known = {f.gguf.architecture: f.gguf for f in FAMILIES if f.gguf is not None}
    if architecture not in known:
        raise UnsupportedError(
            f"{where}: architecture is {architecture!r}; known ones are: {', '.join(known)}"
        )
    return known[architecture]


def gguf_reader_of(architecture: str) -> GGUFReader:
    """The reader of GGUF files of a family, by its name in `ModelConfig.architecture`."""
    (reader,) = (family.gguf for family in FAMILIES if family.name == architecture)
    return reader or find_gguf_reader("llama", architecture)  # Mistral


def gguf_source_of(architecture: str) -> SourceOf:
    """Where the parameters of a family lie in GGUF files, by its name in
    `ModelConfig.architecture`.
    """
    return gguf_reader_of(architecture).source


def hf_source_of(architecture: str) -> SourceOf:
    """Where the parameters of a family lie in Hugging Face folders, by its name in
    `ModelConfig.architecture`.
    """
    (reader,) = (family.hf for family in FAMILIES if family.name == architecture)
    return reader.source
