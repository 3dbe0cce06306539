"""What a `tokenizer.json` may declare, checked before the `tokenizers` library builds anything.

The library trusts such a file. It builds millions of tokens before it counts them, runs any regular
expression, multiplies a text as the file's normalizers say, and panics (with a message on standard
error) if parts of the file do not match. So each part is checked here first: its type, its fields,
its bounds, and the tokens that it names. A file that passes loads in bounded memory. Encoding a
text then takes time and memory in proportion to its length.

Fields without an effect here are not read. Reference: the Rust sources of `tokenizers` 0.23.
"""

import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from ..errors import FormatError, UnsupportedError
from ..files import parse_json, read_bytes
from .regex_bounds import check_regex
from .vocabulary import (
    MAX_FIXED_TOKENS,
    MAX_MERGES,
    MAX_TOKEN_CHARS,
    MAX_TOKENS,
    MAX_VOCABULARY_CHARS,
    check_fixed_tokens,
)

__all__ = [
    "TOKEN_FLAGS",
    "check_added_tokens_decoder",
    "check_tokenizer_json",
    "read_tokenizer_json",
]

# commas and brackets of the whole file: a merge may be a list of two
MAX_JSON_VALUES = 3 * MAX_MERGES + 2 * MAX_TOKENS
MAX_FILE_BYTES = 1 << 27
MAX_STEPS = 64  # of one pipeline
MAX_GROWTH = 128  # how many times longer normalizers may make a text, in bytes
MAX_CUT_GROWTH = 16  # how many times longer its pieces may get while it is cut
MAX_ADDED_BYTES = 4096  # that normalizers may put before or after it
MAX_TEMPLATE = 64  # pieces of a post-processor's template, and ids of one of its tokens

_MENDED = {r"\s+$": r"(?<!\s)\s+$"}  # DeepSeek's

Json = Mapping[str, Any]
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer_json(folder: Path) -> tuple[str, Json]:
    """The folder's tokenizer.json as the library may read it, and as the object that it is. Raises
    FormatError or UnsupportedError.
    """
    file = folder / "tokenizer.json"
    source = read_bytes(file, MAX_FILE_BYTES, within=folder)
    data = parse_json(source, str(file), max_values=MAX_JSON_VALUES)
    mended = _mend(data)
    check_tokenizer_json(data, str(file))
    return json.dumps(data) if mended else source.decode(), data


def _mend(data: Json) -> bool:
    """Replace published patterns that take quadratic time by patterns that match the same in linear
    time. True if there was one.
    """
    found = False
    try:
        for step, _ in _steps(data.get("pre_tokenizer"), "pretokenizers", ""):
            pattern = step.get("pattern")
            if isinstance(pattern, dict) and pattern.get("Regex") in _MENDED:
                pattern["Regex"] = _MENDED[pattern["Regex"]]
                found = True
    except FormatError:
        pass  # `check_tokenizer_json` reports this error
    return found


def check_tokenizer_json(data: Json, where: str) -> None:
    """Raise FormatError or UnsupportedError where `data`, the object in a tokenizer.json, is not a
    tokenizer that can be used. `where` opens every message.
    """
    vocabulary = _check_model(_object(data.get("model"), f"{where}: model"), f"{where}: model")
    tokens = _check_added_tokens(data.get("added_tokens"), f"{where}: added_tokens")
    _check_normalizers(data.get("normalizer"), f"{where}: normalizer")
    _check_pre_tokenizers(data.get("pre_tokenizer"), f"{where}: pre_tokenizer")
    ids = vocabulary.keys() | set(tokens.values())
    _check_steps(
        data.get("post_processor"),
        "processors",
        {
            "ByteLevel": _nothing,
            "TemplateProcessing": lambda step, at: _check_template(step, at, ids),
            "BertProcessing": lambda step, at: _check_pair(step, at, ids),
            "RobertaProcessing": lambda step, at: _check_pair(step, at, ids),
        },
        f"{where}: post_processor",
    )


# ---- the model and its tokens


def _check_model(model: Json, where: str) -> dict[int, str]:
    """Check the vocabulary and its merges. Returns the tokens by id."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "BPE":
        return _check_bpe(model, where)
    if kind == "Unigram":
        return _check_unigram(model, where)
    raise UnsupportedError(f"{where} is of type {_show(kind)}; known are BPE and Unigram")


def _check_bpe(model: Json, where: str) -> dict[int, str]:
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab:
        raise FormatError(f"{where}.vocab must be an object that maps each token to its id")
    _check_count(len(vocab), MAX_TOKENS, f"{where}.vocab")
    _check_texts(vocab, f"{where}.vocab")
    by_id = {_id(value, f"{where}.vocab"): text for text, value in vocab.items()}
    if len(by_id) < len(vocab):
        raise FormatError(f"{where}.vocab gives one id to two tokens")

    # the merges: two tokens each, whose joined text is a token
    if not isinstance(merges, list):
        raise FormatError(f"{where}.merges must be a list")
    _check_count(len(merges), MAX_MERGES, f"{where}.merges")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        # written out, because there are 50,000 merges and more
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], str)
            and pair[0] in vocab
            and pair[1] in vocab
            and pair[0] + pair[1] in vocab
        ):
            raise FormatError(
                f"{where}.merges holds {_show(merge)}, which is not two tokens of the vocabulary "
                "that make a third"
            )

    # the options
    if model.get("dropout"):
        raise UnsupportedError(
            f"{where}.dropout is {_show(model['dropout'])}; a tokenizer that leaves out merges at "
            "random gives other tokens each time"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedError(f"{where}.{name} is {_show(model[name])}; it is not supported")
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
        raise FormatError(f"{where}.unk_token is {_show(unknown)}, which is not in the vocabulary")
    _check_flags(model, ("fuse_unk", "byte_fallback", "ignore_merges"), where)
    return by_id


def _check_unigram(model: Json, where: str) -> dict[int, str]:
    vocab, unknown = model.get("vocab"), model.get("unk_id")
    if not isinstance(vocab, list) or not vocab:
        raise FormatError(f"{where}.vocab must be a list of tokens, each with its score")
    _check_count(len(vocab), MAX_TOKENS, f"{where}.vocab")
    # tokens and scores
    for entry in vocab:
        if (
            not isinstance(entry, list)
            or len(entry) != 2
            or not isinstance(entry[0], str)
            or not entry[0]
            or not _is_number(entry[1])
        ):
            raise FormatError(
                f"{where}.vocab holds {_show(entry)}, which is not a token and a finite score"
            )
    texts = [entry[0] for entry in vocab]
    _check_texts(texts, f"{where}.vocab")
    # the token for unknown text, and the options
    if unknown is not None and _id(unknown, f"{where}.unk_id") >= len(vocab):
        raise FormatError(f"{where}.unk_id is {unknown}; there are {len(vocab)} tokens")
    _check_flags(model, ("byte_fallback",), where)
    return dict(enumerate(texts))


def _check_added_tokens(listed: object, where: str) -> dict[str, int]:
    """Check the tokens that are found in text as a whole. Returns their ids by text."""
    if listed is None:
        return {}
    if not isinstance(listed, list):
        raise FormatError(f"{where} must be a list")
    tokens: dict[str, int] = {}
    for i, token in enumerate(listed):
        at = f"{where}[{i}]"
        text = _object(token, at).get("content")
        if not isinstance(text, str):
            raise FormatError(f"{at}.content is {_show(text)}; it must be a string")
        _check_flags(token, TOKEN_FLAGS, at)
        tokens[text] = _id(token.get("id"), f"{at}.id")
    _check_texts(tokens, where)
    check_fixed_tokens(list(tokens), where)
    return tokens


def check_added_tokens_decoder(listed: object, where: str) -> list[tuple[int, Json]]:
    """The tokens of tokenizer_config.json's `added_tokens_decoder`, checked, by rising id."""
    _check_count(len(_object(listed, where)), MAX_FIXED_TOKENS, where)
    found: list[tuple[int, Json]] = []
    for number, token in _object(listed, where).items():
        if not number.isdecimal() or len(number) > 9:
            raise FormatError(f"{where} has the key {number[:40]!r}; it must be a token id")
        found.append((int(number), token))
    found.sort(key=lambda pair: pair[0])
    tokens = [{**_object(token, f"{where}[{i}]"), "id": i} for i, token in found]
    _check_added_tokens(tokens, where)
    return found


def _check_texts(texts: Mapping[str, object] | list[str], where: str) -> None:
    longest = max(map(len, texts), default=0)
    if longest > MAX_TOKEN_CHARS:
        raise FormatError(
            f"{where} has a token of {longest} characters; it must have at most {MAX_TOKEN_CHARS}"
        )
    if (total := sum(map(len, texts))) > MAX_VOCABULARY_CHARS:
        raise FormatError(
            f"the tokens of {where} have {total} characters; they must have at most "
            f"{MAX_VOCABULARY_CHARS}"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise FormatError(f"a token of {where} is not Unicode text") from None


# ---- what is done to a text before it is cut


def _check_normalizers(declared: object, where: str) -> None:
    """Check each step, and check that all steps together cannot make a text much longer. `n` bytes
    become at most `growth`·n + `added`.
    """
    growth, added = 1.0, 0.0
    for step, at in _steps(declared, "normalizers", where):
        kind = _kind(step, _NORMALIZERS, at)
        factor, more = _NORMALIZERS[kind](step, at)
        growth, added = growth * factor, added * factor + more
        if growth > MAX_GROWTH or added > MAX_ADDED_BYTES:
            raise UnsupportedError(
                f"{where} may make a text {growth:.0f} times as long and {added:.0f} bytes more; "
                f"it may be {MAX_GROWTH} times and {MAX_ADDED_BYTES} bytes"
            )


def _replacement(step: Json, where: str) -> tuple[float, float]:
    content = step.get("content")
    if not isinstance(content, str):
        raise FormatError(f"{where}.content is {_show(content)}; it must be a string")
    size = len(content.encode(errors="replace"))
    text, is_regex = _pattern(step.get("pattern"), f"{where}.pattern")
    if is_regex:  # it may match the empty text between any two characters
        return 1.0 + size, size
    return max(1.0, size / len(text.encode(errors="replace"))), 0


def _prepended(step: Json, where: str) -> tuple[float, float]:
    text = step.get("prepend")
    if not isinstance(text, str):
        raise FormatError(f"{where}.prepend is {_show(text)}; it must be a string")
    return 1, len(text.encode(errors="replace"))


def _grows(factor: float, *flags: str) -> Callable[[Json, str], tuple[float, float]]:
    """The check of a normalizer that makes a text at most `factor` times longer."""

    def check(step: Json, where: str) -> tuple[float, float]:
        _check_flags(step, flags, where)
        return factor, 0

    return check


# By the longest growth in UTF-8 that Unicode tells for each form (UAX #15).
_NORMALIZERS: dict[str, Callable[[Json, str], tuple[float, float]]] = {
    "NFC": _grows(3),
    "NFD": _grows(3),
    "NFKC": _grows(11),
    "NFKD": _grows(11),
    "Nmt": _grows(1),
    "Lowercase": _grows(1.5),
    "StripAccents": _grows(1),
    "Strip": _grows(1, "strip_left", "strip_right"),
    "ByteLevel": _grows(2),
    "BertNormalizer": _grows(3 * 5 / 3, "clean_text", "handle_chinese_chars", "lowercase"),
    "Replace": _replacement,
    "Prepend": _prepended,
}


# ---- how it is cut


def _check_pre_tokenizers(declared: object, where: str) -> None:
    """Check each step, and check that all steps together cannot make the pieces much longer than
    the text.
    """
    growth = 1.0
    for step, at in _steps(declared, "pretokenizers", where):
        kind = _kind(step, _PRE_TOKENIZERS, at)
        _PRE_TOKENIZERS[kind](step, at)
        growth *= _cut_growth(kind, step)
        if growth > MAX_CUT_GROWTH:
            raise UnsupportedError(
                f"{where} may make a text {growth:.0f} times as long; it may be {MAX_CUT_GROWTH} "
                "times"
            )


def _cut_growth(kind: str, step: Json) -> float:
    """How many times longer a step may make all pieces together, in bytes."""
    if kind == "ByteLevel":  # a letter of two bytes for a byte, and a space before each piece
        return 4 if step.get("add_prefix_space", True) else 2
    if kind == "Metaspace":  # for a space, and before each piece
        size = len(step.get("replacement", "▁").encode(errors="replace"))
        return 1.0 * size if step.get("prepend_scheme") == "never" else 1.0 + size
    return 1


def _check_split(step: Json, where: str) -> None:
    _pattern(step.get("pattern"), f"{where}.pattern")
    behaviors = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
    if step.get("behavior") not in behaviors:
        raise FormatError(
            f"{where}.behavior is {_show(step.get('behavior'))}; known are {', '.join(behaviors)}"
        )
    _check_flags(step, ("invert",), where)


def _pattern(pattern: object, where: str) -> tuple[str, bool]:
    """(text, whether it is a regular expression) of {"String": text} or {"Regex": text}."""
    if isinstance(pattern, dict) and len(pattern) == 1:
        ((kind, text),) = pattern.items()
        if isinstance(text, str) and text and kind in ("String", "Regex"):
            if kind == "Regex":
                check_regex(text, where)
            return text, kind == "Regex"
    raise FormatError(f"{where} is {_show(pattern)}; it must be a String or a Regex, not empty")


def _character(name: str) -> Callable[[Json, str], None]:
    """The check of a step whose field `name` is one character."""

    def check(step: Json, where: str) -> None:
        value = step.get(name, "▁")
        if not isinstance(value, str) or len(value) != 1:
            raise FormatError(f"{where}.{name} is {_show(value)}; it must be one character")

    return check


def _nothing(step: Json, where: str) -> None:
    """A step whose fields need no check here: the library reports what is wrong with them."""


_PRE_TOKENIZERS: dict[str, Callable[[Json, str], None]] = {
    "ByteLevel": _nothing,
    "Split": _check_split,
    "Metaspace": _character("replacement"),
    "Digits": _nothing,
    "Punctuation": _nothing,
    "Whitespace": _nothing,
    "WhitespaceSplit": _nothing,
    "UnicodeScripts": _nothing,
    "BertPreTokenizer": _nothing,
    "CharDelimiterSplit": _character("delimiter"),
}


# ---- what is put around its tokens


def _check_template(step: Json, where: str, ids: Set[int]) -> None:
    """Check that each special token of a template is defined, with ids that exist."""
    # the special tokens: as many texts as ids, and ids that exist
    special = _object(step.get("special_tokens", {}), f"{where}.special_tokens")
    _check_count(len(special), MAX_FIXED_TOKENS, f"{where}.special_tokens")
    for name, token in special.items():
        at = f"{where}.special_tokens[{name[:40]!r}]"
        numbers, texts = (_object(token, at).get(key) for key in ("ids", "tokens"))
        if (
            not isinstance(numbers, list)
            or not isinstance(texts, list)
            or len(numbers) != len(texts)
            or not len(numbers) <= MAX_TEMPLATE
        ):
            raise FormatError(f"{at} must have as many ids as tokens, at most {MAX_TEMPLATE}")
        for number in numbers:
            if _id(number, f"{at}.ids") not in ids:
                raise FormatError(f"{at}.ids holds {number}, and no token has this id")
    # the pieces, which name these tokens
    for key in ("single", "pair"):
        pieces = step.get(key)
        if not isinstance(pieces, list) or len(pieces) > MAX_TEMPLATE:
            raise FormatError(f"{where}.{key} must be a list of at most {MAX_TEMPLATE} pieces")
        for piece in pieces:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if isinstance(token, dict) and token.get("id") not in special:
                raise FormatError(
                    f"{where}.{key} names the token {_show(token.get('id'))}, which is not in its "
                    "special_tokens"
                )


def _check_pair(step: Json, where: str, ids: Set[int]) -> None:
    for name in ("sep", "cls"):
        value = step.get(name)
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
            raise FormatError(f"{where}.{name} is {_show(value)}; it must be a token and its id")
        if _id(value[1], f"{where}.{name}") not in ids:
            raise FormatError(f"{where}.{name} has the id {value[1]}, and no token has this id")


# ---- pipelines and fields


def _check_steps(
    declared: object, inner: str, known: Mapping[str, Callable[[Json, str], None]], where: str
) -> None:
    for step, at in _steps(declared, inner, where):
        known[_kind(step, known, at)](step, at)


def _steps(declared: object, inner: str, where: str) -> Iterator[tuple[Json, str]]:
    """The steps of a pipeline, each with its place in the file. A pipeline is null, one step, or a
    Sequence with a list of pipelines in the field `inner`.
    """
    pending: list[tuple[object, str]] = [] if declared is None else [(declared, where)]
    count = 0
    while pending:
        step, at = pending.pop()
        count += 1
        if count > MAX_STEPS:
            raise FormatError(f"{where} has more than {MAX_STEPS} steps")
        if not isinstance(step, dict) or step.get("type") != "Sequence":
            yield _object(step, at), at
            continue
        within = step.get(inner)
        if not isinstance(within, list):
            raise FormatError(f"{at}.{inner} must be a list")
        pending += [(part, f"{at}.{inner}[{i}]") for i, part in enumerate(within)][::-1]


def _kind(step: Json, known: Mapping[str, object], where: str) -> str:
    kind = step.get("type")
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(f"{where} is of type {_show(kind)}; known are {', '.join(known)}")
    return kind


def _object(value: object, where: str) -> Json:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {_show(value)}; it must be an object")
    return value


def _id(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_TOKENS:
        raise FormatError(
            f"{where} has the id {_show(value)}; ids are integers from 0 to {MAX_TOKENS - 1}"
        )
    return value


def _check_count(count: int, limit: int, where: str) -> None:
    if count > limit:
        raise FormatError(f"{where} has {count} entries; it must have at most {limit}")


def _check_flags(step: Json, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not isinstance(step.get(name, False), bool):
            raise FormatError(f"{where}.{name} is {_show(step[name])}; it must be true or false")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: object) -> str:
    return reprlib.repr(value)
