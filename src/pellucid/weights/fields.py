"""Typed reading of what a file says about a model: JSON objects and GGUF metadata alike.

A field has the expected type or is refused by its name. `Fields` remembers which fields were read,
so that a reader of configs can check the others at the end (`unread`) and drops none in silence.
Values are untrusted: nothing is coerced, and numbers must be finite.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ..config import MAX_LAYERS
from ..errors import ConfigError, FormatError

__all__ = ["Fields", "config_from_file"]

T = TypeVar("T", int, float, str)
MAX_TEXT = 100


class Fields:
    """The fields of one mapping. `where` begins every message; names are looked up with `prefix`
    before them. A null counts as absent.
    """

    def __init__(self, where: str, values: Mapping[str, object], prefix: str = "") -> None:
        self.where = where
        self._values = values
        self._prefix = prefix
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the field exists; it may be null."""
        return self._prefix + name in self._values

    def value(self, name: str) -> object:
        """The value of a field that may be of several types; None if it is absent."""
        self._read.add(self._prefix + name)
        return self._values.get(self._prefix + name)

    def unread(self) -> list[str]:
        """The fields with this prefix that were not read, in order, without the prefix."""
        return [
            key[len(self._prefix) :]
            for key in self._values
            if key.startswith(self._prefix) and key not in self._read
        ]

    def optional_integer(self, name: str) -> int | None:
        """An integer. GGUF may have a list with a value per layer; a list of equal values counts as
        one value.
        """
        value = self.value(name)
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str | bytes)
            and 0 < len(value) <= MAX_LAYERS
        ):
            if any(v != value[0] for v in value):
                raise self.error(name, "a list whose values differ; layers must be alike")
            value = value[0]
        if value is None or (
            isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
        ):
            return value
        raise self.error(name, f"{_show(value)}; it must be an integer of 64 bits")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.optional_integer(name)
        return value if value is not None else self._default(name, default)

    def optional_number(self, name: str) -> float | None:
        """A finite number; it may be written as an integer."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, int | float) and _is_finite(value):
            return float(value)
        raise self.error(name, f"{_show(value)}; it must be a finite number")

    def number(self, name: str, default: float | None = None) -> float:
        value = self.optional_number(name)
        return value if value is not None else self._default(name, default)

    def numbers(self, name: str, limit: int) -> list[float]:
        """A list of finite numbers, at most `limit` of them."""
        value = self.value(name)
        if isinstance(value, list) and len(value) <= limit:
            if all(_is_finite(v) for v in value):
                return [float(v) for v in value]
            raise self.error(name, "a list with other things than finite numbers in it")
        if value is None:
            raise self.error(name, "missing")
        raise self.error(name, f"{_show(value)}; it must be a list of at most {limit} numbers")

    def flag(self, name: str, default: bool) -> bool:
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        raise self.error(name, f"{_show(value)}; it must be true or false")

    def optional_text(self, name: str) -> str | None:
        """A short string."""
        value = self.value(name)
        if value is None or (isinstance(value, str) and len(value) <= MAX_TEXT):
            return value
        raise self.error(
            name, f"{_show(value)}; it must be a string of at most {MAX_TEXT} characters"
        )

    def text(self, name: str, default: str | None = None) -> str:
        value = self.optional_text(name)
        return value if value is not None else self._default(name, default)

    def optional_texts(self, name: str) -> list[str] | None:
        """A list of short strings."""
        value = self.value(name)
        if value is None:
            return None
        if (
            isinstance(value, list)
            and len(value) <= MAX_LAYERS
            and all(isinstance(v, str) and len(v) <= MAX_TEXT for v in value)
        ):
            return value
        raise self.error(name, f"{_show(value)}; it must be a list of at most {MAX_LAYERS} strings")

    def section(self, name: str) -> "Fields | None":
        """The fields of an object within this one."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, Mapping):
            return Fields(f"{self.where}: {name}", value)
        raise self.error(name, f"{_show(value)}; it must be an object")

    def error(self, name: str, problem: str) -> FormatError:
        """The error for the field `name`."""
        return FormatError(f"{self.where}: {self._prefix}{name} is {problem}")

    def _default(self, name: str, default: T | None) -> T:
        if default is None:
            raise self.error(name, "missing")
        return default


def _is_finite(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )


def _show(value: object) -> str:
    """A value as messages show it: at most one line."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return "an object" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def config_from_file(where: str) -> Iterator[None]:
    """For building a config from a file's fields: turns ConfigError into a FormatError that names
    the file.
    """
    try:
        yield
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from error
