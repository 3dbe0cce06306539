"""The ceilings of this machine, measured: how fast it reads memory, and how fast it multiplies
bytes and float32.

A measured speed is told as a share of these. Reading depends on the working set (from L2, from L3,
from memory), so it is measured at several sizes. Multiplying is measured with the instructions of
one set of kernels, from registers: of bytes, as linear layers of quantized weights do, and of
float32, as attention and all else does. The loops are csrc/kernels/ceilings.inc. The best of several
tries counts, so that a busy neighbour lowers a ceiling little. By the roofline of Williams et al.
(CACM 2009), an op takes at least as long as its FLOPs, or its bytes, take at the ceilings.

Bandwidth is in bytes/s, `int8_peak` and `float_peak` in operations/s (a multiply-add is two).
Measuring takes the seconds that are asked for and keeps every thread busy: nobody else should
measure at the same time.
"""

from collections.abc import Sequence

from .. import _native
from ..cpu import detect_cpu
from .hardware import MEASURED, Ceilings, Range

__all__ = ["WORKING_SETS", "measure_ceilings"]

WORKING_SETS = tuple(1 << n for n in range(20, 31))  # 1 MiB … 1 GiB


def measure_ceilings(
    isa: str, threads: int, *, working_sets: Sequence[int] = WORKING_SETS, seconds: float = 0.3
) -> Ceilings:
    """Measure, about `seconds` for each figure. `isa` is one that this CPU can run
    (`backends.native.backend.choose_isa`).
    """
    pool = _native.ThreadPool(threads)
    return Ceilings(
        name=detect_cpu().name,
        source=MEASURED,
        read_bandwidth={
            size: Range.of([_native.measure_read_bandwidth(isa, pool, size, seconds)])
            for size in sorted(working_sets)
        },
        peaks={
            "int8": _native.measure_int8_peak(isa, pool, seconds),
            "float32": _native.measure_float_peak(isa, pool, seconds),
        },
        isa=isa,
        threads=threads,
    )
