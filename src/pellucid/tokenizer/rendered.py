"""The token ids of a rendered chat prompt, in which only the template writes control tokens.

A control token counts where its first and its last character are the template's. Any other is cut
like all text, so no message, role, tool or variable of a caller can end a turn or begin one,
whatever it spells. A caller's text may lie between the two ends: some templates write "<|", the
role and "|>". Tokens that are not for control but have a fixed text are found everywhere, as
always.

Almost no prompt spells a control token that it may not. So a prompt is first encoded as trusted
text. If each control token found is the template's, that is the answer. If not, the template's
control tokens are replaced by stand-ins, which are texts that occur nowhere in the prompt. A
tokenizer made for this one prompt knows the stand-ins in place of the control tokens, so the text
between them is cut at the same borders as before.
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
    """The texts that go on from here, by their next character."""


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

        Raises RequestError where the merges of the vocabulary make a control token of what the
        caller wrote, so that it cannot be written as text.
        """
        plain = text.plain
        encoding = self._rust.encode_batch([plain], add_special_tokens=False)[0]
        for token_id, span in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._names and not self._is_written(text, self._names[token_id], *span):
                return self._encode_cut(text)
        ids: list[int] = encoding.ids
        return ids

    def _is_written(self, text: TracedText, name: str, start: int, end: int) -> bool:
        """Is the control token at this place the template's? Some tokens swallow white space
        around them, which may be anyone's.
        """
        at = str.find(text, name, start, end)
        return at >= 0 and not text.foreign[at] and not text.foreign[at + len(name) - 1]

    def _encode_cut(self, text: TracedText) -> list[int]:
        from tokenizers import AddedToken

        plain = text.plain
        while (nonce := os.urandom(8).hex()) in plain:
            pass
        stand_ins: dict[str, str] = {}  # by the control token
        parts, last = [], 0
        for start, end in self._written(text):
            stand_in = stand_ins.setdefault(plain[start:end], f"<{nonce}:{len(stand_ins)}>")
            parts += [plain[last:start], stand_in]
            last = end
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
        cut = "".join([*parts, plain[last:]])
        encoding = rust.encode_batch([cut], add_special_tokens=False)[0]
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # an unknown token may stand here for text that has no token
            if token_id in self._names and self._names[token_id] in cut[start:end]:
                raise RequestError(
                    f"the messages hold {self._names[token_id]!r}, of which this vocabulary makes "
                    "a control token even in text"
                )
        return [control.get(token_id, token_id) for token_id in encoding.ids]

    def _written(self, text: TracedText) -> Iterator[tuple[int, int]]:
        """The places of the template's control tokens: from left to right, the longest at each."""
        plain, end = text.plain, 0
        for run in re.finditer(rb"\0+", text.foreign):
            start = max(run.start(), end)
            while start < run.end():
                end = start + self._length_at(plain, text.foreign, start)
                if end > start:
                    yield start, end
                start = max(start + 1, end)

    def _length_at(self, plain: str, foreign: bytes, start: int) -> int:
        """The length of the longest control token at `start` with a last character of the
        template's; 0 where there is none.
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
    """A tree with a path for each text, a character a step. Where a text ends, there is _END."""
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
