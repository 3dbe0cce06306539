"""The options of the native backend, as plain data."""

from dataclasses import dataclass

from ...checks import check_fields, option

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the kernels run on this machine."""

    isa: str | None = option(
        None, low=1, high=64, help="Instruction set of the kernels; None: the best of this CPU"
    )
    threads: int | None = option(
        None,
        low=1,
        high=256,
        help="Threads to compute with; None: the CPUs that this process may use",
    )

    def __post_init__(self) -> None:
        check_fields(self)
