"""A text that records who wrote each of its characters: the model's chat template, or the caller
whose messages it renders.

It is a str with a mark per character. It compares, hashes and searches like a plain str, so marks
do not change how a template runs. `provenance.py` defines what each operation of a template does to
the marks. Any other operation gives a plain str.
"""

from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex

__all__ = ["CALLER", "CONTINUED", "TracedText", "foreign", "whole"]

CALLER = 1  # the mark of the caller's characters
CONTINUED = 2  # also the caller's: the text of a final message that the model continues


class TracedText(str):
    """A text with a byte for each of its characters: 0 if the template wrote it."""

    foreign: bytes

    def __new__(cls, text: str, foreign: bytes) -> "TracedText":
        self = super().__new__(cls, text)
        self.foreign = foreign
        return self

    @property
    def plain(self) -> str:
        """A copy of the text without marks. Takes time in proportion to its length."""
        return str.__str__(self)

    def __str__(self) -> str:
        return self  # Jinja calls str(x) everywhere, and that must keep the marks

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        marks = self.foreign[key]
        return TracedText(
            super().__getitem__(key), marks if isinstance(marks, bytes) else bytes((marks,))
        )

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def foreign(value: Any) -> Any:
    """A copy of plain data in which every text is marked as the caller's."""
    if isinstance(value, TracedText):
        return value
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, Mapping):
        return {foreign(key): foreign(item) for key, item in value.items()}
    return [foreign(item) for item in value] if isinstance(value, list) else value


def whole(text: str, mark: int = CALLER) -> TracedText:
    """A text in which every character has this mark."""
    return TracedText(text, bytes((mark,)) * len(text))
