"""Every op of a backend on the shapes of real models: microseconds, and the shares of the machine's
peak FLOP/s and bandwidth.

    scripts/bench kernels [BACKEND] [--op OP] [--all]
    scripts/bench kernels native --linear [--isa ISA] [--threads N]

An op is timed inside a forward pass, as models call it, many times over, so that the setup of its
inputs hardly counts. The shortest of several rounds is shown. FLOPs and bytes are those of
`pellucid/ops/cost.py`: a weight counts with its packed size, even if a backend keeps it decoded and
reads more. The last line is JSON.

--linear times the native backend's linear layer instead, in every format and for 1 to 512 rows:
GB/s and GOP/s, and the shares of the machine's ceilings, which are measured first
(pellucid/measure/machine.py). The weight is 2048 × 4096, larger than L2; a loop over it alone runs
from L3 where that is large enough to hold it, so the ceiling is that of its own size. "bound" is
the time that the ceilings allow over the time that was taken.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.registry import BACKENDS, get_backend
from pellucid.formats import FORMATS, get_format, row_bytes
from pellucid.measure.machine import measure_ceilings
from pellucid.ops.backend import Backend
from pellucid.ops.build_case import build_case
from pellucid.ops.case_lists import CASES, SPEED_CASES
from pellucid.ops.cases import Case, LinearCase

SECONDS_PER_CASE = 0.3
ROUNDS = 5
LINEAR_SHAPE = (2048, 4096)  # outputs, inputs
LINEAR_ROWS = (1, 4, 8, 32, 512)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_case(backend: Backend, case: Case) -> float:
    """Seconds of one run of a case's op."""
    inputs = case.build_inputs()
    once = build_case(backend, case, inputs)
    once()  # the first run pays for memory that is touched for the first time
    repeats = min(1000, max(3, int(SECONDS_PER_CASE / ROUNDS / seconds(once))))
    many = build_case(backend, case, inputs, repeats=repeats)
    return min(seconds(many) for _ in range(ROUNDS)) / repeats


def bench_linear(isa: str | None, threads: int | None) -> None:
    """Each format × rows of the native backend's linear layer, beside the ceilings."""
    backend = NativeBackend(isa, threads)
    ceilings = measure_ceilings(backend.isa, backend.threads)
    peaks = f"int8 {ceilings.int8_peak / 1e9:.0f} GOP/s, float32 {ceilings.float_peak / 1e9:.0f}"
    print(f"{backend.isa}, {backend.threads} threads; {peaks}; read, by working set:")
    print(
        "  ".join(
            f"{size >> 20} MiB {rate.most / 1e9:.1f}"
            for size, rate in ceilings.read_bandwidth.items()
        ),
        "GB/s",
    )
    print(
        f"{'format':<8} {'rows':>5} {'µs':>10} {'GB/s':>8} {'of read':>8} {'GOP/s':>8} "
        f"{'of peak':>8} {'bound':>7}"
    )
    results = []
    for name in FORMATS:
        for rows in LINEAR_ROWS:
            case = LinearCase(
                tokens=rows, in_features=LINEAR_SHAPE[1], out_features=LINEAR_SHAPE[0], format=name
            )
            elapsed, cost = time_case(backend, case), case.cost
            size = LINEAR_SHAPE[0] * row_bytes(name, LINEAR_SHAPE[1])
            if get_format(name).block_size > 1:
                cost = replace(cost, int8_flops=cost.flops)
            read, peak = (
                cost.bytes / elapsed / ceilings.bandwidth_at(size),
                ceilings.arithmetic_seconds(cost) / elapsed,
            )
            bound = ceilings.least_seconds(cost, size) / elapsed
            row = {
                "format": name,
                "rows": rows,
                "us": elapsed * 1e6,
                "gbytes": cost.bytes / elapsed / 1e9,
            }
            row |= {
                "gops": cost.flops / elapsed / 1e9,
                "of_read": read,
                "of_peak": peak,
                "of_bound": bound,
            }
            results.append(row)
            print(
                f"{name:<8} {rows:>5} {row['us']:>10.1f} {row['gbytes']:>8.1f} {read:>8.0%} "
                f"{row['gops']:>8.1f} {peak:>8.0%} {bound:>7.0%}",
                flush=True,
            )
    figures = {
        "isa": backend.isa,
        "threads": backend.threads,
        "int8_peak": ceilings.int8_peak,
        "float_peak": ceilings.float_peak,
        "read_bandwidth": {n: rate.most for n, rate in ceilings.read_bandwidth.items()},
    }
    print(json.dumps({"bench": "linear", **figures, "results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", nargs="?", default="reference", choices=sorted(BACKENDS))
    parser.add_argument("--op", choices=sorted({case.op for case in CASES}))
    parser.add_argument(
        "--all", action="store_true", help="the small cases of the conformance suite too"
    )
    parser.add_argument(
        "--linear",
        action="store_true",
        help="formats × rows of the native linear layer, beside the machine's ceilings",
    )
    parser.add_argument("--isa", help="of --linear  [default: the best]")
    parser.add_argument("--threads", type=int, help="of --linear  [default: all]")
    args = parser.parse_args()
    if args.linear:
        if args.backend != "native":
            parser.error("--linear is of the native backend: scripts/bench kernels native --linear")
        bench_linear(args.isa, args.threads)
        return

    backend = get_backend(args.backend)
    cases = [
        case for case in dict.fromkeys(SPEED_CASES + CASES * args.all) if args.op in (None, case.op)
    ]
    width = max((len(case.name) for case in cases), default=0)
    print(f"{'op and case':<{width}} {'µs':>10} {'GFLOP/s':>9} {'GB/s':>8} {'FLOP/byte':>10}")
    results = []
    for case in cases:
        elapsed, cost = time_case(backend, case), case.cost
        rate = 1e-9 / elapsed
        row = {
            "op": case.op,
            "case": case.name,
            "us": elapsed * 1e6,
            "gflops": cost.flops * rate,
            "gbytes": cost.bytes * rate,
        }
        results.append(row | {"flops": cost.flops, "bytes": cost.bytes})
        print(
            f"{case.name:<{width}} {row['us']:>10.1f} {row['gflops']:>9.2f} {row['gbytes']:>8.2f} "
            f"{cost.arithmetic_intensity:>10.2f}"
        )
    print(json.dumps({"bench": "kernels", "backend": args.backend, "results": results}))


if __name__ == "__main__":
    main()
