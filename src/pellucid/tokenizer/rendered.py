"""The token ids of a rendered chat prompt, in which only the template writes control tokens.

A control token counts only if the template wrote its first and its last character. Any other
spelling of one is encoded as plain text. So no message, role, tool or variable of a caller can end
a turn or begin one. The caller's text may lie between the two ends: some templates write "<|", the
role and "|>". Tokens with a fixed text that are not control tokens are found everywhere.

A prompt is first encoded as trusted text. If the template wrote every control token that is found,
that is the result; this is the usual case. Otherwise the template's control tokens are replaced by
stand-ins: texts that occur nowhere in the prompt. A tokenizer made for this one prompt knows the
stand-ins instead of the control tokens, so the text between them is cut at the same borders as
before.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import RequestError
from .traced_text import TracedText

if TYPE_CHECKING:
    import tokenizers

__all__ = ["RenderedEncoder", "tokenizer_like"]


_END = ""  # no character


class _Tree(dict[str, "_Tree"]):
    """A prefix tree: the subtrees by the next character."""


class RenderedEncoder:
    """Built from the tokenizer that finds control tokens in text."""

    def __init__(self, rust: "tokenizers.Tokenizer") -> None:
        self._rust = rust
        added = sorted(rust.get_added_tokens_decoder().items())
        self._fixed = [token for _, token in added if not token.special]
        self._control = {
            token.content: token for _, token in added if token.special and token.content
        }
        self._ids = {token.content: token_id for token_id, token in added}
        self._names = {
            token_id: token.content for token_id, token in added if token.content in self._control
        }
        self._tree = _tree_of(self._control)

    def encode(self, text: TracedText) -> list[int]:
        """The token ids of `text`. Errors of the `tokenizers` library pass through.

        Raises RequestError if the vocabulary's merges make a control token from the caller's text,
        so that it cannot be encoded as plain text.
        """
        plain = text.plain
        encoding = self._rust.encode_batch([plain], add_special_tokens=False)[0]
        for token_id, span in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._names and not self._is_written(text, self._names[token_id], *span):
                return self._encode_cut(text)
        ids: list[int] = encoding.ids
        return ids

    def _is_written(self, text: TracedText, name: str, start: int, end: int) -> bool:
        """Whether the template wrote the control token at this place. White space around it, which
        some tokens match too, may be the caller's.
        """
        at = str.find(text, name, start, end)
        return at >= 0 and not text.foreign[at] and not text.foreign[at + len(name) - 1]

    def _encode_cut(self, text: TracedText) -> list[int]:
        from tokenizers import AddedToken

        plain = text.plain
        # replace the template's control tokens by stand-ins
        while (nonce := os.urandom(8).hex()) in plain:
            pass
        stand_ins: dict[str, str] = {}  # by control token
        parts, last = [], 0
        for start, end in self._written(text):
            stand_in = stand_ins.setdefault(plain[start:end], f"<{nonce}:{len(stand_ins)}>")
            parts += [plain[last:start], stand_in]
            last = end
        # a tokenizer that knows the stand-ins in place of the control tokens
        rust = tokenizer_like(self._rust)
        rust.add_tokens(self._fixed)
        for name, stand_in in stand_ins.items():
            token = self._control[name]
            same = {
                "single_word": token.single_word,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
            }
            rust.add_tokens([AddedToken(stand_in, normalized=False, special=False, **same)])
        control = {
            rust.token_to_id(stand_in): self._ids[name] for name, stand_in in stand_ins.items()
        }
        # encode; then give the stand-ins the ids of their control tokens
        cut = "".join([*parts, plain[last:]])
        encoding = rust.encode_batch([cut], add_special_tokens=False)[0]
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # the unknown token may be a control token too; it does not spell its name
            if token_id in self._names and self._names[token_id] in cut[start:end]:
                raise RequestError(
                    f"the messages hold {self._names[token_id]!r}, of which this vocabulary makes "
                    "a control token even in text"
                )
        return [control.get(token_id, token_id) for token_id in encoding.ids]

    def _written(self, text: TracedText) -> Iterator[tuple[int, int]]:
        """The places of the template's control tokens, from left to right; the longest at each
        place.
        """
        plain, end = text.plain, 0
        for run in re.finditer(rb"\0+", text.foreign):
            start = max(run.start(), end)
            while start < run.end():
                end = start + self._length_at(plain, text.foreign, start)
                if end > start:
                    yield start, end
                start = max(start + 1, end)

    def _length_at(self, plain: str, foreign: bytes, start: int) -> int:
        """The length of the longest control token at `start` whose last character the template
        wrote; 0 if there is none.
        """
        node, length = self._tree, 0
        for at in range(start, len(plain)):
            if (following := node.get(plain[at])) is None:
                break
            node = following
            if _END in node and not foreign[at]:
                length = at + 1 - start
        return length


def _tree_of(texts: Iterable[str]) -> _Tree:
    """The prefix tree of the texts. The end of a text is marked by _END."""
    root = _Tree()
    for text in texts:
        node = root
        for char in text:
            node = node.setdefault(char, _Tree())
        node[_END] = _Tree()
    return root


def tokenizer_like(rust: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """A tokenizer over the same model (shared, not copied), without its added tokens."""
    from tokenizers import Tokenizer as RustTokenizer

    other = RustTokenizer(rust.model)
    if rust.normalizer is not None:
        other.normalizer = rust.normalizer
    if rust.pre_tokenizer is not None:
        other.pre_tokenizer = rust.pre_tokenizer
    return other
