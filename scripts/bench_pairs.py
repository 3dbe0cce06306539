"""Compares this checkout with another one of Pellucid in short pairs: two processes take turns, one
measurement each, so that both see the same state of the machine.

    scripts/bench pairs OTHER_CHECKOUT MODEL.gguf [--pairs 40] [--threads 2]

OTHER_CHECKOUT is a folder with its own built `_native` beside src/pellucid. Shapes of `pellucid
bench` are measured in short pieces. Both processes drive the backend by this checkout's
`measure/bench_model.py`, so the other one must have the interfaces that it uses. Each pair gives a
ratio, this over other, and the median is shown with the quartiles. On a shared machine, runs that
are minutes apart differ by a tenth; pairs detect differences of one or two percent. The last line
is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
# name, call of WORKER (kind, sequences, tokens before, tokens), share of --pairs
SHAPES = [
    ("decode, 1 sequence", "decode 1 0 24", 1.0),
    ("decode at 2048", "decode 1 2048 8", 0.4),
    ("prefill 512", "prefill 1 0 512", 0.5),
    ("decode, 8 sequences", "decode 8 64 8", 0.5),
    ("decode, 32 sequences", "decode 32 64 4", 0.5),
]
WORKER = """
import importlib.util, sys
from pathlib import Path
driver, model, threads = sys.argv[1:]
spec = importlib.util.spec_from_file_location("pellucid.measure.bench_model", driver)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
options = {"threads": int(threads)}
ours = module.BenchModel(Path(model), options=options, sequences=32, longest=2080)
print("ready", flush=True)
for line in sys.stdin:
    kind, *numbers = line.split()
    sequences, start, tokens = map(int, numbers)
    ours.fill(sequences, start)
    ours.step(sequences, start, 1)  # wakes the threads
    seconds = getattr(ours, kind)(sequences, start, tokens)
    print(sequences * tokens / seconds, flush=True)
"""
DRIVER = HERE / "src" / "pellucid" / "measure" / "bench_model.py"


class Worker:
    """A process that measures one checkout on request."""

    def __init__(self, checkout: Path, model: Path, threads: int) -> None:
        command = [sys.executable, "-c", WORKER, str(DRIVER), str(model), str(threads)]
        with tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": str(checkout / "src")},
            )
            if self._read() != "ready":
                self._process.wait()
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["it said nothing"]
                sys.exit(
                    f"scripts/bench pairs: {checkout} cannot be measured: {said[-1]}\nIt needs a "
                    "built _native in src/pellucid, and today's interfaces: both sides run this "
                    "checkout's measure/bench_model.py, for which a checkout of long ago is too old"
                )

    def measure(self, call: str) -> float:
        """Tokens per second."""
        assert self._process.stdin is not None
        self._process.stdin.write(call + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    this, other = (Worker(c.resolve(), args.model, args.threads) for c in (HERE, args.other))
    print(f"{'tokens/s':<22} {'other':>9} {'this':>9} {'ratio':>7}  quartiles")
    results = []
    for name, call, share in SHAPES:
        ratios, speeds = [], []
        for i in range(max(4, round(args.pairs * share))):
            first, second = (this, other) if i % 2 else (other, this)
            a, b = first.measure(call), second.measure(call)
            mine, theirs = (a, b) if i % 2 else (b, a)
            ratios.append(mine / theirs)
            speeds.append((theirs, mine))
        low, middle, high = statistics.quantiles(ratios, n=4)
        theirs, mine = (statistics.median(column) for column in zip(*speeds, strict=True))
        print(f"{name:<22} {theirs:>9.1f} {mine:>9.1f} {middle:>7.3f}  {low:.3f} – {high:.3f}")
        results.append({"shape": name, "other": theirs, "this": mine, "ratios": ratios})
    print(json.dumps({"bench": "pairs", "model": args.model.name, "results": results}))


if __name__ == "__main__":
    main()
