"""The options of the reference backend: it has none, since NumPy's BLAS decides how it computes."""

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """No options."""
