"""Cold start: from the shell to the first token, and where the time goes; how long loading takes,
and how much memory at its peak.

    scripts/bench start MODEL.gguf … [--runs 5] [--threads 2]

"first token" is the wall time from starting the process `pellucid run -m MODEL "Hi" --max-tokens 1`
to the first byte that it prints. The stages are timed in other fresh processes, by the functions
that loading calls. What the first token takes beyond their sum is the interpreter, the cache, the
capture and the first step. "peak" is the largest resident set of such a process when the weights
are loaded, pages of the file included, over the size of the file. Files lie in the page cache: a
first run, which is not counted, has read them. Medians. The last line is JSON.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = "from pellucid.cli.main import main; main()"  # what the command `pellucid` is
STAGES = ("imports", "open", "tokenizer", "weights")


def first_token(path: Path, threads: int) -> float:
    """Seconds from the start of the process to the first byte of its answer."""
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "run",
        "-q",
        "-m",
        str(path),
        "--threads",
        str(threads),
        "Hi",
        "--max-tokens",
        "1",
    ]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        answered = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not answered:
        raise SystemExit(f"bench start: pellucid run failed on {path}")
    return seconds


def time_stages(path: Path, threads: int) -> dict[str, float]:
    """Seconds of each stage in this process, which has imported nothing of pellucid yet, and the
    peak of its memory in bytes.
    """
    found: dict[str, float] = {}

    def timed(name: str, stage: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = stage()
        found[name] = time.perf_counter() - start
        return result

    timed(
        "imports",
        lambda: [
            importlib.import_module(f"pellucid.{name}")
            for name in ("cli.main", "engine.llm", "backends.native.backend")
        ],
    )
    from pellucid.backends.registry import get_backend
    from pellucid.tokenizer import load_tokenizer
    from pellucid.weights.checkpoint import open_checkpoint

    backend = get_backend("native", {"threads": threads})
    with timed("open", lambda: open_checkpoint(path)) as checkpoint:
        timed("tokenizer", lambda: load_tokenizer(checkpoint.tokenizer_source))
        timed(
            "weights",
            lambda: [backend.load_weight(tensor) for _, tensor in checkpoint.parameters()],
        )
    found["peak"] = _peak()
    return found


def _peak() -> int:
    """Bytes: of this program alone, where getrusage would count what its parent was before it."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--stages", action="store_true", help="print the stages of this very process, once"
    )
    args = parser.parse_args()
    if args.stages:
        print(json.dumps(time_stages(args.models[0], args.threads)))
        return

    results = []
    print(
        f"{'seconds, medians of ' + str(args.runs):<34} {'first token':>12}"
        + "".join(f"{s:>11}" for s in STAGES)
        + f"{'peak':>8}"
    )
    for path in args.models:
        first_token(path, args.threads)
        command = [sys.executable, __file__, str(path), "--threads", str(args.threads), "--stages"]
        runs, stages = [], []
        for _ in range(args.runs):
            runs.append(first_token(path, args.threads))
            stages.append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
        medians = {
            name: statistics.median(run[name] for run in stages) for name in (*STAGES, "peak")
        }
        first, peak = statistics.median(runs), medians["peak"] / path.stat().st_size
        print(
            f"{path.name:<34} {first:>12.2f}"
            + "".join(f"{medians[s]:>11.2f}" for s in STAGES)
            + f"{peak:>7.2f}×",
            flush=True,
        )
        results.append({"model": path.name, "first_token": runs, **medians, "peak_over_file": peak})
    print(json.dumps({"bench": "start", "threads": args.threads, "results": results}))


if __name__ == "__main__":
    main()
