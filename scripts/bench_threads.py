"""Decode while cores are scarce: more threads than cores, and a neighbour that never rests, against the fair share of the machine.

    scripts/bench threads MODEL.gguf [--threads 2] [--steps 48] [--runs 3]

Four cases, taken in turn, each in processes of its own: alone with THREADS threads; with twice as many, on the cores of THREADS; beside one
process that keeps a core busy; and two engines at once. The fair share is what a scheduler that loses nothing would leave: all of the lone
speed, since threads that take turns do the same work; with B runnable threads of others beside ours, threads / (threads + B) of it; half.
"×" is the fair share over what was reached: 1 loses nothing. Run it at ordinary priority, on a machine with nothing else to do: sharing is
what it measures. Medians. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pellucid import LLM, SamplingParams


def start(path: Path, threads: int, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(path), "--threads", str(threads), "--steps", str(steps), "--alone"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def decode(path: Path, threads: int, steps: int, engines: int = 1, busy: int = 0) -> float:
    """Tokens per second of one engine (the mean of several at once), beside `busy` processes that never rest."""
    running = [start(path, threads, steps) for _ in range(engines)]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()  # it is loaded
    neighbours: list[subprocess.Popen[Any]] = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return statistics.mean(float(process.communicate()[0]) for process in running)
    finally:
        for other in [*neighbours, *running]:
            other.kill()
            other.wait()


def alone_with(path: Path, threads: int, steps: int) -> None:
    """Load, say so, wait for a line, and print tokens per second."""
    llm = LLM(path, threads=threads, max_model_len=steps + 16)
    llm.generate([[1]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    print("loaded", flush=True)
    sys.stdin.readline()
    metrics = llm.generate([[1]], SamplingParams(max_tokens=steps, ignore_eos=True), use_tqdm=False)[0].metrics
    print((steps - 1) / (metrics["finished_time"] - metrics["first_token_time"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=2, help="and cores: the first so many that this process may use")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="one engine, which waits for a line on standard input")
    args = parser.parse_args()
    if args.alone:
        alone_with(args.model, args.threads, args.steps)
        return

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    n = args.threads
    cases: list[tuple[str, dict[str, int], float]] = [
        (f"{n} threads, alone", {"threads": n}, 1.0),
        (f"{2 * n} threads on {n} cores", {"threads": 2 * n}, 1.0),
        (f"{n} threads beside a busy process", {"threads": n, "busy": 1}, n / (n + 1)),
        ("two engines at once, each", {"threads": n, "engines": 2}, 0.5),
    ]
    found: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    for _ in range(args.runs):
        for name, how, _ in cases:
            found[name].append(decode(args.model, how["threads"], args.steps, how.get("engines", 1), how.get("busy", 0)))
    alone = statistics.median(found[cases[0][0]])
    print(f"{args.model.name:<38} {'tokens/s':>9} {'fair share':>11} {'×':>6}")
    for name, _, share in cases:
        speed = statistics.median(found[name])
        print(f"{name:<38} {speed:>9.1f} {alone * share:>11.1f} {alone * share / speed:>6.2f}")
    print(json.dumps({"bench": "threads", "model": args.model.name, "runs": found}))


if __name__ == "__main__":
    main()
