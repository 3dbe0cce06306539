"""A tokenizer from a folder in Hugging Face's layout.

`tokenizer.json` holds the vocabulary and how to encode; the `tokenizers` library reads it.
`tokenizer_config.json`, `generation_config.json` and `config.json` name the special tokens. The
chat template is `chat_template.jinja`, or else in tokenizer_config.json; further templates lie in
`additional_chat_templates/`.

The file is checked (`tokenizer_json.py`), and the library then encodes as it says. Decoding is our
own, from the bytes of tokens. The file's decoder only shows whether the vocabulary writes bytes
GPT-2's way or SentencePiece's (`vocabulary.py`); any other is refused. Truncation and padding are
turned off where a file sets them. Every file is bounded in size, and no file outside the folder is
opened.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, UnsupportedError
from ..files import is_there, read_bytes, read_json
from .chat_template import MAX_TEMPLATES, ChatTemplate
from .tokenizer import Tokenizer, library_errors
from .tokenizer_json import TOKEN_FLAGS, check_added_tokens_decoder, read_tokenizer_json
from .vocabulary import MAX_TOKENS, TokenKind, Vocabulary

if TYPE_CHECKING:
    import tokenizers

__all__ = ["from_folder"]

MAX_CONFIG_BYTES = 1 << 24
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of files NAME.jinja


def from_folder(path: Path) -> Tokenizer:
    """The tokenizer of the folder `path`. Raises FormatError for missing or wrong files."""
    from tokenizers import Tokenizer as RustTokenizer

    file = path / "tokenizer.json"
    source, _ = read_tokenizer_json(path)
    with library_errors(FormatError, f"{file} is not a tokenizer"):
        rust = RustTokenizer.from_str(source)
    rust.no_truncation()
    rust.no_padding()

    # the configs may name tokens that tokenizer.json lacks
    config, generation, model = (
        _read_json(path, name)
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    added = _add_tokens(rust, config.get("added_tokens_decoder"), path / "tokenizer_config.json")
    byte_level, strips_space = _read_decoder(rust, file)
    vocabulary = _read_vocabulary(rust, byte_level, file)

    # special tokens: by name or id in the configs, around each text by the post-processor
    bos, eos = (
        _named_token(name, (config, generation, model), rust, path) for name in ("bos", "eos")
    )
    ends = _ids(generation.get("eos_token_id", model.get("eos_token_id")), path, "eos_token_id") | (
        {eos} if eos is not None else set()
    )
    if not ends:  # no file names one: it may be among the tokens that a config adds
        ends = {i for i in vocabulary.ends_by_name() if vocabulary.tokens[i] in added}
    prefix, suffix = _around(rust, file)
    # DeepSeek's tokenizer.json leaves bos to the config
    if _flag(config, "add_bos_token", path) and not prefix and bos is not None:
        prefix = (bos,)
    ids = {"bos_token": bos, "eos_token": eos}
    names = {
        name: vocabulary.tokens[i]
        for name, i in ids.items()
        if i is not None and i < len(vocabulary.tokens)
    }
    names |= {
        name: text
        for name in ("unk_token", "pad_token")
        if (text := _token_text(config, name, path)) is not None
    }
    return Tokenizer(
        vocabulary,
        rust,
        bos_token_id=bos,
        eos_token_ids=frozenset(ends),
        prefix_ids=prefix,
        suffix_ids=suffix,
        strips_leading_space=strips_space,
        chat_template=_read_chat_template(path, config, names) or ChatTemplate({}, names),
    )


# ---- tokenizer.json


def _add_tokens(rust: "tokenizers.Tokenizer", listed: object, file: Path) -> set[str]:
    """Add the tokens of `added_tokens_decoder` that tokenizer.json does not have. Returns the
    texts of all of them.
    """
    from tokenizers import AddedToken

    if listed is None:
        return set()
    tokens = check_added_tokens_decoder(listed, f"{file}: added_tokens_decoder")
    for token_id, token in tokens:
        text = token["content"]
        if rust.token_to_id(text) is not None:
            continue
        flags = {name: token[name] for name in TOKEN_FLAGS if name in token}
        rust.add_tokens([AddedToken(text, **flags)])
        if rust.token_to_id(text) != token_id:
            raise FormatError(
                f"{file}: added_tokens_decoder gives {text[:80]!r} the id {token_id}; the next id "
                f"of tokenizer.json is {rust.token_to_id(text)}"
            )
    return {token["content"] for _, token in tokens}


def _read_decoder(rust: "tokenizers.Tokenizer", file: Path) -> tuple[bool, bool]:
    """(the vocabulary writes bytes GPT-2's way, decoding removes a leading space)."""
    # the steps of the decoder
    steps: list[dict[str, Any]] = []
    if rust.decoder is not None:
        state: dict[str, Any] = json.loads(rust.decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    # GPT-2's way
    if kinds == {"ByteLevel"}:
        return True, False
    # SentencePiece's way
    if (
        kinds
        and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        and kinds & {"Replace", "Metaspace"}
    ):
        strips = any(
            step["type"] == "Strip"
            and step["content"] == " "
            and step["start"] == 1
            and not step["stop"]
            for step in steps
        )
        return False, strips or any(
            step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps
        )
    raise UnsupportedError(
        f"{file} decodes by {', '.join(sorted(kinds)) or 'nothing'}; known are ByteLevel and "
        "SentencePiece's ways"
    )


def _read_vocabulary(rust: "tokenizers.Tokenizer", byte_level: bool, file: Path) -> Vocabulary:
    ids = rust.get_vocab(with_added_tokens=True)
    size = 1 + max(ids.values(), default=0)
    if size > MAX_TOKENS:
        raise FormatError(
            f"{file} has a token with the id {size - 1}; ids must be below {MAX_TOKENS}"
        )
    tokens, kinds = [""] * size, bytearray([TokenKind.UNUSED]) * size
    for text, token_id in ids.items():
        is_byte = (
            not byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        )
        tokens[token_id], kinds[token_id] = text, TokenKind.BYTE if is_byte else TokenKind.NORMAL
    for token_id, token in rust.get_added_tokens_decoder().items():
        kinds[token_id] = TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED
    return Vocabulary(tokens, bytes(kinds), byte_level)


def _around(rust: "tokenizers.Tokenizer", file: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the file's post-processor puts before and after a text, found by a trial."""
    with library_errors(FormatError, f"{file} cannot encode the letter a"):
        whole, bare = (
            rust.encode("a", add_special_tokens=special).ids for special in (True, False)
        )
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


# ---- the other files


def _named_token(
    name: str, configs: tuple[Mapping[str, Any], ...], rust: "tokenizers.Tokenizer", path: Path
) -> int | None:
    """The id of "bos" or "eos": from the text in tokenizer_config.json, else an id in the other
    two.
    """
    text = _token_text(configs[0], f"{name}_token", path)
    if text is not None:
        token_id: int | None = rust.token_to_id(text)
        if token_id is None:
            raise FormatError(
                f"{path / 'tokenizer_config.json'}: {name}_token is {text[:80]!r}, which is not "
                "in the vocabulary"
            )
        return token_id
    for config in configs[1:]:
        if ids := _ids(config.get(f"{name}_token_id"), path, f"{name}_token_id", first=True):
            return min(ids)
    return None


def _token_text(config: Mapping[str, Any], key: str, path: Path) -> str | None:
    """A token as tokenizer_config.json writes it: its text, or an object with its text as
    "content". None if there is none.
    """
    value = config.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if value is None:
        return None
    if not isinstance(text, str):
        raise FormatError(
            f"{path / 'tokenizer_config.json'}: {key} is {value!r:.80}; it must be a text, or an "
            "object with a text as 'content'"
        )
    return text


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    """A flag of tokenizer_config.json; false if it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise FormatError(
            f"{path / 'tokenizer_config.json'}: {key} is {value!r:.80}; it must be true or false"
        )
    return value is True


def _ids(value: object, path: Path, key: str, *, first: bool = False) -> set[int]:
    """Ids as configs write them: none, one, or a list. `first`: only the first of a list."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in listed:
        if (
            not isinstance(token_id, int)
            or isinstance(token_id, bool)
            or not 0 <= token_id < MAX_TOKENS
        ):
            raise FormatError(
                f"{path}: {key} is {value!r:.80}; it must be a token id or a list of them"
            )
    return set(listed[:1] if first else listed)


def _read_chat_template(
    path: Path, config: Mapping[str, Any], names: Mapping[str, str]
) -> ChatTemplate | None:
    """The templates by name. Templates in files of their own replace those of
    tokenizer_config.json, as in transformers.
    """
    given = config.get("chat_template")
    named: dict[Any, Any] = {} if given is None else {"default": given}
    if isinstance(given, list):  # several, by name
        entries = (entry if isinstance(entry, dict) else {} for entry in given)
        named = {entry.get("name"): entry.get("template") for entry in entries}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise FormatError(
            f"{path / 'tokenizer_config.json'}: chat_template must be a string, or a list of "
            "objects with 'name' and 'template'"
        )
    if is_there(path / TEMPLATE):
        named["default"] = _read_text(path, TEMPLATE, MAX_CONFIG_BYTES)
    files = sorted((path / MORE_TEMPLATES).glob("*.jinja"))
    for file in files[: MAX_TEMPLATES + 1]:  # one too many, so that it is refused
        name = file.relative_to(path).as_posix()
        named[file.stem] = _read_text(path, name, MAX_CONFIG_BYTES)
    return ChatTemplate(named, names) if named else None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not is_there(path / name):
        return {}
    return read_json(path / name, MAX_CONFIG_BYTES, within=path)


def _read_text(path: Path, name: str, limit: int) -> str:
    try:
        return read_bytes(path / name, limit, within=path).decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path / name} is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
