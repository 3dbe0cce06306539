"""How each operation of a template carries the marks of a `TracedText` to its result.

An operation that cuts and joins texts also cuts and joins their marks. A template's own texts are
plain str. If the characters of a result cannot be traced one by one (JSON, an indented text, a list
written out), all of them count as the caller's.

The sandbox calls this module for every method, filter and operator that a template may use. None of
them may lose a mark, because a user could then write control tokens. This module knows neither
Jinja nor tokens.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from types import BuiltinMethodType
from typing import Any

from markupsafe import Markup

from .traced_text import TracedText, whole

__all__ = [
    "ForeignMarkup",
    "as_text",
    "joined",
    "of_filter",
    "of_method",
    "of_operator",
    "percent",
    "replaced",
    "traced_format",
]

# a conversion of "%": its name and how a value is written; the width has three digits at most
_PERCENT = re.compile(
    r"%(?:\((?P<name>[^()]*)\))?(?P<how>[-+ #0]{0,5}\d{0,3}(?:\.\d{0,3})?[a-zA-Z%])"
)
_SAME_PLACES = frozenset(("capitalize", "casefold", "lower", "swapcase", "title", "upper"))
_STRIPS = frozenset(("lstrip", "removeprefix", "removesuffix", "rstrip", "strip"))


class ForeignMarkup(Markup):
    """A caller's text after a filter that escapes. Its methods return the same class, so every text
    made from it is the caller's.
    """

    def __str__(self) -> str:
        return whole(str.__str__(self))


def as_text(value: Any) -> str:
    """str(value). The text of a value that is not a str counts as the caller's."""
    return value if isinstance(value, str) else whole(str(value))


def joined(parts: Iterable[str], between: str = "") -> str:
    """`between.join(parts)`. A plain str if all of it is the template's."""
    listed = list(parts)
    text = str.__str__(between).join(listed)
    if not any(map(_is_foreign, [between, *listed])):
        return text
    return TracedText(text, _marks(between).join(map(_marks, listed)))


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """`text.replace(old, new, count)`."""
    if not old:  # it is inserted between all characters
        return _whole_if(_is_foreign(text) or _is_foreign(new), text.replace(old, new, count))
    return joined(_strided(text, text.split(old, count), len(old)), new)


def of_method(
    method: BuiltinMethodType, args: Sequence[Any], named: Mapping[str, Any], result: Any
) -> Any:
    """The `result` of a str method, with marks."""
    text, name = method.__self__, method.__name__
    assert isinstance(text, str)
    if name == "join":
        return joined(args[0], text)
    if name == "replace":
        return replaced(text, *args)
    if not isinstance(text, TracedText):
        return result  # pieces of the template's own text
    if isinstance(result, str):
        return (
            _stripped(text, name, args, result) if name in _STRIPS else _same_places(text, result)
        )
    if name in ("partition", "rpartition"):
        return tuple(_strided(text, result, 0))
    if name in ("rsplit", "split"):
        separator = args[0] if args else named.get("sep")
        return _found(text, result) if separator is None else _strided(text, result, len(separator))
    return _found(text, result) if name == "splitlines" else result  # a number or a bool


def of_operator(operator: str, left: Any, right: Any, result: Any) -> Any:
    """The `result` of an operator between two values, with marks."""
    if not isinstance(result, str):
        return result
    if isinstance(result, Markup):
        return ForeignMarkup(result) if _is_foreign(left) or _is_foreign(right) else result
    if operator == "+":
        return joined((left, right))
    text, times = (left, right) if isinstance(left, str) else (right, left)
    return TracedText(result, text.foreign * times) if isinstance(text, TracedText) else result


def of_filter(name: str, value: Any, args: Sequence[Any], result: Any) -> Any:
    """The `result` of a filter that makes a text from `value`, with marks."""
    text = as_text(value)
    # no text is escaped when it is written out, so "safe" has no effect
    if name in ("safe", "string"):
        return text
    if not _is_foreign(text) and not any(map(_is_foreign, args)):
        return result
    if isinstance(result, Markup):
        return ForeignMarkup(result)
    if name == "trim" and isinstance(text, TracedText):
        return _stripped(text, "strip", args, result)
    return _same_places(text, result) if name in _SAME_PLACES else whole(result)


def percent(text: str, values: Any) -> str:
    """`text % values`. Raises TypeError and ValueError as Python does, and ValueError for a width
    of more than three digits.
    """
    rest = iter(
        values if isinstance(values, tuple) else () if isinstance(values, dict) else [values]
    )
    # literals and values alternate
    parts, start = [], 0
    for place in _PERCENT.finditer(text):
        parts.append(text[start : place.start()])
        start, name, how = place.end(), place["name"], place["how"]
        if how == "%":
            parts.append(text[start - 1 : start])
            continue
        try:
            value = next(rest) if name is None else values[name]
        except StopIteration:
            raise TypeError("not enough arguments for format string") from None
        made = f"%{how}" % (value,)
        # "%c" makes any character of a caller's number
        is_foreign = _is_foreign(value) or _is_foreign(text) or how.endswith("c")
        parts.append(value if made == value else _whole_if(is_foreign, made))
    parts.append(text[start:])
    # no "%" and no value may be left over
    if any("%" in literal for literal in parts[::2]):
        raise ValueError("unsupported format character")
    if next(rest, rest) is not rest:
        raise TypeError("not all arguments converted during string formatting")
    return joined(parts)


def traced_format(
    formatter: type[Formatter], *options: Any
) -> Callable[[str, Sequence[Any], Mapping[str, Any]], str]:
    """`text.format(…)` with marks, by a class of formatters."""

    # a formatter that collects literals and values with their marks
    class Traced(formatter):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__(*options)
            self.parts: list[str] = []

        def parse(
            self, format_string: str
        ) -> Iterator[tuple[str, str | None, str | None, str | None]]:
            for literal, *field in super().parse(format_string):
                self.parts.append(_whole_if(_is_foreign(format_string), literal))
                yield literal, *field

        def convert_field(self, value: Any, conversion: str | None) -> Any:
            converted = super().convert_field(value, conversion)
            return whole(str(converted)) if conversion else converted

        def format_field(self, value: Any, format_spec: str) -> Any:
            text = super().format_field(value, format_spec)
            self.parts.append(
                value if isinstance(value, str) and value == text else whole(str(text))
            )
            return text

    # the result is made of these parts
    def traced(text: str, args: Sequence[Any], named: Mapping[str, Any]) -> str:
        formatting = Traced()
        formatting.vformat(text, args, named)
        return joined(formatting.parts)

    return traced


def _whole_if(is_foreign: bool, text: str) -> str:
    return whole(text) if is_foreign else text


def _is_foreign(value: Any) -> bool:
    """Whether a text made from `value` may hold text of the caller."""
    return isinstance(value, TracedText | ForeignMarkup) or not isinstance(
        value, str | int | float | None
    )


def _marks(text: str) -> bytes:
    if isinstance(text, TracedText):
        return text.foreign
    return (b"\1" if isinstance(text, ForeignMarkup) else b"\0") * len(text)


def _same_places(text: str, result: str) -> TracedText:
    """`result`, whose characters replace those of `text` one by one, with the same marks. If the
    lengths differ ("ß" becomes two characters), all of the result is the caller's.
    """
    return TracedText(result, _marks(text)) if len(result) == len(text) else whole(result)


def _stripped(text: TracedText, name: str, args: Sequence[Any], result: str) -> str:
    if name in ("rstrip", "removesuffix"):
        return text[: len(result)]
    start = len(text) - len(result if name == "removeprefix" else str.lstrip(text, *args))
    return text[start : start + len(result)]


def _strided(text: str, parts: Sequence[str], between: int) -> list[str]:
    """`parts` of `text`, with marks. They lie in order, `between` characters apart."""
    if not isinstance(text, TracedText):
        return list(parts)
    cut, start = [], 0
    for part in parts:
        cut.append(text[start : start + len(part)])
        start += len(part) + between
    return cut


def _found(text: TracedText, parts: Sequence[str]) -> list[str]:
    """`parts` of `text` in order, with marks. Only separators lie between them; no part begins with
    one.
    """
    cut, start = [], 0
    for part in parts:
        start = text.find(part, start)
        cut.append(text[start : start + len(part)])
        start += len(part)
    return cut
