"""The tokenizer of a model, from its GGUF file or its folder."""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path

from .from_gguf import from_gguf
from .tokenizer import Tokenizer

__all__ = ["load_tokenizer"]


def load_tokenizer(source: Path | Mapping[str, object]) -> Tokenizer:
    """From a folder that holds tokenizer.json, or from the metadata of a GGUF file."""
    with _no_collections():
        if isinstance(source, Path):
            from .from_folder import from_folder  # JSON and patterns: a GGUF file needs none of it

            return from_folder(source)
        return from_gguf(source)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python's cycle collector from running. A vocabulary makes some hundred thousand tuples
    and no cycles; looking through them again and again would take a fifth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
