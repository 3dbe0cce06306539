"""Small vocabularies as GGUF metadata, and the two ways to encode in their plainest form: slow, and
with nothing to get wrong.
"""

import itertools
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
LETTERS = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(0x100 + i)
    for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}
MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ w",
    "o r",
    "Ġw or",
    "l d",
    "Ġwor ld",
    "Ġ Ġ",
    "ĠĠ ĠĠ",
    "i n",
    "' s",
    "e r",
    "c l",
    "Ã ©",
    "ð Ł",
    "ðŁ ĺ",
    "ðŁĺ Ģ",
    "1 2",
    "a b",
    "ab ab",
]
CONTROLS = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def byte_level(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE vocabulary: 256 bytes, the merges above, three control tokens, one of fixed
    text and one unused.
    """
    tokens = [LETTERS[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in MERGES]
    kinds = [NORMAL] * len(tokens) + [CONTROL] * len(CONTROLS) + [USER_DEFINED, UNUSED]
    tokens += [*CONTROLS, "<tool>", "[PAD]"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }
    return changed(metadata, changes)


PIECES = [
    "▁",
    "a",
    "b",
    "c",
    "e",
    "h",
    "l",
    "o",
    "é",
    "ab",
    "bc",
    "abc",
    "▁a",
    "▁ab",
    "ll",
    "lo",
    "he",
    "hell",
    "hello",
    "▁hello",
    "▁▁",
    "▁▁▁",
]


def sentencepiece(
    pieces: list[str] | None = None, piece_scores: list[float] | None = None, **changes: Any
) -> dict[str, Any]:
    """A SentencePiece vocabulary: unknown, two control tokens, 256 bytes, pieces by falling score,
    one token of fixed text.
    """
    pieces = PIECES if pieces is None else pieces
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "\n\n"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            UNKNOWN,
            CONTROL,
            CONTROL,
            *[BYTE] * 256,
            *[NORMAL] * len(pieces),
            USER_DEFINED,
        ],
        "tokenizer.ggml.scores": [0.0] * 259
        + (piece_scores if piece_scores is not None else [-float(i) for i in range(len(pieces))])
        + [-1000.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return changed(metadata, changes)


def changed(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With values replaced, or left out where the new one is None."""
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def merge_word(word: str, merges: list[str], tokens: list[str]) -> list[int]:
    """BPE by its definition: of all neighbours that can merge, those of the lowest rank do, the
    leftmost first, until none can.
    """
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    parts = list(word)
    while pairs := [
        (ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks
    ]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [tokens.index(part) for part in parts]


def join_pieces(text: str, tokens: list[str], scores: list[float], kinds: list[int]) -> list[int]:
    """SentencePiece by its definition: the neighbours whose text is the token of the highest score
    become one, the leftmost first.
    """
    score = {
        token: scores[i] for i, token in enumerate(tokens) if kinds[i] in (NORMAL, USER_DEFINED)
    }
    parts = list(text)
    while pairs := [
        (score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score
    ]:
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        ids += (
            [tokens.index(part)]
            if part in score
            else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
        )
    return ids
