"""Every op of a backend on the shapes of real models: microseconds, and what part of the machine's arithmetic and memory that is.

    scripts/bench kernels [BACKEND] [--op OP] [--all]

An op is timed inside a forward pass, as models call it, many times over, so that feeding its inputs hardly counts. The least of several
rounds is shown. FLOPs and bytes are those of `pellucid/ops/cost.py`: a weight counts as large as its format packs it, even where a backend
keeps it decoded and reads more. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from pellucid.backends.registry import BACKENDS, get_backend
from pellucid.ops.case_lists import CASES, SPEED_CASES
from pellucid.ops.cases import Case, build_case
from pellucid.ops.protocol import Backend

SECONDS_PER_CASE = 0.3
ROUNDS = 5


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", default="reference", choices=sorted(BACKENDS))
    parser.add_argument("--op", choices=sorted({case.op for case in CASES}))
    parser.add_argument("--all", action="store_true", help="the small cases of the conformance suite too")
    args = parser.parse_args()

    backend = get_backend(args.backend)
    cases = [case for case in dict.fromkeys(SPEED_CASES + CASES * args.all) if args.op in (None, case.op)]
    width = max((len(case.name) for case in cases), default=0)
    print(f"{'op and case':<{width}} {'µs':>10} {'GFLOP/s':>9} {'GB/s':>8} {'FLOP/byte':>10}")
    results = []
    for case in cases:
        elapsed, cost = time_case(backend, case), case.cost
        rate = 1e-9 / elapsed
        row = {"op": case.op, "case": case.name, "us": elapsed * 1e6, "gflops": cost.flops * rate, "gbytes": cost.bytes * rate}
        results.append(row | {"flops": cost.flops, "bytes": cost.bytes})
        print(f"{case.name:<{width}} {row['us']:>10.1f} {row['gflops']:>9.2f} {row['gbytes']:>8.2f} {cost.arithmetic_intensity:>10.2f}")
    print(json.dumps({"bench": "kernels", "backend": args.backend, "results": results}))


if __name__ == "__main__":
    main()
