"""The tokens of one vocabulary: their texts in the file, their kinds, and the bytes that they stand
for.

A token is a sequence of bytes, and files write bytes as text in two ways. Byte-level BPE (GPT-2)
gives each of the 256 bytes its own printable letter. SentencePiece writes a space as "▁", and bytes
that no other token covers as "<0x0A>". Only this module converts between bytes and text.

Kinds and their numbers are GGUF's. This module has no merges and does not encode.
"""

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from ..errors import FormatError, RequestError

__all__ = [
    "MAX_FIXED_TOKENS",
    "MAX_MERGES",
    "MAX_TOKENS",
    "TokenKind",
    "Vocabulary",
    "byte_letters",
    "check_fixed_tokens",
]

MAX_TOKENS = 1 << 20  # four times the largest vocabulary there is
MAX_MERGES = 1 << 20  # twice the longest list
MAX_TOKEN_CHARS = 1024  # of one token
MAX_VOCABULARY_CHARS = 1 << 23  # of all tokens together: four times the largest
MAX_FIXED_TOKENS = 1 << 16  # found in text as a whole: ten times the most known
MAX_FIXED_CHARS = 1 << 21  # of all these tokens together

# Names of tokens that end an answer, because files often name only one of several. The lists are
# llama.cpp's. The second has the tokens with which a code model begins the next file.
_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] "
    "[EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> "
    "[e~["
)
_NEXT_FILE = (
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> "
    "<reponame> <|file_sep|>"
)

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenKind(enum.IntEnum):
    """What a token is for."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2  # stands for text that has no token
    CONTROL = 3  # steers the model; never made from text unless the text is trusted
    USER_DEFINED = 4  # found in text before anything else
    UNUSED = 5  # only a row of the embedding: no bytes
    BYTE = 6  # "<0x0A>"


def _byte_alphabet() -> str:
    """256 letters, one per byte (GPT-2): printable Latin-1 characters stand for themselves, the
    other bytes for the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(
        chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)
    )


_LETTERS = _byte_alphabet()
_LETTER_TO_LATIN1 = MappingProxyType({ord(letter): byte for byte, letter in enumerate(_LETTERS)})


def byte_letters(data: bytes) -> str:
    """Bytes as byte-level BPE writes them: "Ġthe" for b" the"."""
    return "".join(_LETTERS[byte] for byte in data)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Texts and kinds by token id."""

    tokens: Sequence[str]
    kinds: bytes  # a TokenKind per token
    byte_level: bool  # else SentencePiece
    # of the tokens that were asked for
    _bytes: dict[int, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.tokens) <= MAX_TOKENS or len(self.kinds) != len(self.tokens):
            raise FormatError(
                f"the vocabulary has {len(self.tokens)} tokens; it must have 1 to {MAX_TOKENS}, "
                "and a kind for each"
            )
        longest = max(self.tokens, key=len)
        if len(longest) > MAX_TOKEN_CHARS:
            raise FormatError(
                f"a token of the vocabulary has {len(longest)} characters; it must have at most "
                f"{MAX_TOKEN_CHARS}"
            )
        if (total := sum(map(len, self.tokens))) > MAX_VOCABULARY_CHARS:
            raise FormatError(
                f"the tokens of the vocabulary have {total} characters; they must have at most "
                f"{MAX_VOCABULARY_CHARS}"
            )
        try:
            "".join(self.tokens).encode()
        except UnicodeEncodeError:
            raise FormatError("a token of the vocabulary is not Unicode text") from None

    def ids_of(self, *kinds: TokenKind) -> list[int]:
        """The ids of tokens of these kinds, rising."""
        found: list[int] = np.flatnonzero(
            np.isin(np.frombuffer(self.kinds, np.uint8), kinds)
        ).tolist()
        return found

    def ends_by_name(self) -> frozenset[int]:
        """The control tokens that end an answer, recognized by their names."""
        control = {self.tokens[i]: i for i in self.ids_of(TokenKind.CONTROL)}
        names = control.keys() & {*_ENDS.split(), *_NEXT_FILE.split()}
        if {"<|return|>", "<|call|>"} <= names or {"<|flush|>", "<|calls|>"} <= names:
            names -= {"<|end|>"}  # in this vocabulary it ends a part of the answer
        return frozenset(control[name] for name in names)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; those of its name for a control token. Empty for an
        unused token and beyond the vocabulary, where models pad their embeddings.
        """
        found = self._bytes.get(token_id)
        if found is None:
            if token_id < 0:
                raise RequestError(f"a token id is {token_id}; it must be at least 0")
            if token_id >= len(self.tokens):
                return b""
            found = self._bytes[token_id] = self._to_bytes(token_id)
        return found

    def _to_bytes(self, token_id: int) -> bytes:
        text, kind = self.tokens[token_id], self.kinds[token_id]
        if kind == TokenKind.UNUSED:
            return b""
        if kind == TokenKind.BYTE and (match := _BYTE.fullmatch(text)):
            return bytes.fromhex(match[1])
        if not self.byte_level:
            return text.replace(_SPACE, " ").encode()
        if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN):
            return text.encode()
        try:
            return text.translate(_LETTER_TO_LATIN1).encode("latin-1")
        # letters outside the alphabet: a token that was added with its plain text
        except UnicodeEncodeError:
            return text.encode()


def check_fixed_tokens(texts: list[str], where: str) -> None:
    """Raise FormatError for too many tokens that are found in text as a whole: the library builds
    one automaton of all of them.
    """
    if len(texts) > MAX_FIXED_TOKENS or sum(map(len, texts)) > MAX_FIXED_CHARS:
        raise FormatError(
            f"{where} has {len(texts)} tokens of fixed text with {sum(map(len, texts))} "
            f"characters; there may be {MAX_FIXED_TOKENS} with {MAX_FIXED_CHARS}"
        )
