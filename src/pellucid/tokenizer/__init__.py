"""Text to token ids and back: tokenizers, chat templates, the streaming detokenizer."""

from .detokenizer import Detokenizer
from .load import load_tokenizer
from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer"]
