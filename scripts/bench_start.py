"""Cold start: from the shell to the first token, and where the time goes; how long loading takes,
and how much memory at its peak.

    scripts/bench start MODEL.gguf … [--runs 5] [--threads 2] [--against CHECKOUT]

"first token" is the wall time from starting the process `pellucid run -m MODEL "Hi" --max-tokens 1`
to the first byte that it prints. The stages are timed in other fresh processes, by the functions
that loading calls. What the first token takes beyond their sum is the interpreter, the cache, the
capture and the first step. "peak" is the largest resident set of such a process when the weights
are loaded, pages of the file included, over the size of the file. Files lie in the page cache: a
first run, which is not counted, has read them. Medians. The last line is JSON.

With `--against`, whole processes of another checkout, with its module built in place, and of this
one take turns: `LLM(MODEL)`, and `pellucid run -m MODEL "Hi" --max-tokens 1` to its end. The table
has the least time of each, the median of the ratios of pairs with its quartiles, and the largest
resident set.
"""

import argparse
import importlib
import json
import os
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
        timed("weights", lambda: load_weights(backend, checkpoint))
    found["peak"] = _peak()
    return found


def load_weights(backend: Any, checkpoint: Any) -> None:
    """All weights, as the engine loads them."""
    loaded = backend.load_stored(checkpoint.stored_matrices())
    for _, tensor in checkpoint.parameters(without=loaded):
        backend.load_weight(tensor)


def _peak() -> int:
    """Bytes: of this program alone, where getrusage would count what its parent was before it."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


LOAD = "import sys; from pellucid import LLM; LLM(sys.argv[1], max_model_len=2048)"


def run_whole(checkout: Path, arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a process of Python that imports pellucid from `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, cwd="/", stdout=null, stderr=null
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench start: {checkout} failed: python {' '.join(arguments)}")
    return seconds, usage.ru_maxrss * 1024


def compare(path: Path, before: Path, runs: int) -> list[dict[str, Any]]:
    """Pairs of whole processes: a row of figures for `LLM` and one for `pellucid run`."""
    after = Path(__file__).resolve().parents[1]
    run = ["-m", "pellucid", "run", "-m", str(path), "Hi", "--max-tokens", "1"]
    rows = []
    for what, arguments in {"LLM": ["-c", LOAD, str(path)], "run": run}.items():
        run_whole(before, arguments), run_whole(after, arguments)
        pairs = [(run_whole(before, arguments), run_whole(after, arguments)) for _ in range(runs)]
        ratios = [b[0] / a[0] for a, b in pairs]
        rows.append(
            {
                "model": path.name,
                "what": what,
                "before": min(a[0] for a, _ in pairs),
                "after": min(b[0] for _, b in pairs),
                "ratios": statistics.quantiles(ratios, n=4),
                "peak_before": max(a[1] for a, _ in pairs),
                "peak_after": max(b[1] for _, b in pairs),
            }
        )
    return rows


def print_pairs(models: list[Path], before: Path, runs: int) -> None:
    """The table of `compare`, and its JSON."""
    print(f"{'pairs: ' + str(runs):<40}{'before':>8}{'after':>8}  {'ratio':<18}{'peak':>14}")
    results = []
    for path in models:
        for row in compare(path, before, runs):
            low, middle, high = row["ratios"]
            peaks = f"{row['peak_before'] / 1e6:.0f} → {row['peak_after'] / 1e6:.0f} MB"
            print(
                f"{row['what'] + ' ' + row['model']:<40}{row['before']:>8.3f}{row['after']:>8.3f}"
                f"  {middle:.2f} ({low:.2f}–{high:.2f}){peaks:>20}",
                flush=True,
            )
            results.append(row)
    print(json.dumps({"bench": "start", "pairs": runs, "results": results}))


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
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with this tree")
    args = parser.parse_args()
    if args.against is not None:
        models = [path.resolve() for path in args.models]
        print_pairs(models, args.against.resolve(), args.runs)
        return
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
