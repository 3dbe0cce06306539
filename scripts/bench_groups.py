"""Linear layers of group-wise integers (GPTQ, AWQ, compressed-tensors) beside GGUF's formats of the
same bits, on the native backend.

    scripts/bench groups [--isa ISA] [--threads N] [--layers N] [--width N] [--rounds N]

A chain of square matrices is run for one row (decode) and for many (prefill). All matrices of a
format together are larger than the caches, so that decode reads them from memory. Formats are timed
in turns, round by round, and the median of each is shown: GB/s of weights in decode and rows per
second in prefill. The ratios are to Q4_0 in decode, and to Q8_0 in prefill. INT8_ROW quantizes its
activations with one scale per row (W8A8). The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pellucid.backends.native.backend import NativeBackend
from pellucid.formats import encode_dense, packed_bytes
from pellucid.ops.case_inputs import plain_batch, random_weight

FORMATS = (
    *("Q4_0", "Q4_1", "INT4_G32", "INT4_G128", "UINT4_G32", "UINT4_G128", "UINT3_G128"),
    *("UINT2_G128", "Q8_0", "INT8_G128", "INT8_ROW"),
)
PREFILL_ROWS = 256


def build_chain(
    backend: NativeBackend, format: str, layers: int, width: int
) -> tuple[Callable[[Any], Any], int]:
    """A forward pass through `layers` matrices, and the bytes of their weights."""
    rng = np.random.default_rng(0)
    host = random_weight(rng, (width, width), format)
    weights = [backend.load_weight(host) for _ in range(layers)]
    rows = rng.normal(size=(PREFILL_ROWS, width)).astype(np.float32)
    table = backend.load_weight(encode_dense(rows))

    def forward(ops: Any, batch: Any) -> Any:
        x = ops.embedding(table, batch.input_ids)
        for weight in weights:
            x = ops.linear(x, weight)
        return ops.take_rows(x, batch.logits_indices)

    return backend.build_forward(forward), layers * packed_bytes(host.spec)


def seconds(run: Callable[[Any], Any], batch: Any, repeats: int) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    for _ in range(repeats):
        run(batch)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    backend = NativeBackend(options.isa, options.threads)
    chains = {f: build_chain(backend, f, options.layers, options.width) for f in FORMATS}

    # in turns, after one run of each
    steps = {"decode": (plain_batch(1, [0]), 10), "prefill": (plain_batch(PREFILL_ROWS, [0]), 1)}
    times: dict[tuple[str, str], list[float]] = {(f, s): [] for f in FORMATS for s in steps}
    for name, (batch, repeats) in steps.items():
        for turn in range(options.rounds + 1):
            for format, (run, _) in chains.items():
                taken = seconds(run, batch, repeats)
                if turn:
                    times[format, name].append(taken)

    print(f"{backend.isa}, {backend.threads} threads, {options.layers} × {options.width}²")
    titles = ("format", "MB", "GB/s", "of Q4_0", "µs", "rows/s", "of Q8_0")
    print("{:<11} {:>6} {:>7} {:>8} {:>8} {:>9} {:>8}".format(*titles))
    median = {key: statistics.median(found) for key, found in times.items()}
    results = []
    for format, (_, size) in chains.items():
        decode, prefill = median[format, "decode"], median[format, "prefill"]
        row = {
            "format": format,
            "bytes": size,
            "decode_us": decode * 1e6,
            "gbytes": size / decode / 1e9,
            "of_q4_0": size / decode / (chains["Q4_0"][1] / median["Q4_0", "decode"]),
            "prefill_rows": PREFILL_ROWS / prefill,
            "of_q8_0": median["Q8_0", "prefill"] / prefill,
        }
        results.append(row)
        print(
            f"{format:<11} {size / 1e6:>6.0f} {row['gbytes']:>7.1f} {row['of_q4_0']:>8.0%} "
            f"{row['decode_us']:>8.0f} {row['prefill_rows']:>9.0f} {row['of_q8_0']:>8.2f}"
        )
    print(json.dumps({"bench": "groups", "isa": backend.isa, "results": results}))


if __name__ == "__main__":
    main()
