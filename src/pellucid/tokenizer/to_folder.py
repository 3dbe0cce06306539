"""The tokenizer's files of a folder in Hugging Face's layout, made from a tokenizer of a GGUF file.

`tokenizer.json` is the encoder that `from_gguf` builds, with the decoder and the tokens around a
text. So transformers cuts text as llama.cpp does. `tokenizer_config.json` names the special tokens,
and templates are files of their own.
"""

import json
from typing import Any

from .tokenizer import Tokenizer
from .vocabulary import TokenKind

__all__ = ["tokenizer_files"]


def tokenizer_files(tokenizer: Tokenizer, context: int, pad: int | None) -> dict[str, bytes]:
    """The files by name. `context` is the longest sequence of the model, in tokens; `pad` is the
    token that fills shorter sequences of a batch, if there is one.
    """
    special = dict(tokenizer.templates.special_tokens)
    unknown = tokenizer.vocabulary.ids_of(TokenKind.UNKNOWN)
    if unknown:
        special.setdefault("unk_token", tokenizer.vocabulary.tokens[unknown[0]])
    if pad is not None:
        special.setdefault("pad_token", tokenizer.vocabulary.tokens[pad])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files = {
        "tokenizer.json": _json(_tokenizer_json(tokenizer)),
        "tokenizer_config.json": _json(config),
    }
    for name, text in tokenizer.templates.sources.items():
        file = f"additional_chat_templates/{name}.jinja"
        files["chat_template.jinja" if name == "default" else file] = text.encode()
    return files


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(tokenizer.rust.to_str())
    values["decoder"] = _decoder(tokenizer)
    values["post_processor"] = _post_processor(tokenizer)
    return values


def _decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    """GPT-2's way of writing bytes, or SentencePiece's."""
    if tokenizer.vocabulary.byte_level:
        return {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if tokenizer.strips_leading_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The tokens before and after each text; None if there are none."""
    before, after = tokenizer.around
    if not before and not after:
        return None
    tokens = tokenizer.vocabulary.tokens

    def around(text: str, type_id: int) -> list[dict[str, Any]]:
        """One text of the template, whose name is `text`."""
        first, last = (
            [{"SpecialToken": {"id": tokens[i], "type_id": type_id}} for i in ids]
            for ids in (before, after)
        )
        return [*first, {"Sequence": {"id": text, "type_id": type_id}}, *last]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
            for i in (*before, *after)
        },
    }


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()
