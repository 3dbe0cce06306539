"""Measures the ceilings of this machine: how fast it reads memory, and how fast it multiplies bytes
and float32.

Speeds are reported as a share of these ceilings. The speed of reading depends on the working set
(in L2, in L3, in memory), so it is measured at several sizes. Multiplication is measured from
registers, with the instructions of one set of kernels: of bytes, as in linear layers of quantized
weights, and of float32, as in attention and everything else. The loops are
csrc/kernels/ceilings.inc. The best of several tries counts, so that a busy neighbour lowers a
ceiling little. By the roofline of Williams et al. (CACM 2009), an op takes at least as long as its
FLOPs, or its bytes, take at the ceilings.

Bandwidth is in bytes/s, `int8_peak` and `float_peak` in operations/s (a multiply-add is two).
Measuring keeps every thread busy for the given seconds, so only one process should measure at a
time.
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
    """Measure the ceilings, in about `seconds` for each figure. This CPU must be able to run `isa`
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
