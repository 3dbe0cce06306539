"""A tokenizer from the metadata of a GGUF file (`tokenizer.*`).

There are two kinds of vocabulary. Byte-level BPE ("gpt2") has its merges in the file and cuts text
into words first (`pretokenizers.py`). SentencePiece ("llama": Llama 2, Mistral, Gemma) has scores,
and its merges are derived from them (`sentencepiece.py`). Both become a BPE model of the
`tokenizers` library.

Token ids are those of llama.cpp, with two exceptions. No merge makes a control token, so plain text
never becomes one. Text is composed first (NFC) for the families that were trained so. Defaults for
absent keys are llama.cpp's too.

The file is untrusted: types, lengths, ids and merges are checked before anything is built.
Reference: docs/gguf.md in ggml; src/llama-vocab.cpp in llama.cpp.
"""

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FormatError, UnsupportedError
from .chat_template import ChatTemplate
from .pretokenizers import build_pretokenizer, get_pretokenizer
from .sentencepiece import derive_merges
from .tokenizer import Tokenizer, library_errors
from .vocabulary import MAX_MERGES, MAX_TOKENS, TokenKind, Vocabulary, check_fixed_tokens

if TYPE_CHECKING:
    import tokenizers

__all__ = ["from_gguf"]


def from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that `metadata` describes (key -> int, float, bool, str, or a list of one
    type).

    Raises FormatError if the metadata contradicts itself, UnsupportedError if it asks for a kind of
    tokenizer that is not supported.
    """
    model = _string(metadata, "model", None)
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"tokenizer.ggml.model is {model[:80]!r}; known are 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece)"
        )
    # the encoder, by the kind of vocabulary
    vocabulary = _read_vocabulary(metadata, byte_level=model == "gpt2")
    if model == "gpt2":
        pre = get_pretokenizer(_string(metadata, "pre", "default"))
        rust, add_bos, space_prefix = _byte_level(metadata, vocabulary), pre.add_bos, False
    else:
        space_prefix = _flag(metadata, "add_space_prefix", True)
        rust, add_bos = _sentencepiece(metadata, vocabulary, space_prefix), True
    _add_fixed_tokens(rust, vocabulary, swallow_space=_is_phi3(metadata, model))

    # special tokens: those around a text, those that end an answer, their names
    bos, eos = (_token_id(metadata, vocabulary, name, model) for name in ("bos", "eos"))
    ends = [eos, *(_token_id(metadata, vocabulary, name, model) for name in ("eot", "eom"))]
    prefix = (bos,) if bos is not None and _flag(metadata, "add_bos_token", add_bos) else ()
    suffix = (eos,) if eos is not None and _flag(metadata, "add_eos_token", False) else ()
    names = {
        name: vocabulary.tokens[i]
        for name, i in (("bos_token", bos), ("eos_token", eos))
        if i is not None
    }
    return Tokenizer(
        vocabulary,
        rust,
        bos_token_id=bos,
        eos_token_ids=frozenset(i for i in ends if i is not None) | vocabulary.ends_by_name(),
        prefix_ids=prefix,
        suffix_ids=suffix,
        strips_leading_space=space_prefix,
        chat_template=_read_chat_template(metadata, names) or ChatTemplate({}, names),
    )


# ---- reading


def _read_vocabulary(metadata: Mapping[str, object], *, byte_level: bool) -> Vocabulary:
    # distinct texts
    tokens: list[str] = list(_list(metadata, "tokens", str))
    for i, text in enumerate(tokens):
        if not text:
            tokens[i] = f"[EMPTY_{i}]"  # so that all texts are distinct
    if len(set(tokens)) != len(tokens):
        twice = next(text for text, count in Counter(tokens).items() if count > 1)
        raise FormatError(f"tokenizer.ggml.tokens holds {twice[:80]!r} twice; tokens must differ")
    # a kind for each
    kinds = (
        _list(metadata, "token_type", int)
        if _key("token_type") in metadata
        else [TokenKind.NORMAL] * len(tokens)
    )
    if len(kinds) != len(tokens):
        raise FormatError(
            f"tokenizer.ggml.token_type has {len(kinds)} entries; there are {len(tokens)} tokens"
        )
    if strange := set(kinds) - set(TokenKind):
        raise FormatError(
            f"tokenizer.ggml.token_type holds {min(strange)}; kinds are {min(TokenKind)} to "
            f"{max(TokenKind)}"
        )
    return Vocabulary(tokens, bytes(kinds), byte_level)


def _token_id(
    metadata: Mapping[str, object], vocabulary: Vocabulary, name: str, model: str
) -> int | None:
    key = _key(f"{name}_token_id")
    if key in metadata:
        value = metadata[key]
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not 0 <= value < len(vocabulary.tokens)
        ):
            raise FormatError(
                f"{key} is {_show(value)}; it must be an integer from 0 to "
                f"{len(vocabulary.tokens) - 1}"
            )
        return value
    default = {"unknown": 0, "bos": 1, "eos": 2}.get(name) if model == "llama" else None
    if default is None or default >= len(vocabulary.tokens):
        return None
    return default if vocabulary.kinds[default] in (TokenKind.CONTROL, TokenKind.UNKNOWN) else None


def _read_chat_template(
    metadata: Mapping[str, object], names: Mapping[str, str]
) -> ChatTemplate | None:
    key = "tokenizer.chat_template"
    templates: dict[str, str] = {}
    for field, text in metadata.items():
        if field == key or field.startswith(f"{key}."):
            if not isinstance(text, str):
                raise FormatError(f"{field} is {_show(text)}; it must be a string")
            templates[field.removeprefix(key).removeprefix(".") or "default"] = text
    return ChatTemplate(templates, names) if templates else None


# ---- building


def _byte_level(metadata: Mapping[str, object], vocabulary: Vocabulary) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models, normalizers

    pre = get_pretokenizer(_string(metadata, "pre", "default"))
    ids = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
    merges = _read_merges(metadata, vocabulary)
    with library_errors(FormatError, "tokenizer.ggml.merges does not fit tokenizer.ggml.tokens"):
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges)
    rust = RustTokenizer(model)
    if pre.nfc:
        rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = build_pretokenizer(pre)
    return rust


def _read_merges(metadata: Mapping[str, object], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges in order, without those that would make a control token."""
    merges: list[str] = _list(metadata, "merges", str, limit=MAX_MERGES)
    reserved = {
        vocabulary.tokens[i] for i in vocabulary.ids_of(TokenKind.CONTROL, TokenKind.UNKNOWN)
    }
    forbidden = {f"{text[:cut]} {text[cut:]}" for text in reserved for cut in range(1, len(text))}
    if not forbidden.isdisjoint(merges):
        merges = [merge for merge in merges if merge not in forbidden]
    cuts = [merge.find(" ") for merge in merges]
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]
    if min(cuts, default=1) < 1 or not all(right for _, right in pairs):
        raise FormatError(
            "tokenizer.ggml.merges holds an entry that is not two tokens with a space between them"
        )
    return pairs


def _sentencepiece(
    metadata: Mapping[str, object], vocabulary: Vocabulary, space_prefix: bool
) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models, normalizers

    # merges from scores
    scores = np.array(_list(metadata, "scores", float, int), np.float64)
    if len(scores) != len(vocabulary.tokens) or not np.isfinite(scores).all():
        raise FormatError(
            f"tokenizer.ggml.scores has {len(scores)} entries; it must have a finite number for "
            "each token"
        )
    pieces = vocabulary.ids_of(
        TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED, TokenKind.UNDEFINED
    )
    merges = derive_merges([vocabulary.tokens[i] for i in pieces], scores[pieces])
    # the token for unknown text, which byte tokens make unnecessary
    ids = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
    unknown = _token_id(metadata, vocabulary, "unknown", "llama")
    if unknown is None and not all(f"<0x{byte:02X}>" in ids for byte in range(256)):
        raise FormatError(
            "tokenizer.ggml.tokens has neither a token for each byte nor one for what is unknown; "
            "some text has no tokens"
        )
    # the encoder
    unk = None if unknown is None else vocabulary.tokens[unknown]
    with library_errors(FormatError, "tokenizer.ggml.tokens is not a vocabulary"):
        rust = RustTokenizer(
            models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
        )
    steps = [normalizers.Prepend(" ")] if space_prefix else []
    rust.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    return rust


def _is_phi3(metadata: Mapping[str, object], model: str) -> bool:
    """Whether special tokens also match the white space after them. A GGUF file does not say so;
    llama.cpp recognizes Phi-3 by its name.
    """
    name = str(metadata.get("general.name", "")).lower()
    return (
        "phi-3" in name
        or "phi3" in name
        or (model == "llama" and metadata.get("general.architecture") == "phi3")
    )


def _add_fixed_tokens(
    rust: "tokenizers.Tokenizer", vocabulary: Vocabulary, *, swallow_space: bool
) -> None:
    """Make the library find tokens with a fixed text. `swallow_space`: with the white space after
    them.
    """
    from tokenizers import AddedToken

    special = (TokenKind.CONTROL, TokenKind.UNKNOWN)
    fixed = [
        (vocabulary.tokens[i], vocabulary.kinds[i] in special)
        for i in vocabulary.ids_of(*special, TokenKind.USER_DEFINED)
    ]
    check_fixed_tokens([text for text, _ in fixed], "tokenizer.ggml.token_type")
    rust.add_tokens(
        [
            AddedToken(
                text,
                normalized=False,
                special=is_special,
                rstrip=swallow_space and text not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for text, is_special in fixed
        ]
    )


# ---- typed access


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _show(value: object) -> str:
    return reprlib.repr(value)


def _string(metadata: Mapping[str, object], name: str, default: str | None) -> str:
    value = metadata.get(_key(name), default)
    if not isinstance(value, str):
        raise FormatError(f"{_key(name)} is {_show(value)}; it must be a string")
    return value


def _flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(_key(name), default)
    if not isinstance(value, bool):
        raise FormatError(f"{_key(name)} is {_show(value)}; it must be true or false")
    return value


def _list(
    metadata: Mapping[str, object], name: str, *types: type, limit: int = MAX_TOKENS
) -> list[Any]:
    value = metadata.get(_key(name))
    if not isinstance(value, list) or not set(map(type, value)) <= set(types):
        raise FormatError(
            f"{_key(name)} must be a list of {' or '.join(kind.__name__ for kind in types)}"
        )
    if len(value) > limit:
        raise FormatError(f"{_key(name)} has {len(value)} entries; it must have at most {limit}")
    return value
