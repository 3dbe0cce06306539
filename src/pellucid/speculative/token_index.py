"""`TokenIndex`: finds the earlier places of a text whose last tokens are those of a context.

For each position, two chains lead to the earlier positions with the same last token and the same
last four. They are keyed by hashes, so each candidate is compared token by token. An added token
costs about a microsecond, and some 200 bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["MAX_MATCH", "Match", "TokenIndex"]

_LENGTHS = (4, 1)  # of the keys: a match of four or more is looked for first
MAX_MATCH = 32  # tokens that are compared at most
_MAX_CANDIDATES = 16  # of one key, the latest first


class Match(NamedTuple):
    """A place whose last tokens are those of the context."""

    next: int  # the position behind them
    length: int  # how many tokens are equal, at most MAX_MATCH


class TokenIndex:
    """A text that grows, and the positions of its short sequences."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # for each key length: hash -> the last position behind such a sequence
        self._last: tuple[dict[int, int], ...] = tuple({} for _ in _LENGTHS)
        # for each position: the one before it with the same key; -1: none
        self._before: tuple[list[int], ...] = tuple([] for _ in _LENGTHS)
        self._own: tuple[int, list[Match]] = 0, []  # the last own_matches, and the length then

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens at the end."""
        tokens, start = self.tokens, len(self.tokens)
        tokens += token_ids
        for length, last, before in zip(_LENGTHS, self._last, self._before, strict=True):
            for stop in range(start + 1, len(tokens) + 1):
                if stop < length:
                    before.append(-1)
                    continue
                key = hash(tuple(tokens[stop - length : stop]))
                before.append(last.get(key, -1))
                last[key] = stop

    def matches(self, context: Sequence[int]) -> list[Match]:
        """Earlier places whose last tokens are those of `context`, the latest first. Places that
        share the tokens of a longer key hide the others. The end of the text is none of them.
        """
        tokens = self.tokens
        end, num_context = len(tokens), len(context)
        for length, last, before in zip(_LENGTHS, self._last, self._before, strict=True):
            if num_context < length:
                continue
            found: list[Match] = []
            stop = last.get(hash(tuple(context[-length:])), -1)
            for _ in range(_MAX_CANDIDATES):
                if stop == -1:
                    break
                if stop < end:
                    # Count the equal tokens; the hashes may be equal by chance.
                    most = min(stop, num_context, MAX_MATCH)
                    equal = 0
                    while equal < most and tokens[stop - equal - 1] == context[-equal - 1]:
                        equal += 1
                    if equal >= length:
                        found.append(Match(stop, equal))
                stop = before[stop - 1]
            if found:
                return found
        return []

    def own_matches(self) -> list[Match]:
        """Earlier places whose last tokens are those at the end of the text itself."""
        if self._own[0] != len(self.tokens):
            self._own = len(self.tokens), self.matches(self.tokens)
        return self._own[1]
