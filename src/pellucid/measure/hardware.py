"""The ceilings of a processor: how fast it reads memory and how fast it multiplies, measured
(`measure/machine.py`) or from a data sheet (`DATA_SHEETS`).

The roofline of Williams et al. (CACM 2009) follows: an op takes at least as long as its FLOPs, or
its bytes, take at the ceilings. A quantized product has a lower roof than the plain peak. Each
block of 32 inputs also multiplies its integers by scales, and these multiplications use the same
units (`OpCost.scale_flops`).

Bandwidth is in bytes/s, peaks are in operations/s (a multiply-add is two).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from statistics import median
from typing import Self

from ..errors import PellucidError
from ..ops.cost import OpCost

__all__ = [
    "DATA_SHEETS",
    "MEASURED",
    "SCALE_SHARES",
    "Ceilings",
    "Range",
    "data_sheet",
    "highest_peaks",
]

MEASURED = "measured"
# multiplications by scales for each output and 32 inputs
SCALE_SHARES = {"Q4_0, Q5_0, Q8_0": 2, "Q4_1, Q4_K, Q6_K": 3}


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest, median and largest of repeated readings of one figure."""

    least: float
    median: float
    most: float
    readings: int

    @classmethod
    def of(cls, readings: Sequence[float]) -> Self:
        """The range of these readings; at least one."""
        return cls(min(readings), median(readings), max(readings), len(readings))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The ceilings of one device. Of a CPU: what `threads` threads reach together with the kernels
    of `isa`.
    """

    name: str
    source: str  # "measured", or the name of the data sheet
    read_bandwidth: Mapping[int, Range]  # working set in bytes, rising -> bytes/s
    peaks: Mapping[str, float]  # dtype ("int8", "float32", "bfloat16"…) -> operations/s
    float_dtype: str = "float32"  # the key of `peaks` for floating-point products
    memory_bytes: int = 0  # 0: unknown
    link_bandwidth: float = 0.0  # to another device, one direction; 0: unknown
    isa: str = ""  # of the native backend's kernels
    threads: int = 0
    barrier_seconds: float = 0.0  # until all threads have met; 0: unknown
    disk_bandwidth: float = 0.0  # of reading a model's file; 0: unknown

    @property
    def is_measured(self) -> bool:
        return self.source == MEASURED

    @property
    def int8_peak(self) -> float:
        return self.peaks["int8"]

    @property
    def float_peak(self) -> float:
        """The peak of `float_dtype`."""
        return self.peaks[self.float_dtype]

    def bandwidth_range(self, working_set: int) -> Range:
        """The range at the nearest measured working set that is not smaller, or at the largest."""
        return next(
            (rate for size, rate in self.read_bandwidth.items() if size >= working_set),
            [*self.read_bandwidth.values()][-1],
        )

    def bandwidth_at(self, working_set: int) -> float:
        """The largest reading: the ceiling. A prediction uses the median of `bandwidth_range`."""
        return self.bandwidth_range(working_set).most

    def arithmetic_seconds(self, cost: OpCost, *, scales: bool = True) -> float:
        """The time that its FLOPs take at the peaks. Products of bytes and of floating point share
        the multipliers, so their times add up; only AMX's tiles are a separate unit. Without
        `scales`, multiplications by the scales of quantized weights are left out: this is the plain
        peak.
        """
        of_bytes = cost.int8_flops / self.int8_peak
        of_scales = cost.scale_flops / self.float_peak if scales else 0.0
        of_floats = (cost.flops - cost.int8_flops) / self.float_peak
        if self.isa == "amx":
            return max(of_bytes, of_scales) + of_floats
        return of_bytes + of_scales + of_floats

    def int8_share(self, scale_products: int) -> float:
        """The share of the int8 peak that a product of quantized weights can reach, with so many
        multiplications by scales for each output and 32 inputs (on Zen 4 8/10 or 8/11).
        """
        block = OpCost(64, 0, 0, int8_flops=64, scale_flops=2 * scale_products)
        return self.arithmetic_seconds(block, scales=False) / self.arithmetic_seconds(block)

    def least_seconds(self, cost: OpCost, working_set: int, *, scales: bool = True) -> float:
        """The shortest time that the device allows for an op. `working_set` is the memory that is
        read again and again, such as all weights.
        """
        return max(
            self.arithmetic_seconds(cost, scales=scales),
            cost.bytes / self.bandwidth_at(working_set),
        )

    def is_memory_bound(self, cost: OpCost, working_set: int) -> bool:
        """Whether moving its bytes takes longer than its arithmetic."""
        return cost.bytes / self.bandwidth_at(working_set) > self.arithmetic_seconds(cost)


def highest_peaks(readings: Sequence[Ceilings]) -> Mapping[str, float]:
    """The highest reading of each peak: other work only lowers one."""
    return {name: max(r.peaks[name] for r in readings) for name in readings[0].peaks}


def _sheet(
    name: str,
    source: str,
    gigabytes: int,
    bandwidth: float,
    teraops: Mapping[str, float],
    link: float = 0.0,
    float_dtype: str = "bfloat16",
) -> Ceilings:
    """A device from its data sheet: memory in GB, bandwidth and link in GB/s, peaks in 10^12
    operations/s without sparsity.
    """
    rate = bandwidth * 1e9
    return Ceilings(
        name=name,
        source=source,
        read_bandwidth={gigabytes * 10**9: Range(rate, rate, rate, 1)},
        peaks={dtype: peak * 1e12 for dtype, peak in teraops.items()},
        float_dtype=float_dtype,
        memory_bytes=gigabytes * 10**9,
        link_bandwidth=link * 1e9,
    )


_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"

# By the name that a user types. Peaks are dense, with sums in float32 if the sheet has both. CPUs:
# bandwidth of all memory channels; peaks are cores × clock × what a core starts per cycle.
DATA_SHEETS: Mapping[str, Ceilings] = {
    "t4": _sheet(
        "NVIDIA T4",
        "NVIDIA T4 data sheet",
        *(16, 320, {"float16": 65, "int8": 130, "float32": 8.1}, 16, "float16"),
    ),
    "rtx3090": _sheet(
        "NVIDIA GeForce RTX 3090",
        _AMPERE,
        *(24, 936, {"bfloat16": 71, "float16": 71, "int8": 284, "float32": 35.6}, 32),
    ),
    "rtx4070": _sheet(
        "NVIDIA GeForce RTX 4070",
        _ADA,
        *(12, 504, {"bfloat16": 58.3, "float16": 58.3, "int8": 233.2, "float32": 29.15}, 32),
    ),
    "rtx4090": _sheet(
        "NVIDIA GeForce RTX 4090",
        _ADA,
        *(24, 1008, {"bfloat16": 165.2, "float16": 165.2, "int8": 660.6, "float32": 82.6}, 32),
    ),
    "rtx5090": _sheet(
        "NVIDIA GeForce RTX 5090",
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A",
        *(32, 1792, {"bfloat16": 209.5, "float16": 209.5, "int8": 838, "float32": 104.8}, 64),
    ),
    "l4": _sheet(
        "NVIDIA L4",
        "NVIDIA L4 data sheet (half of the figures with sparsity)",
        *(24, 300, {"bfloat16": 121, "float16": 121, "int8": 242.5, "float32": 30.3}, 32),
    ),
    "l40s": _sheet(
        "NVIDIA L40S",
        "NVIDIA L40S data sheet",
        *(48, 864, {"bfloat16": 362.05, "float16": 362.05, "int8": 733, "float32": 91.6}, 32),
    ),
    "a100": _sheet(
        "NVIDIA A100 SXM 80 GB",
        "NVIDIA A100 data sheet",
        *(80, 2039, {"bfloat16": 312, "float16": 312, "int8": 624, "float32": 19.5}, 300),
    ),
    "h100": _sheet(
        "NVIDIA H100 SXM",
        "NVIDIA H100 data sheet (half of the figures with sparsity)",
        *(80, 3350, {"bfloat16": 989.5, "float16": 989.5, "int8": 1979, "float32": 67}, 450),
    ),
    "h200": _sheet(
        "NVIDIA H200 SXM",
        "NVIDIA H200 data sheet (half of the figures with sparsity)",
        *(141, 4800, {"bfloat16": 989.5, "float16": 989.5, "int8": 1979, "float32": 67}, 450),
    ),
    "mi300x": _sheet(
        "AMD Instinct MI300X",
        "AMD Instinct MI300X data sheet",
        *(192, 5300, {"bfloat16": 1307.4, "float16": 1307.4, "int8": 2614.9, "float32": 163.4}),
        448,
    ),
    "mi355x": _sheet(
        "AMD Instinct MI355X",
        "AMD Instinct MI355X data sheet",
        *(288, 8000, {"bfloat16": 2516.6, "float16": 2516.6, "int8": 5033.2, "float32": 157.3}),
        537,
    ),
    "epyc9654": _sheet(
        "AMD EPYC 9654 (96 cores)",
        "AMD EPYC 9654 product page; 3.55 GHz on all cores, 2 × 256-bit products per cycle",
        *(6000, 460.8, {"int8": 43.6, "float32": 10.9}, 0, "float32"),
    ),
    "xeon8480": _sheet(
        "Intel Xeon Platinum 8480+ (56 cores)",
        "Intel ARK; base clock of 2.0 GHz, AMX and 2 × 512-bit products per cycle",
        *(4000, 307.2, {"int8": 229.4, "bfloat16": 114.7, "float32": 7.17}, 0, "float32"),
    ),
    "ryzen7950x": _sheet(
        "AMD Ryzen 9 7950X (16 cores)",
        "AMD Ryzen 9 7950X product page; base clock of 4.5 GHz, 2 × 256-bit products per cycle",
        *(128, 83.2, {"int8": 9.22, "float32": 2.30}, 0, "float32"),
    ),
}


def data_sheet(name: str) -> Ceilings:
    """The device of this name ("h100", "RTX 4070", "mi300x"). Raises PellucidError."""
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    try:
        return DATA_SHEETS[plain]
    except KeyError:
        near = get_close_matches(plain, DATA_SHEETS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PellucidError(
            f"hardware {name!r} is unknown: it can be {', '.join(DATA_SHEETS)}{hint}"
        ) from None
