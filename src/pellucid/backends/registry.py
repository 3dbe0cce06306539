"""Backends by name. A backend's library is imported when it is asked for, and never before.

A name that is not known is refused with the list of those that are: nothing falls back to another
backend.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..errors import ConfigError
from ..ops.protocol import Backend

__all__ = ["BACKENDS", "get_backend"]


def _native(isa: str | None, threads: int | None) -> Backend:
    from .native.backend import NativeBackend

    return NativeBackend(isa, threads)


def _reference(isa: str | None, threads: int | None) -> Backend:
    from .reference.backend import ReferenceBackend

    if isa is not None or threads is not None:
        raise ConfigError(
            "the reference backend computes with NumPy's BLAS; isa and threads are options of the "
            "native backend"
        )
    return ReferenceBackend()


BACKENDS: Mapping[str, Callable[[str | None, int | None], Backend]] = MappingProxyType(
    {"native": _native, "reference": _reference}
)


def get_backend(name: str, *, isa: str | None = None, threads: int | None = None) -> Backend:
    """Build the backend called `name`, with no weights and no caches yet."""
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; it must be one of: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name](isa, threads)
