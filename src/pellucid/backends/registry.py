"""Backends by name, and the options of each. A backend is imported when it is first chosen.

The error for an unknown name lists the known names. There is no fallback to another backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .native.options import Options as NativeOptions
from .reference.options import Options as ReferenceOptions

if TYPE_CHECKING:  # importing this module loads no array library
    from ..ops.backend import Backend

__all__ = ["BACKENDS", "BackendKind", "backend_kind", "get_backend"]


def _native(options: NativeOptions) -> "Backend":
    from .native.backend import NativeBackend

    return NativeBackend(options.isa, options.threads)


def _reference(options: ReferenceOptions) -> "Backend":
    from .reference.backend import ReferenceBackend

    return ReferenceBackend()


@dataclass(frozen=True, slots=True)
class BackendKind:
    """How to build a backend: the dataclass of its options, and a function of such options."""

    options: type[Any]
    build: Callable[[Any], "Backend"]

    @property
    def option_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.options))


BACKENDS: Mapping[str, BackendKind] = MappingProxyType(
    {
        "native": BackendKind(NativeOptions, _native),
        "reference": BackendKind(ReferenceOptions, _reference),
    }
)


def backend_kind(name: str) -> BackendKind:
    """How to build the backend called `name`. Raises ConfigError if there is none."""
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; it must be one of: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]


def get_backend(name: str, options: Mapping[str, object] | None = None) -> "Backend":
    """Build the backend called `name`, with no weights and no caches yet. Raises ConfigError if the
    name or an option is unknown, or if it cannot be built with these options.
    """
    kind = backend_kind(name)
    known = kind.option_names
    for option in options or {}:
        if option not in known:
            import difflib  # only this error needs it

            near = difflib.get_close_matches(option, known, 1)
            raise ConfigError(
                f"the {name} backend has no option {option!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + (f" Its options are: {', '.join(known)}" if known else "; it has no options")
            )
    return kind.build(kind.options(**(options or {})))
