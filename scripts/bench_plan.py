"""How well `pellucid plan` predicts this machine: prefill and decode of one sequence and several,
predicted from headers and then measured through the whole engine, with the error of each.

    scripts/bench plan MODEL… [--prompt 512] [--output 64] [--batch 1,8] [--runs 3]

Predictions and measurements take turns, and each measurement is compared with the mean of the
predictions before and after it: the bandwidth moves within seconds. Medians of the runs are shown,
and the last line is JSON. The error is predicted over measured, less 1. Prefill is of a chunk of
512 tokens, and decode is predicted at the end of the prompt.
"""

import argparse
import json
import statistics
from pathlib import Path

from pellucid.backends.native.backend import NativeBackend
from pellucid.measure.headers import Headers, read_headers
from pellucid.measure.plan import Speed, build_memory_plan, predict, this_machine
from pellucid.measure.profile import profile_model
from pellucid.weights.hub import resolve_model


def predicted(headers: Headers, ctx: int, batch: int) -> dict[str, Speed]:
    """The plan's two speeds at this length."""
    backend = NativeBackend()
    plan = build_memory_plan(headers, backend, ctx=ctx, batch=batch)
    return predict(plan, this_machine(plan, backend), backend)


def measured(path: Path, prompt: int, output: int, batch: int) -> dict[str, float]:
    """Tokens per second of all requests together in each phase, by the median step: steps that
    another program interrupted do not count.
    """
    found = profile_model(path, prompt=prompt, output=output, batch=batch, options={})
    return {
        phase.name: statistics.median(
            step.timed.shape.num_tokens / (step.end - step.start) for step in phase.steps
        )
        for phase in found.phases
    }


def bench(path: Path, prompt: int, output: int, batch: int, runs: int) -> list[dict[str, object]]:
    """One row each for prefill and decode."""
    headers = read_headers(path)
    pairs: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    before = predicted(headers, prompt, batch)
    for _ in range(runs):
        speeds = measured(path, prompt, output, batch)
        after = predicted(headers, prompt, batch)
        for phase, found in pairs.items():
            mean = (before[phase].seconds + after[phase].seconds) / 2
            tokens = after[phase].seconds * after[phase].tokens_per_second
            found.append((tokens / mean, speeds[phase]))
        before = after
    return [
        {
            "model": path.name,
            "phase": phase,
            "batch": batch,
            "predicted": statistics.median(p for p, _ in found),
            "measured": statistics.median(m for _, m in found),
            "error": statistics.median(p / m - 1 for p, m in found),
            "worst_error": max((p / m - 1 for p, m in found), key=abs),
            "bound": before[phase].bound,
        }
        for phase, found in pairs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--batch", default="1,8", help="numbers of sequences")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    rows: list[dict[str, object]] = []
    print(
        f"{'model':<34} {'phase':<8} {'batch':>5} {'predicted':>10} {'measured':>10} {'error':>7} "
        f"{'worst':>7}  bound by"
    )
    for model in args.models:
        path = resolve_model(model, progress=True)
        for batch in map(int, args.batch.split(",")):
            for row in bench(path, args.prompt, args.output, batch, args.runs):
                rows.append(row)
                print(
                    f"{row['model']:<34} {row['phase']:<8} {row['batch']:>5} "
                    f"{row['predicted']:>10.1f} {row['measured']:>10.1f} {row['error']:>+7.0%} "
                    f"{row['worst_error']:>+7.0%}  {row['bound']}"
                )
    print(json.dumps({"prompt": args.prompt, "output": args.output, "rows": rows}))


if __name__ == "__main__":
    main()
