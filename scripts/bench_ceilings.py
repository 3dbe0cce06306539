"""Whether the ceilings of `pellucid machine` are right: beside those that independent programs
find, in turns.

    scripts/bench ceilings [--threads 1,2] [--rounds 5] [--read-mb 512]

| program                  | what it is                                                            |
|--------------------------|-----------------------------------------------------------------------|
| C                        | a loop of intrinsics that this script compiles with `cc`              |
| NumPy                    | OpenBLAS's sgemm of 2,048; the largest of an array's numbers          |
| oneDNN                   | an int8 linear layer of 2,048 through PyTorch                         |
| likwid-bench             | its peakflops_sp and load, for AVX-512 or AVX2                        |

A program that is not installed is named and left out. In each round every program takes one reading
beside ours. "ratio" is the median of ours over its reading, with the least and the most. A matrix
product reaches some 90 % of a peak, so there a ratio up to 1.15 is what to expect. The last line is
JSON.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from pellucid.backends.native.backend import available_cpus, choose_isa
from pellucid.measure.machine import measure_ceilings

# memory in huge pages, as that of our weights; with pages of 4 KiB one thread reads a fifth slower
HUGE = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
C = r"""
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
typedef float floats __attribute__((vector_size(sizeof(__m256) * (1 + WIDE))));
typedef int64_t words __attribute__((vector_size(64)));
enum { SUMS = 12, ROUNDS = 20000000 };
static volatile float seed = 0.5f;
static double int8_work(void) {
#if defined(__AVX512VNNI__)
    __m512i a = _mm512_set1_epi8((int)(seed * 6)), sum[SUMS];
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_epi32((int)(seed * i));
    for (int r = 0; r < ROUNDS; r++)
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++)
            sum[i] = _mm512_dpbusd_epi32(sum[i], a, a);
    for (int i = 1; i < SUMS; i++) sum[0] = _mm512_xor_si512(sum[0], sum[i]);
    seed = _mm512_reduce_add_epi32(sum[0]) ? 0.5f : 0.25f;
    return 2.0 * 64 * SUMS * ROUNDS;
#else
    return 0;
#endif
}
static double float32_work(void) {
    floats a = seed - (floats){}, sum[SUMS];
    for (int i = 0; i < SUMS; i++) sum[i] = a * (float)i;
    for (int r = 0; r < ROUNDS; r++)
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * a + a;
    for (int i = 1; i < SUMS; i++) sum[0] += sum[i];
    seed = sum[0][0] > 100 ? 0.5f : 0.25f;
    return 2.0 * sizeof(a) / 4 * SUMS * ROUNDS;
}
static double read_work(const words *data, size_t count, int times, size_t ahead) {
    words sum[4] = {};
    for (int t = 0; t < times; t++)
        for (size_t i = 0; i < count; i += 4)
            _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) {
                if (ahead) __builtin_prefetch(data + i + k + ahead);
                sum[k] |= data[i + k];
            }
    sum[0] |= sum[1] | sum[2] | sum[3];
    seed = sum[0][0] ? 0.5f : 0.25f;
    return 64.0 * count * times;
}
int main(int argc, char **argv) {
    size_t count = argc > 2 ? atol(argv[2]) / 256 * 4 : 0;
    int times = count ? 1 + (1 << 27) / count : 0;
    double best = 0;
    for (int attempt = 0; attempt < 4; attempt++) {
        double work = 0, start = 0;
#pragma omp parallel reduction(+ : work)
        {
            words *data = count ? aligned_alloc(1 << 21, (count / 32768 + 1) << 21) : 0;
            if (count) madvise(data, count * 64, MADV_HUGEPAGE);
            if (count) memset(data, 1, count * 64);
#pragma omp barrier
#pragma omp master
            start = omp_get_wtime();
#pragma omp barrier
            work = count ? read_work(data, count, times, attempt % 2 ? 128 : 0)
                         : *argv[1] == 'i' ? int8_work() : float32_work();
            free(data);
        }
        double rate = work / (omp_get_wtime() - start);
        if (rate > best) best = rate;
    }
    printf("%.6g\n", best);
}
"""
WORKER = """
import sys, time
kind, threads, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
n = 2048
if kind == "oneDNN":
    import torch
    torch.set_num_threads(threads)
    x = torch.randint(0, 7, (n, n), dtype=torch.uint8)
    w = torch.randint(-7, 7, (n, n), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(w, [n, n])
    scale, zero = torch.ones(n), torch.zeros(n, dtype=torch.int64)
    product = torch.ops.onednn.qlinear_pointwise
    done = (1.0, 0, torch.float32, "none", [], "")
    work, amount = lambda: product(x, 1.0, 0, packed, scale, zero, None, *done), 2 * n**3
elif kind == "sgemm":
    import numpy
    a = numpy.random.rand(n, n).astype(numpy.float32)
    work, amount = lambda: a @ a, 2 * n**3
else:
    import numpy
    from concurrent.futures import ThreadPoolExecutor
    parts = [numpy.ones(size // threads // 8, numpy.int64) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)
    times = 1 + (1 << 29) // size
    def largest(part):
        for _ in range(times):
            part.max()
    work, amount = lambda: list(pool.map(largest, parts)), times * sum(p.nbytes for p in parts)
work()
print("ready", flush=True)
for line in sys.stdin:
    best = 9e9
    for _ in range(5):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    print(amount / best, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Independent:
    """A program that measures one figure with a number of threads: `take` returns bytes/s or
    operations/s.
    """

    name: str
    figure: str  # "int8", "float32" or "read"
    threads: int
    take: Callable[[], float]


class Worker:
    """A process that runs WORKER and takes a reading on request."""

    def __init__(self, kind: str, threads: int, size: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, kind, str(threads), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # no instruction set beyond that of our int8 loop; idle threads sleep
            env={
                **os.environ,
                "OPENBLAS_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "passive",
                "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
            },
        )
        if self._answer() != "ready":
            sys.exit(f"scripts/bench ceilings: {kind} cannot be measured")

    def take(self) -> float:
        assert self._process.stdin is not None
        print("take", file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def compiled(folder: Path, isa: str) -> Path | None:
    """The program of `C`, or None where it cannot be built."""
    source, program = folder / "ceilings.c", folder / "ceilings"
    source.write_text(C)
    command = ["cc", "-O3", "-march=native", "-fopenmp", f"-DWIDE={int(isa != 'avx2')}"]
    try:
        done = subprocess.run([*command, source, "-o", program], capture_output=True, text=True)
    except OSError:  # no compiler
        return None
    print(done.stderr, end="", file=sys.stderr)
    return None if done.returncode else program


def run_c(program: Path, figure: str, threads: int, size: int) -> float:
    command = [str(program), figure, *([str(size // threads)] if figure == "read" else [])]
    limits = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return float(subprocess.run(command, check=True, capture_output=True, env=limits).stdout)


def run_likwid(test: str, unit: str, threads: int, size: int) -> float:
    """`unit` is the line of likwid-bench's output with the rate, in millions per second."""
    command = ["likwid-bench", "-t", test, "-w", f"N:{size // 1000}kB:{threads}", "-s", "1"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=HUGE).stdout
    found = re.search(rf"^{unit}:\s+([\d.]+)$", said, re.MULTILINE)
    assert found is not None, said
    return float(found[1]) * 1e6


def independents(folder: Path, isa: str, threads: list[int], size: int) -> list[Independent]:
    """The programs that are here; those that are not are named on standard error."""
    found, missing = [], []
    # the program in C
    if (program := compiled(folder, isa)) is not None:
        found += [
            Independent("C", figure, n, partial(run_c, program, figure, n, size))
            for figure in ("int8", "float32", "read")
            for n in threads
            if figure != "int8" or run_c(program, "int8", 1, size)
        ]
    else:
        missing.append("cc with OpenMP")
    # libraries of Python
    found += [
        Independent(name, figure, n, Worker(kind, n, size).take)
        for name, figure, kind in (("NumPy", "float32", "sgemm"), ("NumPy", "read", "max"))
        for n in threads
    ]
    if find_spec("torch") is not None:
        found += [Independent("oneDNN", "int8", n, Worker("oneDNN", n, size).take) for n in threads]
    else:
        missing.append("torch (oneDNN)")
    # likwid-bench; its peak reads 16 KB per thread, which lie in L1
    if shutil.which("likwid-bench") is not None:
        wide = "avx" if isa == "avx2" else "avx512"
        for n in threads:
            peak = partial(run_likwid, f"peakflops_sp_{wide}_fma", "MFlops/s", n, 16_000 * n)
            read = partial(run_likwid, f"load_{wide}", "MByte/s", n, size)
            found += [
                Independent("likwid-bench", "float32", n, peak),
                Independent("likwid-bench", "read", n, read),
            ]
    else:
        missing.append("likwid-bench")
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default=f"1,{available_cpus()}", help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--read-mb", type=int, default=512, help="the working set, 10^6 bytes")
    args = parser.parse_args()

    isa, size = choose_isa(None), args.read_mb * 10**6
    threads = sorted({int(n) for n in args.threads.split(",")})
    # Take a reading of every program in each round, right after ours.
    with tempfile.TemporaryDirectory() as folder:
        programs = independents(Path(folder), isa, threads, size)
        ours: list[list[float]] = [[] for _ in programs]
        theirs: list[list[float]] = [[] for _ in programs]
        for _ in range(args.rounds):
            for i, program in enumerate(programs):
                own = measure_ceilings(isa, program.threads, working_sets=[size], seconds=0.15)
                rate = own.bandwidth_at(size) if program.figure == "read" else 0.0
                ours[i].append(rate or own.peaks[program.figure])
                theirs[i].append(program.take())
    # Compare.
    rows: list[dict[str, object]] = []
    print(f"{'of ' + isa:<10} {'threads':>7} {'ours':>7}  {'program':<13} {'its':>7}  ratio")
    for program, mine, others in zip(programs, ours, theirs, strict=True):
        ratios = [a / b for a, b in zip(mine, others, strict=True)]
        own_rate, its, ratio = map(statistics.median, (mine, others, ratios))
        rows.append(
            {"figure": program.figure, "threads": program.threads, "program": program.name}
            | {"ours": own_rate, "its": its, "ratio": ratio}
            | {"least": min(ratios), "most": max(ratios)}
        )
        print(
            f"{program.figure:<10} {program.threads:>7} {own_rate / 1e9:>7.1f}  "
            f"{program.name:<13} {its / 1e9:>7.1f}  "
            f"{ratio:.2f} ({min(ratios):.2f} – {max(ratios):.2f})"
        )
    print(json.dumps({"isa": isa, "read_bytes": size, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
