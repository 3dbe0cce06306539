"""A tokenizer whose tokens are numbers, for a model of which only the shape is known. Its text has
no meaning; making it takes as long as with other tokens of a few letters.
"""

from .tokenizer import Tokenizer
from .vocabulary import TokenKind, Vocabulary

__all__ = ["numbered_tokenizer"]


def numbered_tokenizer(vocab_size: int) -> Tokenizer:
    """Token i is the number i in hexadecimal; nothing ends a text."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models

    texts = [f"{i:x}" for i in range(vocab_size)]
    ids = {text: i for i, text in enumerate(texts)}
    return Tokenizer(
        Vocabulary(texts, bytes([TokenKind.NORMAL]) * vocab_size, byte_level=True),
        RustTokenizer(models.BPE(vocab=ids, merges=[])),
        bos_token_id=None,
        eos_token_ids=frozenset(),
    )
