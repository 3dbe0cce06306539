"""The options of the native backend, as plain data."""

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """None: chosen from what this machine has."""

    isa: str | None = None  # the kernels' instruction set; None: the best that the CPU has
    threads: int | None = None  # None: as many as the CPUs that this process may use
