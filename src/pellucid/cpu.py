"""The instruction sets of this CPU, by which kernels are chosen at run time.

A feature counts only if the CPU has it *and* the operating system saves its registers (XCR0 on x86,
the auxiliary vector on Arm). C++ reads both (csrc/cpu_features*.cpp), compiled for the baseline of
the architecture. A process must also request AMX's tiles before it uses them; this module requests
nothing.

Names of features are Linux's on x86 ("avx2", "avx512_vnni", "amx_int8"), and the usual short words
on Arm ("neon", "dotprod", "i8mm").
"""

from dataclasses import dataclass

from . import _native

__all__ = ["CPU", "detect_cpu"]


@dataclass(frozen=True, slots=True)
class CPU:
    """One kind of processor, as this process may use it."""

    architecture: str  # "x86_64", "aarch64", or "unknown": there only portable code runs
    name: str  # by its vendor; "" if the machine does not report it
    features: tuple[str, ...]  # from the oldest to the newest

    def __str__(self) -> str:
        return (
            f"{self.name or 'unnamed CPU'} "
            f"({self.architecture}: {' '.join(self.features) or 'baseline'})"
        )


def detect_cpu() -> CPU:
    """The processor that runs this process."""
    features = tuple(name for name, usable in _native.cpu_features().items() if usable)
    return CPU(_native.cpu_architecture(), _native.cpu_name(), features)
