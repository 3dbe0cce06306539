"""Decode with too few cores: more threads than cores, and busy neighbour processes, compared with
the fair share of the machine.

    scripts/bench threads MODEL.gguf [--threads 2] [--steps 120] [--runs 5]

The cases run in turn, each in its own process: alone with THREADS threads; with twice and with four
times as many on the same cores; beside one and two processes that each keep a core busy; and two
engines at once. The fair share is the speed with a perfect scheduler: the speed alone, if the cores
are only shared among our own threads; threads / (threads + B) of it beside B busy threads of
others; half of it for two engines. "×" is the fair share over the measured speed, median and worst:
1 means no loss.

"neighbours" is the number of cores that the busy processes got while ours decoded, "strangers"
those that any other process got. If "strangers" is not near 0, they have affected the figure. Run
it at ordinary priority (sharing is what it measures) with nothing else to do. Linux only. The last
line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pellucid import LLM, SamplingParams

# the alarm ends it where nobody else does
BUSY = "import signal\nsignal.alarm(120)\nprint(flush=True)\nwhile True: pass"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    threads: int
    fair: float  # of the lone speed
    busy: int = 0
    engines: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    speed: float  # tokens per second of one engine, the mean of several
    neighbours: float  # cores
    strangers: float


def start(command: list[str]) -> subprocess.Popen[str]:
    """A process that has reported on standard output that it is ready."""
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9


def machine_seconds() -> float:
    """CPU seconds of all processes on all CPUs (user, nice, system, interrupts)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return sum(int(fields[i]) for i in (1, 2, 3, 6, 7)) / float(os.sysconf("SC_CLK_TCK"))


def measure(path: Path, case: Case, steps: int) -> Run:
    command = [
        __file__,
        str(path),
        "--threads",
        str(case.threads),
        "--steps",
        str(steps),
        "--alone",
    ]
    engines: list[subprocess.Popen[str]] = []
    neighbours: list[subprocess.Popen[str]] = []
    try:
        engines += [start(command) for _ in range(case.engines)]
        neighbours += [start(["-c", BUSY]) for _ in range(case.busy)]
        time.sleep(0.2)  # the scheduler finds the neighbours a place
        before, machine, theirs = (
            time.perf_counter(),
            machine_seconds(),
            sum(map(cpu_seconds, neighbours)),
        )
        for process in engines:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [
            json.loads(process.stdout.readline())
            for process in engines
            if process.stdout is not None
        ]
        wall, theirs = time.perf_counter() - before, sum(map(cpu_seconds, neighbours)) - theirs
        others = machine_seconds() - machine - theirs - sum(a["cpu"] for a in answers)
        return Run(
            statistics.mean(a["speed"] for a in answers), theirs / wall, max(0.0, others / wall)
        )
    finally:
        for process in [*neighbours, *engines]:
            process.kill()
            process.wait()


def alone_with(path: Path, threads: int, steps: int) -> None:
    """Load, say so, wait for a line, decode, and print tokens per second and the CPU time that it
    took.
    """
    llm = LLM(path, threads=threads, max_model_len=steps + 16, speculative=None)
    llm.generate([[1]], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    print("loaded", flush=True)
    sys.stdin.readline()
    cpu = time.process_time()
    metrics = llm.generate(
        [[1]], SamplingParams(max_tokens=steps, ignore_eos=True), use_tqdm=False
    )[0].metrics
    assert metrics.finished_time is not None and metrics.first_token_time is not None
    speed = (steps - 1) / (metrics.finished_time - metrics.first_token_time)
    print(json.dumps({"speed": speed, "cpu": time.process_time() - cpu}), flush=True)
    sys.stdin.readline()  # until it is killed: ending is not measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="and cores: the first so many that this process may use",
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--alone", action="store_true", help="one engine, which waits for a line on standard input"
    )
    args = parser.parse_args()
    if args.alone:
        alone_with(args.model, args.threads, args.steps)
        return

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    n = args.threads
    cases = [
        Case(f"{n} threads, alone", n, 1.0),
        Case(f"{2 * n} threads on {n} cores", 2 * n, 1.0),
        Case(f"{4 * n} threads on {n} cores", 4 * n, 1.0),
        Case(f"{n} threads beside a busy process", n, n / (n + 1), busy=1),
        Case(f"{n} threads beside two", n, n / (n + 2), busy=2),
        Case("two engines at once, each", n, 0.5, engines=2),
    ]
    found: dict[str, list[Run]] = {case.name: [] for case in cases}
    for _ in range(args.runs):
        for case in cases:
            found[case.name].append(measure(args.model, case, args.steps))
    alone = statistics.median(run.speed for run in found[cases[0].name])
    print(
        f"{args.model.name:<38} {'tokens/s':>9} {'worst':>7} {'fair':>7} {'×':>5} {'worst':>6} "
        f"{'neighbours':>11} {'strangers':>10}"
    )
    for case in cases:
        runs = found[case.name]
        speed, worst, fair = (
            statistics.median(r.speed for r in runs),
            min(r.speed for r in runs),
            alone * case.fair,
        )
        neighbours = statistics.median(r.neighbours for r in runs)
        strangers = statistics.median(r.strangers for r in runs)
        cores = f"{neighbours:>11.2f} {strangers:>10.2f}"
        print(
            f"{case.name:<38} {speed:>9.1f} {worst:>7.1f} {fair:>7.1f} {fair / speed:>5.2f} "
            f"{fair / worst:>6.2f} {cores}"
        )
    print(
        json.dumps(
            {
                "bench": "threads",
                "model": args.model.name,
                "runs": {n: [asdict(r) for r in rs] for n, rs in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
