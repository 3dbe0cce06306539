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
from dataclasses import dataclass

from .. import _native
from ..ops.cost import OpCost

__all__ = ["WORKING_SETS", "Ceilings", "measure_ceilings"]

WORKING_SETS = tuple(1 << n for n in range(20, 31))  # 1 MiB … 1 GiB


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What `threads` threads reach at most with the kernels of `isa`."""

    isa: str
    threads: int
    read_bandwidth: dict[int, float]  # working set in bytes, rising -> bytes/s
    int8_peak: float
    float_peak: float

    def bandwidth_at(self, working_set: int) -> float:
        """Of the nearest measured working set that is not smaller, or of the largest."""
        return next(
            (rate for size, rate in self.read_bandwidth.items() if size >= working_set),
            [*self.read_bandwidth.values()][-1],
        )

    def least_seconds(self, cost: OpCost, working_set: int) -> float:
        """What an op must take, were it as fast as the machine: `working_set` is what is read again
        and again, such as all weights.
        """
        return max(self.arithmetic_seconds(cost), cost.bytes / self.bandwidth_at(working_set))

    def arithmetic_seconds(self, cost: OpCost) -> float:
        """What its FLOPs take at the peaks: the same multipliers do both kinds, one after the
        other.
        """
        return cost.int8_flops / self.int8_peak + (cost.flops - cost.int8_flops) / self.float_peak

    def is_memory_bound(self, cost: OpCost, working_set: int) -> bool:
        """Whether moving its bytes takes longer than its arithmetic."""
        return cost.bytes / self.bandwidth_at(working_set) > self.arithmetic_seconds(cost)


def measure_ceilings(
    isa: str, threads: int, *, working_sets: Sequence[int] = WORKING_SETS, seconds: float = 0.3
) -> Ceilings:
    """Measure, about `seconds` for each figure. `isa` is one that this CPU can run
    (`backends.native.backend.choose_isa`).
    """
    pool = _native.ThreadPool(threads)
    bandwidth = {
        size: _native.measure_read_bandwidth(isa, pool, size, seconds)
        for size in sorted(working_sets)
    }
    peaks = (
        _native.measure_int8_peak(isa, pool, seconds),
        _native.measure_float_peak(isa, pool, seconds),
    )
    return Ceilings(isa, threads, bandwidth, *peaks)
