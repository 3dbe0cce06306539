"""Text to token ids and back: tokenizers, chat templates, the streaming detokenizer.

A name is imported when it is first used (PEP 562): chat templates need neither NumPy nor the
`tokenizers` library, and their process is started before these are loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detokenizer import Detokenizer
    from .load import load_tokenizer
    from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer"]

_HOME = {"Detokenizer": ".detokenizer", "Tokenizer": ".tokenizer", "load_tokenizer": ".load"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pellucid.tokenizer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
