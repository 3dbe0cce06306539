"""The tokenizer of a folder as the metadata of a GGUF file: the inverse of `from_gguf.py`.

Keys and conventions are those of llama.cpp's converter, with one difference: a SentencePiece
vocabulary whose scores a tokenizer.json does not hold gets scores in the order of its merges, so
that it merges as before.

What was written is read back and must cut a text as the folder does; a tokenizer that GGUF files
cannot describe is refused.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError, UnsupportedError
from .from_folder import from_folder
from .from_gguf import from_gguf
from .pretokenizers import PROBE, cut_probe, find_pretokenizer
from .tokenizer import Tokenizer
from .tokenizer_json import read_tokenizer_json
from .vocabulary import TokenKind

__all__ = ["gguf_tokenizer"]

_log = logging.getLogger(__name__)

MAX_SPECIAL_PROBES = 200
PROBED_TOKENS = 4000
# names of tokens that llama.cpp's converter takes for control tokens, whatever the file says
_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_LOOK_SPECIAL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def gguf_tokenizer(
    folder: Path, vocab_size: int, others: Mapping[str, object]
) -> dict[str, object]:
    """The keys `tokenizer.*` for the tokenizer in `folder`, with one token for each of the
    `vocab_size` rows of the embedding. `others` are the other keys of the file.

    Raises the errors of `from_folder`, and UnsupportedError if GGUF files cannot describe it.
    """
    data = read_tokenizer_json(folder)[1]
    tokenizer = from_folder(folder)
    byte_level = tokenizer.vocabulary.byte_level
    if data["model"].get("type") == "Unigram":
        raise UnsupportedError(
            f"{folder / 'tokenizer.json'} cuts text by a unigram model; a GGUF file holds BPE alone"
        )
    if tokenizer.text_vocab_size > vocab_size:
        raise FormatError(
            f"{folder}: the tokenizer cuts text into {tokenizer.text_vocab_size} tokens, and the "
            f"model has only {vocab_size}"
        )
    # tokens and kinds, for every row of the embedding and no other
    tokens, kinds = _tokens(tokenizer, data, vocab_size)
    values: dict[str, object] = {"tokens": tokens, "token_type": kinds}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in data["model"]["merges"]]
    if byte_level:
        name = find_pretokenizer(
            _pieces(data.get("pre_tokenizer")),
            ignore_merges=bool(data["model"].get("ignore_merges")),
            nfc="NFC" in json.dumps(data.get("normalizer")),
            where=str(folder / "tokenizer.json"),
        )
        values |= {"model": "gpt2", "pre": name, "merges": [f"{a} {b}" for a, b in merges]}
    else:
        values |= {
            "model": "llama",
            "pre": "default",
            "scores": _scores(tokens, kinds, [a + b for a, b in merges]),
            "add_space_prefix": tokenizer.strips_leading_space,
        }
    # special tokens
    values |= _special_ids(tokenizer, tokens)
    metadata = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    for name, source in tokenizer.templates.sources.items():
        suffix = "" if name == "default" else f".{name}"
        metadata[f"tokenizer.chat_template{suffix}"] = source
    _check_alike(folder, tokenizer, from_gguf({**others, **metadata}), tokens)
    return metadata


def _tokens(tokenizer: Tokenizer, data: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    """The texts and kinds of tokens. Rows of the embedding without a token get one that is not
    used; tokens without a row are left out.
    """
    vocabulary = tokenizer.vocabulary
    unknown = None if vocabulary.byte_level else data["model"].get("unk_token")
    tokens, kinds = list(vocabulary.tokens[:vocab_size]), list(vocabulary.kinds[:vocab_size])
    for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if not text:  # no token has this id
            tokens[i] = f"[PAD{i}]"
        elif text == unknown:
            kinds[i] = TokenKind.UNKNOWN
        elif kind == TokenKind.USER_DEFINED and _looks_special(text):
            kinds[i] = TokenKind.CONTROL
        elif kind == TokenKind.USER_DEFINED and not vocabulary.byte_level:
            tokens[i] = text.replace("▁", " ")
    missing = range(len(tokens), vocab_size)
    return [*tokens, *(f"[PAD{i}]" for i in missing)], [
        *map(int, kinds),
        *[int(TokenKind.UNUSED)] * len(missing),
    ]


def _looks_special(text: str) -> bool:
    return text in _LOOK_SPECIAL or any(
        text.startswith(start) and text.endswith(end) for start, end in _LOOK_SPECIAL_ENDS
    )


def _scores(tokens: list[str], kinds: list[int], merged: list[str]) -> list[float]:
    """Scores by which SentencePiece joins the same pieces in the same order: the earlier a merge
    makes a piece, the higher. `merged` are the pieces that merges make, in order.
    """
    rank = {text: float(-i) for i, text in enumerate(dict.fromkeys(merged))}
    lowest = float(-len(rank))
    normal = (TokenKind.NORMAL, TokenKind.UNUSED)
    return [
        rank.get(text, lowest) if kind in normal else 0.0
        for text, kind in zip(tokens, kinds, strict=True)
    ]


def _special_ids(tokenizer: Tokenizer, tokens: list[str]) -> dict[str, object]:
    """The ids of special tokens, and whether they are put around a text."""
    ids, named = {text: i for i, text in enumerate(tokens)}, tokenizer.templates.special_tokens
    names = {"unknown": "unk_token", "padding": "pad_token"}
    found = {name: ids.get(named.get(key, "")) for name, key in names.items()}
    eos = ids.get(named.get("eos_token", ""))
    ends = [i for i in sorted(tokenizer.eos_token_ids) if i != eos]
    if eos is None and ends:
        eos = ends.pop(0)
    found |= {"bos": tokenizer.bos_token_id, "eos": eos}
    # other ends of an answer: readers know most of them by their names
    unnamed = [i for i in ends if i not in tokenizer.vocabulary.ends_by_name()]
    found |= dict(zip(("eot", "eom"), unnamed, strict=False))
    values: dict[str, object] = {
        f"{name}_token_id": i for name, i in found.items() if i is not None and i < len(tokens)
    }
    prefix, suffix = tokenizer.around
    return {**values, "add_bos_token": bool(prefix), "add_eos_token": bool(suffix)}


def _pieces(declared: object) -> list[str]:
    """The words into which a tokenizer.json with this pre_tokenizer cuts `PROBE`."""
    from tokenizers import Tokenizer as RustTokenizer

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    rust = RustTokenizer.from_str(json.dumps({"model": empty, "pre_tokenizer": declared}))
    return [PROBE] if rust.pre_tokenizer is None else cut_probe(rust.pre_tokenizer)


def _check_alike(folder: Path, ours: Tokenizer, written: Tokenizer, tokens: list[str]) -> None:
    """Refuse a tokenizer that would encode plain text otherwise, or end answers less often. White
    space around special tokens may differ, which the log says.
    """

    def agree(text: str, *, trusted: bool) -> bool:
        return ours.encode(text, parse_special=trusted) == written.encode(
            text, parse_special=trusted
        )

    # the vocabulary's own pieces, one after another, try its merges
    ids = range(0, ours.text_vocab_size, 1 + ours.text_vocab_size // PROBED_TOKENS)
    pieces = b" ".join(map(ours.token_bytes, ids)).decode(errors="ignore")
    texts = (PROBE, pieces)
    if not all(agree(text, trusted=trusted) for text in texts for trusted in (False, True)):
        raise UnsupportedError(
            f"{folder / 'tokenizer.json'}: a GGUF file cannot describe this tokenizer; it would "
            "cut text otherwise"
        )
    lost = [i for i in ours.eos_token_ids - written.eos_token_ids if i < len(tokens)]
    if lost:
        raise UnsupportedError(
            f"{folder}: answers end with more kinds of tokens than a GGUF file can name; it would "
            f"lose {sorted(lost)}"
        )
    special = [tokens[i] for i in sorted(ours.special_token_ids) if i < len(tokens)]
    for text in special[:MAX_SPECIAL_PROBES]:
        if not agree(f"a {text} b{text}c", trusted=True):
            _log.warning(
                "%s: white space around %r is kept where the folder's tokenizer drops it",
                folder,
                text,
            )
            break
