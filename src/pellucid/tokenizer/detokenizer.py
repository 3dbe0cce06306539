"""Streaming text: tokens go in, and the text that is safe to show comes out.

Only text that later tokens may still change is held back. It stands at the end of the text so far:

- the bytes of an unfinished character (a token may end in the middle of one), and
- the longest suffix that begins a stop string.

The results of `push` and `finish`, joined, are `Tokenizer.decode` of all the tokens, cut before the
first stop string. They do not depend on how the tokens were grouped. The space that SentencePiece
puts before a text is removed only at the beginning of a text: " word" after the words of a prompt
keeps its space.

The first complete stop string ends the text; of several that end at the same character, the longest
counts. Each stop string is matched by the automaton of Knuth, Morris & Pratt (SIAM J. Comput. 6,
1977), so the work per token does not depend on the length of the text.
"""

import codecs
from collections.abc import Iterable, Sequence

from ..errors import RequestError
from .tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """The text of one completion."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_tail: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """`prompt_tail`: the last tokens of the prompt, which show whether this text continues
        other text. `include_stop`: the text ends after the stop string, not before it. Stop strings
        that are complete within the first `min_tokens` tokens do not count.
        """
        self.stopped_by: str | None = None
        self._token_bytes = tokenizer.vocabulary.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special else frozenset()
        self._drops_space = tokenizer.strips_leading_space and not any(
            map(self._visible_bytes, prompt_tail)
        )
        self._stops = [_StopString(text) for text in stop]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._bytes = b""  # of a character that is not finished
        self._held = ""  # text that may begin a stop string
        self.text = ""  # all that has been shown

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens and return the text that can now be shown. Tokens after a stop string are
        ignored.
        """
        shown = "".join([self._take(token_id) for token_id in token_ids])
        self.text += shown
        return shown

    def finish(self) -> str:
        """The rest of the text. No token may follow."""
        rest = self._advance(self._decode(b"", is_last=True))
        rest += self._held
        self._held = ""
        self.text += rest
        return rest

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._token_bytes(token_id)

    def _take(self, token_id: int) -> str:
        if self.stopped_by is not None:
            return ""
        self._num_tokens += 1
        data = self._visible_bytes(token_id)
        if data and self._drops_space:
            self._drops_space = False
            data = data.removeprefix(b" ")
        return self._advance(self._decode(data))

    def _decode(self, data: bytes, *, is_last: bool = False) -> str:
        """The characters that are complete after these bytes."""
        data = self._bytes + data
        text, num_bytes = codecs.utf_8_decode(data, "replace", is_last)
        self._bytes = data[num_bytes:]
        return text

    def _advance(self, new: str) -> str:
        """Match `new` against the stop strings, and return the text that need not be held back."""
        if not self._stops:
            return new
        text, seen = self._held + new, len(self._held)
        for end, char in enumerate(new, seen + 1):
            complete = [stop for stop in self._stops if stop.advance(char)]
            if complete and self._num_tokens > self._min_tokens:
                longest = max(complete, key=lambda stop: len(stop.text))
                self.stopped_by, self._held = longest.text, ""
                return text[: end if self._include_stop else end - len(longest.text)]
        shown = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]


class _StopString:
    """The longest beginning of one stop string with which the text so far ends."""

    def __init__(self, text: str) -> None:
        if not text:
            raise RequestError("a stop string is empty; it must have at least one character")
        self.text = text
        self.matched = 0  # characters; fewer than all
        self._borders = [0, 0]  # [n]: the longest proper prefix of text[:n] that is its suffix too
        for end in range(1, len(text)):
            self._borders.append(self._longer(self._borders[end], text[end]))

    def advance(self, char: str) -> bool:
        """Add a character. True if it completes the stop string."""
        self.matched = self._longer(self.matched, char)
        if self.matched < len(self.text):
            return False
        self.matched = self._borders[self.matched]
        return True

    def _longer(self, matched: int, char: str) -> int:
        """The number of characters matched after `char`, given `matched` before it."""
        while matched and self.text[matched] != char:
            matched = self._borders[matched]
        return matched + (self.text[matched] == char)
