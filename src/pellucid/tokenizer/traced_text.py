"""A text that knows who wrote each of its characters: the model's chat template, or the caller
whose messages it renders.

It is a str with a mark per character. It compares, hashes and searches as the str that it is, so a
template runs as it would without marks. `provenance.py` says what each operation of a template does
to the marks. Any other operation gives a plain str.
"""

from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex

__all__ = ["CALLER", "CONTINUED", "TracedText", "foreign", "whole"]

CALLER = 1  # the mark of what the caller wrote
CONTINUED = 2  # the caller's too: the text of a final message that the model is to continue


class TracedText(str):
    """A text, and a byte for each of its characters: 0 where the template wrote it."""

    foreign: bytes

    def __new__(cls, text: str, foreign: bytes) -> "TracedText":
        self = super().__new__(cls, text)
        self.foreign = foreign
        return self

    @property
    def plain(self) -> str:
        """The text alone. A copy: it takes time in proportion to the length."""
        return str.__str__(self)

    def __str__(self) -> str:
        return self  # str(x) is all over Jinja, and must not take the marks off

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        marks = self.foreign[key]
        return TracedText(
            super().__getitem__(key), marks if isinstance(marks, bytes) else bytes((marks,))
        )

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def foreign(value: Any) -> Any:
    """Plain data with every text in it marked as the caller's."""
    if isinstance(value, TracedText):
        return value
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, Mapping):
        return {foreign(key): foreign(item) for key, item in value.items()}
    return [foreign(item) for item in value] if isinstance(value, list) else value


def whole(text: str, mark: int = CALLER) -> TracedText:
    """A text that has one mark from end to end."""
    return TracedText(text, bytes((mark,)) * len(text))
