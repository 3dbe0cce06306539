"""Speed far into a context: scripts/bench context MODEL.gguf [--threads 2] [--isa ISA]

For contexts of 512 to 32,768 tokens (no more than the model was made for): decode of one token, and
a chunk of 512 tokens of a prompt, both behind such a context: tokens per second, and the share of
the machine's roof (pellucid/measure/machine.py), measured just before. If the share falls with the
context, attention is further from its roof than the other ops. The cache holds zeros, which are
read as fast as other values.

The last line is JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from bench_peers import CHUNK, Ours

CONTEXTS = (512, 2048, 8192, 16384, 32768)
STEPS = {1: 7, CHUNK: 2}  # tokens of a step -> repetitions, of which the median counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa")
    args = parser.parse_args()
    ours = Ours(args.model, args.threads, args.isa, longest=max(CONTEXTS))
    limit = ours.config.max_position_embeddings

    def tokens_per_second(context: int, tokens: int) -> float:
        seconds = []
        for _ in range(STEPS[tokens] + 1):  # the first touches memory
            start = time.perf_counter()
            ours.step(1, context - tokens, tokens)
            seconds.append(time.perf_counter() - start)
        return tokens / statistics.median(seconds[1:])

    print(
        f"{'context':>8} {'decode tok/s':>13} {'of roof':>8} {'prefill tok/s':>14} {'of roof':>8}"
    )
    results = []
    for context in (n for n in CONTEXTS if n <= limit):
        row: dict[str, float] = {"context": context}
        for name, tokens in (("decode", 1), ("prefill", CHUNK)):
            roof = ours.roof(1, context - tokens, context, tokens, ours.ceilings())
            row[name] = tokens_per_second(context, tokens)
            row[f"{name}_of_roof"] = row[name] / roof
        results.append(row)
        print(
            f"{context:>8} {row['decode']:>13.1f} {row['decode_of_roof']:>8.0%} "
            f"{row['prefill']:>14.0f} {row['prefill_of_roof']:>8.0%}",
            flush=True,
        )
    print(
        json.dumps(
            {
                "bench": "context",
                "model": args.model.name,
                "threads": args.threads,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
