"""Backends by name. A backend's library is imported when it is asked for, and never before.

A name that is not known is refused with the list of those that are: nothing falls back to another backend.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..errors import ConfigError
from ..ops.protocol import Backend

__all__ = ["BACKENDS", "get_backend"]


def _reference() -> Backend:
    from .reference.backend import ReferenceBackend

    return ReferenceBackend()


BACKENDS: Mapping[str, Callable[[], Backend]] = MappingProxyType({"reference": _reference})


def get_backend(name: str) -> Backend:
    """Build the backend called `name`, with no weights and no caches yet."""
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; it must be one of: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]()
