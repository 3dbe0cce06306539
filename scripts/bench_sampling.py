"""The time of sampling the tokens of a step, in milliseconds: rows × vocabulary × parameters.

    scripts/bench sampling [--rows 1 8 32] [--vocab 49152 151936 262144] [--runs 9] [--step MS]

With --step, the time of a decode step, each figure is followed by its share of that. Logits are
random, shaped as those of language models are: a normal bulk, and a head of a few thousand tokens
that falls off as a power of the rank, with e^1 times the likeliest's weight in all. Medians are
shown. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pellucid import SamplingParams
from pellucid.sampling import SamplingRow, sample, top_logprobs

PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(top_k=40),
    "top_p": SamplingParams(top_p=0.9),
    # it keeps tens of thousands of tokens
    "top_p, hot": SamplingParams(top_p=0.95, temperature=1.5),
    "top_k, top_p": SamplingParams(top_k=40, top_p=0.9),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.1, presence_penalty=0.5),
}


def build_logits(rows: int, vocab_size: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2.6, (rows, vocab_size)).astype(np.float32)
    head = 18 - 1.5 * np.log(1 + np.arange(4096))
    for row in logits:
        row[rng.permutation(vocab_size)[: head.size]] = head
    return logits


def milliseconds(call: Callable[[], object], runs: int) -> float:
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936, 262144])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--step", type=float, metavar="MS", help="time of a decode step")
    args = parser.parse_args()

    names = [*PARAMS, "logprobs=5"]
    print(
        f"{'vocabulary':>10} {'rows':>5}"
        + "".join(f"{name:>15}" for name in names)
        + "   ms, median"
    )
    report: dict[str, float] = {}
    for vocab_size in args.vocab:
        for num_rows in args.rows:
            logits = build_logits(num_rows, vocab_size)
            line = f"{vocab_size:>10} {num_rows:>5}"
            for name in names:
                if name in PARAMS:
                    rows = [
                        SamplingRow(
                            params=PARAMS[name],
                            seed=i,
                            position=300,
                            prompt_token_ids=range(200),
                            output_token_ids=range(500, 600),
                        )
                        for i in range(num_rows)
                    ]
                    ms = milliseconds(partial(sample, logits, rows), args.runs)
                else:
                    wanted = [7] * num_rows, [5] * num_rows
                    ms = milliseconds(partial(top_logprobs, logits, *wanted), args.runs)
                report[f"{vocab_size}_{num_rows}_{name}"] = round(ms, 3)
                line += (
                    f"{ms:>15.2f}"
                    if args.step is None
                    else f"{f'{ms:.2f} ({100 * ms / args.step:.1f} %)':>15}"
                )
            print(line)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
