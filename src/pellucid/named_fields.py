"""Parameter classes whose constructor answers a wrong name with a sentence.

    @named_fields("sampling parameter", elsewhere={"best_of": "n answers are returned, …"})
    @dataclass(slots=True, kw_only=True)
    class SamplingParams: …

Python's own error for `SamplingParams(best_of=2)` is a TypeError without the names that exist.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .checks import show, unknown_name
from .errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["check_names", "named_fields"]

_T = TypeVar("_T", bound="DataclassInstance")


def named_fields(
    what: str, elsewhere: Mapping[str, str] | None = None
) -> Callable[[type[_T]], type[_T]]:
    """A decorator for a dataclass of keywords. Its constructor raises ConfigError for a name that
    is no field, and for a value without a name. `elsewhere`: see `unknown_name`.
    """

    def decorate(kind: type[_T]) -> type[_T]:
        build = kind.__init__
        names = _TOLD[kind] = _Names(what, tuple(kind.__dataclass_fields__), elsewhere)

        @functools.wraps(build)
        def __init__(self: _T, *values: object, **given: Any) -> None:
            if values:
                raise ConfigError(
                    f"{kind.__name__} is given {show(values[0])} without a name; write "
                    f"{kind.__name__}({names.known[0]}=…)"
                )
            names.check(given)
            build(self, **given)

        kind.__init__ = __init__  # type: ignore[assignment]
        return kind

    return decorate


def check_names(kind: type, given: Iterable[str]) -> None:
    """Raise ConfigError for the first name that is no field of `kind`, a class with named
    fields.
    """
    _TOLD[kind].check(given)


class _Names(NamedTuple):
    """The names of a class, and what to say about others."""

    what: str
    known: tuple[str, ...]
    elsewhere: Mapping[str, str] | None

    def check(self, given: Iterable[str]) -> None:
        for name in given:
            if name not in self.known:
                raise ConfigError(unknown_name(self.what, name, self.known, self.elsewhere))


_TOLD: dict[type, _Names] = {}
