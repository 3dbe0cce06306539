"""Text that grows token by token, of which only what can be shown is shown.

Only text that later tokens may still change is held back. That is, at the end of the text so far,

- the bytes of an unfinished character (a token may end in the middle of one), and
- the longest suffix that begins a stop string.

What `push` and `finish` return, put together, is `Tokenizer.decode` of all the tokens, cut before
the first stop string. It does not depend on how the tokens came. The space that SentencePiece puts
before a text is taken away at the beginning of a text only: after a prompt's own words, " word"
keeps its space.

A stop string counts once it is complete, as soon as one is; of several that end together, the
longest. Each of them is followed by the automaton of Knuth, Morris & Pratt (SIAM J. Comput. 6,
1977), so the work per token is the same however long the text.
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
        """`prompt_tail`: the last tokens of the prompt, which tell whether this text continues
        another. `include_stop`: the text ends after the stop string, not before it. Stop strings
        that the first `min_tokens` tokens complete do not count.
        """
        self.stopped_by: str | None = None
        self._token_bytes = tokenizer.vocabulary.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special else frozenset()
        self._drops_space = tokenizer.strips_leading_space and not any(
            map(self._visible_bytes, prompt_tail)
        )
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_StopString(text) for text in stop]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # text that may begin a stop string
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All that has been shown."""
        return "".join(self._shown)

    def push(self, token_ids: Iterable[int]) -> str:
        """Take in tokens and return the text that can now be shown. After a stop string tokens
        change nothing.
        """
        return self._show("".join([self._take(token_id) for token_id in token_ids]))

    def finish(self) -> str:
        """The rest: no token follows."""
        rest = self._advance(self._decoder.decode(b"", True))
        rest += self._held
        self._held = ""
        return self._show(rest)

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
        return self._advance(self._decoder.decode(data))

    def _advance(self, new: str) -> str:
        """Let the stop strings see `new`, and return what need not be held back."""
        text, seen = self._held + new, len(self._held)
        for end, char in enumerate(new, seen + 1):
            complete = [stop for stop in self._stops if stop.advance(char)]
            if complete and self._num_tokens > self._min_tokens:
                longest = max(complete, key=lambda stop: len(stop.text))
                self.stopped_by, self._held = longest.text, ""
                return text[: end if self._include_stop else end - len(longest.text)]
        shown = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown]

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


class _StopString:
    """How much of one stop string the text so far ends with."""

    def __init__(self, text: str) -> None:
        if not text:
            raise RequestError("a stop string is empty; it must have at least one character")
        self.text = text
        self.matched = 0  # characters; fewer than all
        self._borders = [0, 0]  # [n]: the longest proper prefix of text[:n] that is its suffix too
        for end in range(1, len(text)):
            self._borders.append(self._longer(self._borders[end], text[end]))

    def advance(self, char: str) -> bool:
        """One more character. True where it completes the stop string."""
        self.matched = self._longer(self.matched, char)
        if self.matched < len(self.text):
            return False
        self.matched = self._borders[self.matched]
        return True

    def _longer(self, matched: int, char: str) -> int:
        """How much is matched after `char`, if `matched` characters were before it."""
        while matched and self.text[matched] != char:
            matched = self._borders[matched]
        return matched + (self.text[matched] == char)
