"""The tokenizer of a model, from its GGUF file or its folder."""

from collections.abc import Mapping
from pathlib import Path

from .from_gguf import from_gguf
from .tokenizer import Tokenizer

__all__ = ["load_tokenizer"]


def load_tokenizer(source: Path | Mapping[str, object]) -> Tokenizer:
    """From a folder that holds tokenizer.json, or from the metadata of a GGUF file."""
    if isinstance(source, Path):
        from .from_folder import from_folder  # JSON and patterns: a GGUF file needs none of it

        return from_folder(source)
    return from_gguf(source)
