"""Text to token ids and back: tokenizers, chat templates, the streaming detokenizer."""

from .detokenizer import Detokenizer
from .from_folder import from_folder
from .from_gguf import from_gguf
from .load import load_tokenizer
from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "from_folder", "from_gguf", "load_tokenizer"]
