r"""Which regular expressions of a tokenizer may run: those that take time in proportion to the
text.

The `tokenizers` library runs them on a backtracking engine (Oniguruma). There a pattern from an
untrusted file can take hours, or end in a panic when the engine gives up. So each pattern is parsed
here first. It passes if each of its alternatives is of one of two kinds:

- A beginning of bounded length, then at most one repetition without an upper bound, then nothing
  that can fail. After reading a long run such an alternative matches, so the run is read once.
- One of a few published alternatives that may read a run and then fail, beside another alternative
  that then matches the run (`_RUNS`).

Syntax: Oniguruma's, without back references, recursion and conditions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UnsupportedError

__all__ = ["check_regex"]

MAX_PATTERN = 8192  # characters
MAX_REPEAT = 256  # of a bounded repetition
MAX_LENGTH = 4096  # characters that the bounded part of an alternative may match
MAX_WAYS = 4096  # to match the bounded part of an alternative
MAX_DEPTH = 16

# An alternative that may read a run of white space and fail needs one of these beside it.
_SPACE_RUNS = (r"\s+(?!\S)", r"\s+", r"\s+(?=\S)")
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_RUNS = (rf"{_UPPER}+{_LOWER}*",)
# Kimi's: Han characters are words of their own
_UPPER_HAN, _LOWER_HAN = (f"{letters[:-1]}&&[^\\p{{Han}}]]" for letters in (_UPPER, _LOWER))
_RUNS = {
    r"\s*[\r\n]+": _SPACE_RUNS,
    r"\s*[\r\n]": _SPACE_RUNS,
    r"\s*\n+": _SPACE_RUNS,
    r"\s*\n": _SPACE_RUNS,
    rf"{_UPPER}*{_LOWER}+": _WORD_RUNS,
    rf"{_UPPER_HAN}*{_LOWER_HAN}+": (rf"{_UPPER_HAN}+{_LOWER_HAN}*",),
}
# A whole pattern whose repetition takes all that it can, so that what must not follow does not.
_PUBLISHED = frozenset({r"(?:\r?\n)+(?!\r?\n)"})
# These read a run of white space and give back at most one character, or look behind first.
_SOUND = frozenset({r"\s+(?!\S)", r"(?<!\s)\s+$"})

_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z0-9_ =&.-]{1,40}\}|x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{1,2}"
    r"|u[0-9A-Fa-f]{4}|[^pPxu0-9kgKcCMGR])",
    re.DOTALL,
)
_ZERO_WIDTH = frozenset({r"\b", r"\B", r"\A", r"\Z", r"\z"})
_REPEAT = re.compile(r"(?:[*+?]|\{(\d{1,6})(,?)(\d{0,6})\})([?+]?)")
_OPTIONS = re.compile(r"\(\?[imx-]{0,6}:")


@dataclass(frozen=True, slots=True)
class _Size:
    """What a part of a pattern may match, in characters. `most` is None without an upper bound."""

    least: int
    most: int | None
    may_fail: bool  # on some text
    ways: int = 1  # ways to match its bounded part, which backtracking may try


def check_regex(pattern: str, where: str) -> None:
    """Raise UnsupportedError unless `pattern` is known to take time in proportion to the text."""
    if len(pattern) > MAX_PATTERN:
        raise UnsupportedError(
            f"{where}: a pattern has {len(pattern)} characters; it must have at most {MAX_PATTERN}"
        )
    # files write these characters either way
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    if pattern in _PUBLISHED:
        return
    parser = _Parser(pattern)
    try:
        parser.check()
    except _Unbounded as error:
        raise UnsupportedError(
            f"{where}: the pattern {pattern[:200]!r} is not known to take time in proportion to a "
            f"text's length: {error}"
        ) from None


class _Unbounded(Exception):
    """Why a pattern is refused."""


class _Parser:
    """Reads a pattern once, from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def check(self) -> None:
        self._alternatives(0)
        if self.at < len(self.pattern):
            raise _Unbounded(f"a parenthesis too many at character {self.at}")

    def _alternatives(self, depth: int) -> _Size:
        """Read alternatives up to the end of their group. Returns their size together."""
        if depth > MAX_DEPTH:
            raise _Unbounded(f"groups are nested more than {MAX_DEPTH} deep")
        found: list[tuple[str, _Size | None]] = []
        while True:
            start = self.at
            size = self._sequence(depth)
            found.append((self.pattern[start : self.at], size))
            if self._peek() != "|":
                break
            self.at += 1
        texts = [text for text, _ in found]
        sizes = [size if size is not None else _known(text, texts) for text, size in found]
        most = None if any(s.most is None for s in sizes) else max(s.most or 0 for s in sizes)
        return _Size(
            min(s.least for s in sizes),
            most,
            all(s.may_fail for s in sizes),
            sum(s.ways for s in sizes),
        )

    def _sequence(self, depth: int) -> _Size | None:
        """Read one alternative. None: its structure is not of the first kind; it may be of the
        second.
        """
        least, most, may_fail, sound, ways = 0, 0, False, True, 1
        bounded = True  # no repetition without an upper bound so far
        while (char := self._peek()) and char not in "|)":
            item = self._item(depth)
            if not bounded and (item.may_fail or item.least):
                sound = False  # after reading a run, this may fail
            if item.most is None:
                # a run; `most` counts only the bounded parts
                bounded = False
            else:
                most += item.most
            least += item.least
            may_fail |= item.may_fail
            ways *= item.ways
            # what backtracking may try, and a match, are bounded
            if ways > MAX_WAYS:
                raise _Unbounded(f"an alternative may be matched in more than {MAX_WAYS} ways")
            if max(least, most) > MAX_LENGTH:
                raise _Unbounded(f"an alternative may match more than {MAX_LENGTH} characters")
        if not sound:
            return None
        return _Size(least, most if bounded else None, may_fail, ways)

    def _item(self, depth: int) -> _Size:
        """Read an atom and how often it is repeated."""
        start = self.at
        atom = self._atom(depth)
        # the repetition
        match = _REPEAT.match(self.pattern, self.at)
        if match is None:
            return atom
        self.at = match.end()
        if self._peek() in ("*", "+", "?") or _REPEAT.match(self.pattern, self.at):
            raise _Unbounded(f"a repetition is repeated at character {self.at}")
        sign = match[0][0]
        if sign == "{" and match[4]:
            raise _Unbounded(f"a repetition is repeated at character {self.at - 1}")
        low, high = _bounds(sign, match)
        if low > MAX_REPEAT or (high or 0) > MAX_REPEAT:
            raise _Unbounded(f"a repetition of more than {MAX_REPEAT} at character {start}")
        # an optional atom
        if high == 1:
            if atom.most is None and low == 0:
                raise _Unbounded(f"an optional part without an upper bound at character {start}")
            return _Size(
                atom.least * low, atom.most, atom.may_fail and low > 0, atom.ways + 1 - low
            )
        # any other repetition: only of one character
        if atom.least != 1 or atom.most != 1:
            raise _Unbounded(f"a repetition of what is not one character at character {start}")
        return _Size(low, high, low > 0, 1 if high is None else high - low + 1)

    def _atom(self, depth: int) -> _Size:
        pattern, char = self.pattern, self.pattern[self.at]
        if char == "(":
            return self._group(depth)
        if char == "[":
            self._char_class(depth)
            return _Size(1, 1, True)
        if char in "^$":
            self.at += 1
            return _Size(0, 0, True)
        if char == "\\":
            match = _ESCAPE.match(pattern, self.at)
            if match is None:
                raise _Unbounded(f"an escape at character {self.at} is none of those that are read")
            self.at = match.end()
            return _Size(0, 0, True) if match[0] in _ZERO_WIDTH else _Size(1, 1, True)
        if char in "*+?":
            raise _Unbounded(f"a repetition of nothing at character {self.at}")
        self.at += 1
        return _Size(1, 1, True)

    def _group(self, depth: int) -> _Size:
        pattern, start = self.pattern, self.at
        # the kind of the group
        looks = next(
            (sign for sign in ("(?=", "(?!", "(?<=", "(?<!") if pattern.startswith(sign, start)),
            None,
        )
        if looks is not None:
            self.at += len(looks)
        elif match := _OPTIONS.match(pattern, start):
            self.at = match.end()
        elif pattern.startswith("(?", start):
            raise _Unbounded(f"a group at character {start} is none of those that are read")
        else:
            self.at += 1
        # what is in it; a look around matches no characters
        size = self._alternatives(depth + 1)
        if self._peek() != ")":
            raise _Unbounded(f"the group at character {start} has no end")
        self.at += 1
        if looks is None:
            return size
        if size.most is None:
            raise _Unbounded(f"a look around without an upper bound at character {start}")
        return _Size(0, 0, True)

    def _char_class(self, depth: int) -> None:
        """Read "[…]", with classes inside it."""
        if depth > MAX_DEPTH:
            raise _Unbounded(f"classes are nested more than {MAX_DEPTH} deep")
        start = self.at
        self.at += 1
        if self._peek() == "^":
            self.at += 1
        first = True
        # members, up to the closing bracket; "]" in first place is a member
        while (char := self._peek()) != "]" or first:
            first = False
            if not char:
                raise _Unbounded(f"the class at character {start} has no end")
            if char == "[":
                self._char_class(depth + 1)
            elif char == "\\":
                match = _ESCAPE.match(self.pattern, self.at)
                if match is None:
                    raise _Unbounded(f"an escape at character {self.at} is none that is read")
                self.at = match.end()
            else:
                self.at += 1
        self.at += 1

    def _peek(self) -> str:
        return self.pattern[self.at : self.at + 1]


def _bounds(sign: str, match: re.Match[str]) -> tuple[int, int | None]:
    """(fewest, most) times of a repetition."""
    if sign != "{":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
    low = int(match[1])
    return low, int(match[3]) if match[3] else None if match[2] else low


def _known(branch: str, branches: Sequence[str]) -> _Size:
    """An alternative of the second kind: sound by itself or beside another one of `branches`."""
    # one optional character before it changes nothing
    bare = re.sub(r"^\[\^?[^\[\]]*\]\?\+?", "", branch)
    tails = {re.sub(r"^\[\^?[^\[\]]*\]\?\+?", "", other) for other in branches}
    tails |= {re.sub(r"\(\?i:[^()]*\)\?$", "", tail) for tail in tails}
    bare = re.sub(r"\(\?i:[^()]*\)\?$", "", bare)
    if bare in _SOUND or tails & set(_RUNS.get(bare, ())):
        return _Size(1, None, True)
    raise _Unbounded(f"{branch[:80]!r} may read far and then fail")
