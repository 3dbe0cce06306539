"""Measures this machine: read bandwidth, peaks of each instruction set, the cost of a barrier and
the read rate of the disk. Measured speeds are compared with these ceilings.

Reading depends on the working set (from L2, from L3, from memory) and on the number of threads.
Peaks are measured with the instructions of each set of kernels, in registers: products of bytes, as
in linear layers of quantized weights, and of float32, as in attention and all other ops. The loops
are csrc/kernels/ceilings.inc.

A shared machine's bandwidth may change by a factor of two within seconds. So every figure is a
range of readings, and the readings of all figures are taken in turns. A benchmark does the same
with a `ReadMeter`: it takes a reading before each round of its own work.

Bandwidth is in bytes/s, peaks are in operations/s (a multiply-add is two). Measuring keeps every
thread busy: run only one measurement at a time.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from .. import _native
from ..backends.native.backend import ISAS, available_cpus
from ..cpu import detect_cpu
from ..errors import FormatError, PellucidError
from ..files import publish, read_json
from ..host_memory import available_memory
from ..weights.catalogue import default_cache_dir
from .hardware import MEASURED, Ceilings, Range

__all__ = [
    "WORKING_SETS",
    "Machine",
    "ReadMeter",
    "default_machine_file",
    "fingerprint",
    "load_machine",
    "machine_json",
    "measure_ceilings",
    "measure_machine",
    "save_machine",
]

WORKING_SETS = tuple(1 << n for n in range(20, 33))  # 1 MiB … 4 GiB
DISK_BYTES = 128 << 20
READING_SECONDS = 0.015
LEAST_ROUNDS, MOST_ROUNDS = 3, 25
LARGE = 256 << 20  # larger working sets are read only with one thread and with all threads
BARRIERS = 2000
MAX_FILE_BYTES = 1 << 20
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
PEAKS = {"int8": _native.measure_int8_peak, "float32": _native.measure_float_peak}


class ReadMeter:
    """Readings of the read bandwidth of one working set, taken between the rounds of a benchmark:

        meter = ReadMeter(backend.isa, backend.threads, weight_bytes)
        for _ in range(rounds):
            meter.take()
            seconds = work()
        meter.range  # least, median, most

    Holds as much memory as the working set.
    """

    def __init__(self, isa: str, threads: int, working_set: int, *, seconds: float = 0.06) -> None:
        self.readings: list[float] = []
        self.working_set = working_set
        self._isa, self._seconds = isa, seconds
        self._pool = _native.ThreadPool(threads)
        self._buffer = _native.ReadBuffer(self._pool, working_set)

    def take(self) -> float:
        """One more reading, in bytes/s."""
        rate = self._buffer.read(self._isa, self._pool, self.working_set, self._seconds)
        self.readings.append(rate)
        return rate

    @property
    def range(self) -> Range:
        """Of all readings so far, at least one."""
        return Range.of(self.readings)

    def applied_to(self, ceilings: Ceilings) -> Ceilings:
        """`ceilings` with the bandwidth that was read here."""
        return replace(ceilings, read_bandwidth={self.working_set: self.range})


def measure_ceilings(
    isa: str, threads: int, *, working_sets: Sequence[int] = WORKING_SETS, seconds: float = 0.3
) -> Ceilings:
    """Measure, about `seconds` for each figure. `isa` is one that this CPU can run
    (`backends.native.backend.choose_isa`).
    """
    pool = _native.ThreadPool(threads)
    buffer = _native.ReadBuffer(pool, max(working_sets))
    return Ceilings(
        name=detect_cpu().name,
        source=MEASURED,
        read_bandwidth={
            size: Range.of([buffer.read(isa, pool, size, seconds / 5) for _ in range(5)])
            for size in sorted(working_sets)
        },
        peaks={dtype: measure(isa, pool, seconds) for dtype, measure in PEAKS.items()},
        isa=isa,
        threads=threads,
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, measured. All figures are ranges of readings that were taken in turns."""

    fingerprint: Mapping[str, str]
    measured_at: str  # local time, ISO 8601
    seconds: float  # taken by the measurement
    memory_bytes: int
    read_bandwidth: Mapping[int, Mapping[int, Range]]  # threads -> working set in bytes -> bytes/s
    peaks: Mapping[str, Mapping[int, Mapping[str, Range]]]  # isa -> threads -> dtype -> op/s
    barrier_seconds: Mapping[int, Range]  # threads -> seconds
    disk_bandwidth: Range | None  # bytes/s; None: the system cannot drop a file from its cache

    def ceilings(self, isa: str, threads: int) -> Ceilings:
        """The ceilings for the largest measured number of threads up to `threads`."""
        if isa not in self.peaks:
            raise PellucidError(f"isa {isa!r} was not measured: it can be {', '.join(self.peaks)}")
        count = max(n for n in self.read_bandwidth if n <= max(threads, 1))
        return Ceilings(
            name=self.fingerprint["cpu"],
            source=MEASURED,
            read_bandwidth=self.read_bandwidth[count],
            peaks={dtype: rate.most for dtype, rate in self.peaks[isa][count].items()},
            memory_bytes=self.memory_bytes,
            isa=isa,
            threads=count,
            barrier_seconds=self.barrier_seconds[count].median if count > 1 else 0.0,
            disk_bandwidth=0.0 if self.disk_bandwidth is None else self.disk_bandwidth.median,
        )


def measure_machine(
    *,
    seconds: float = 16.0,
    working_sets: Sequence[int] = WORKING_SETS,
    folder: Path | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Machine:
    """Measure everything in about `seconds` (some more on a machine of many threads). Files are
    read in `folder`; None: where models are kept. `progress` is told the share that is done.
    """
    start = time.monotonic()
    memory = available_memory()
    threads = _thread_counts(available_cpus())
    sizes = [size for size in sorted(working_sets) if size <= memory // 2] or [min(working_sets)]
    figures = _figures(threads, sizes)
    readings: dict[tuple[str | int, ...], list[float]] = {key: [] for key in figures}
    # go round all figures, so that a disturbance of some seconds affects each of them
    for done in range(MOST_ROUNDS):
        share = (time.monotonic() - start) / seconds
        if done >= LEAST_ROUNDS and share >= 1:
            break
        progress(min(max(share, done / MOST_ROUNDS), 1.0))
        for key, take in figures.items():
            readings[key].append(take())
    found = {key: Range.of(values) for key, values in readings.items()}
    disk = _disk_bandwidth(default_cache_dir() if folder is None else folder)
    progress(1.0)

    # by what was measured
    return Machine(
        fingerprint=fingerprint(),
        measured_at=time.strftime(TIME_FORMAT),
        seconds=round(time.monotonic() - start, 1),
        memory_bytes=memory,
        read_bandwidth={
            n: {size: found["read", n, size] for size in sizes if ("read", n, size) in found}
            for n in threads
        },
        peaks={
            isa: {n: {dtype: found["peak", isa, n, dtype] for dtype in PEAKS} for n in threads}
            for isa in _usable_isas()
        },
        barrier_seconds={n: found["barrier", n] for n in threads if n > 1},
        disk_bandwidth=disk,
    )


def _thread_counts(cpus: int) -> list[int]:
    """1, 2, 4 … and all."""
    return sorted({1 << n for n in range(cpus.bit_length()) if 1 << n < cpus} | {cpus})


def _usable_isas() -> list[str]:
    """The instruction sets of kernels that this CPU can run, the best first."""
    features = set(detect_cpu().features)
    return [isa for isa, needs in ISAS.items() if needs <= features]


def _figures(
    threads: Sequence[int], sizes: Sequence[int]
) -> dict[tuple[str | int, ...], Callable[[], float]]:
    """The figures to measure, each with a function that takes one reading."""
    pools = {n: _native.ThreadPool(n) for n in threads}
    buffer = _native.ReadBuffer(pools[max(threads)], max(sizes))
    isas = _usable_isas()
    figures: dict[tuple[str | int, ...], Callable[[], float]] = {}
    for n, pool in pools.items():
        for size in sizes:
            if size <= LARGE or n in (1, max(threads)):
                figures["read", n, size] = partial(
                    buffer.read, isas[0], pool, size, READING_SECONDS
                )
        for isa in isas:
            for dtype, measure in PEAKS.items():
                figures["peak", isa, n, dtype] = partial(measure, isa, pool, READING_SECONDS)
        if n > 1:
            figures["barrier", n] = partial(_native.measure_barrier, pool, BARRIERS)
    return figures


def _disk_bandwidth(folder: Path) -> Range | None:
    """The rate of reading a file that is not in the system's cache. Writes a temporary file in
    `folder` and deletes it. The host of a virtual machine may still have it in its cache.
    """
    if sys.platform != "linux":  # elsewhere the cache cannot be dropped
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(folder)
        size = min(DISK_BYTES, disk.f_bavail * disk.f_frsize // 4) >> 20 << 20
        if not size:
            return None
        with tempfile.TemporaryFile(dir=folder) as file:
            # incompressible: some file systems compress
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            return Range.of([size / _read_seconds(file.fileno(), size) for _ in range(3)])
    except OSError:  # a folder of another user, or a full disk
        return None


def _read_seconds(fd: int, size: int) -> float:
    """Seconds of reading the file from its start, not from the page cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    room = memoryview(bytearray(4 << 20))
    start = time.perf_counter()
    for offset in range(0, size, len(room)):
        os.preadv(fd, [room], offset)
    return time.perf_counter() - start


def fingerprint() -> dict[str, str]:
    """The properties on which the figures depend. If one differs, the machine is measured again."""
    cpu = detect_cpu()
    return {
        "cpu": cpu.name,
        "features": " ".join(cpu.features),
        "usable_cpus": str(available_cpus()),
        "system": f"{platform.system()} {platform.release()}",
        "kernels": _kernels(),
    }


@cache
def _kernels() -> str:
    """A hash of the module with the kernels. It takes 3 ms, and the module stays the same."""
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:16]


def default_machine_file() -> Path:
    """~/.cache/pellucid/machine.json, beside the folder of models."""
    return default_cache_dir().parent / "machine.json"


def save_machine(machine: Machine, path: Path) -> None:
    """Write what was measured. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        scratch = Path(folder) / path.name
        scratch.write_text(machine_json(machine))
        publish(scratch, path)


def machine_json(machine: Machine) -> str:
    """One JSON object; numbers of threads and sizes are its keys."""
    return json.dumps(asdict(machine))


def load_machine(path: Path) -> Machine:
    """What was measured before. Raises PellucidError, with the reason, if there is none or if it is
    of another machine.
    """
    if not path.is_file():
        raise PellucidError("this machine was not measured yet")
    try:
        fields: Mapping[str, Any] = read_json(path, MAX_FILE_BYTES)
        kept = {str(name): str(value) for name, value in fields["fingerprint"].items()}
        changed = [name for name, value in fingerprint().items() if kept.get(name) != value]
        machine = None if changed else _machine_from(fields, kept)
    except (FormatError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise PellucidError(f"{path} cannot be used: {reason}") from None
    if machine is None:
        raise PellucidError(f"the machine has changed since it was measured: {', '.join(changed)}")
    return machine


def _machine_from(fields: Mapping[str, Any], kept: Mapping[str, str]) -> Machine:
    """The figures in the file of a machine, checked: a later division by one of them must not fail.
    `kept` is its fingerprint. Raises KeyError, TypeError, ValueError or AttributeError.
    """

    def ranges(by: Mapping[str, Any]) -> dict[int, Range]:
        return {int(key): _checked_range(value) for key, value in by.items()}

    time.strptime(fields["measured_at"], TIME_FORMAT)
    disk = fields["disk_bandwidth"]
    machine = Machine(
        fingerprint=kept,
        measured_at=fields["measured_at"],
        seconds=float(fields["seconds"]),
        memory_bytes=int(fields["memory_bytes"]),
        read_bandwidth={int(n): ranges(by) for n, by in fields["read_bandwidth"].items()},
        peaks={
            isa: {
                int(n): {dtype: _checked_range(value) for dtype, value in rates.items()}
                for n, rates in by.items()
            }
            for isa, by in fields["peaks"].items()
        },
        barrier_seconds=ranges(fields["barrier_seconds"]),
        disk_bandwidth=None if disk is None else _checked_range(disk),
    )
    # Each number of threads has every figure, and the sizes rise.
    threads = list(machine.read_bandwidth)
    if threads != _thread_counts(available_cpus()):
        raise ValueError("read_bandwidth is not of 1, 2, 4 … and all threads")
    for n, by in machine.read_bandwidth.items():
        if not by or list(by) != sorted(by) or min(by) < 1:
            raise ValueError(f"the working sets of {n} threads do not rise from 1 byte")
    isas = _usable_isas()
    if list(machine.peaks) != isas or any(
        list(by) != threads or any(list(rates) != list(PEAKS) for rates in by.values())
        for by in machine.peaks.values()
    ):
        raise ValueError(f"peaks are not of {', '.join(isas)} with each number of threads")
    if list(machine.barrier_seconds) != [n for n in threads if n > 1]:
        raise ValueError("barrier_seconds is not of each number of threads above 1")
    if not (0 < machine.memory_bytes < 1 << 60 and 0 <= machine.seconds < 1e6):
        raise ValueError("memory_bytes or seconds is out of range")
    return machine


def _checked_range(value: Mapping[str, Any]) -> Range:
    found = Range(**value)
    figures = [found.least, found.median, found.most]
    if not all(type(x) in (int, float) and 0 < x < 1e18 for x in figures):
        raise ValueError(f"{figures} are not three positive numbers")
    if figures != sorted(figures) or type(found.readings) is not int or found.readings < 1:
        raise ValueError(f"{found} is no range of readings")
    return found
