"""The tokenizer of a model, from its GGUF file or its folder."""

from collections.abc import Mapping
from pathlib import Path

from .from_folder import from_folder
from .from_gguf import from_gguf
from .tokenizer import Tokenizer

__all__ = ["load_tokenizer"]


def load_tokenizer(source: Path | Mapping[str, object]) -> Tokenizer:
    """From a folder that holds tokenizer.json, or from the metadata of a GGUF file."""
    return from_folder(source) if isinstance(source, Path) else from_gguf(source)
