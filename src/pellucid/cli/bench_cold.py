"""`pellucid bench latency --cold-start`: fresh processes, ours and the peer's in turns."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..units import format_bytes
from .bench_options import BenchOptions
from .bench_run import BenchRun, progress, ratio_text, speed_record
from .bench_table import RowPrinter

if TYPE_CHECKING:
    from ..measure.bench_peers import Peer
    from ..measure.bench_rounds import Samples
    from ..measure.bench_start import ColdStart

__all__ = ["run_cold_start"]


def run_cold_start(options: BenchOptions) -> None:
    """One row per model and number of threads: medians of the rounds. The ratio is the peer's whole
    time over ours. llama.cpp's process is llama-bench with a prompt of one token, to its end.
    """
    from ..measure.bench_peers import Setup
    from ..measure.bench_rounds import Samples
    from ..measure.headers import read_headers

    columns = [("model", max(len(path.stem) for path in options.paths())), ("threads", 7)]
    columns += [("first token s", 13), ("whole run s", 11), ("peak memory", 11)]
    if options.against:
        columns += [(f"{options.against} s", 11), (f"{options.against} peak", 14)]
        columns += [("ratio (quartiles)", 20)]
    with BenchRun(RowPrinter("cold start", options.form, columns), options).running() as run:
        for path in options.paths():
            config = read_headers(path).config
            for threads in options.thread_counts():
                samples = Samples(1)
                ours: list[ColdStart] = []
                theirs: list[ColdStart] = []
                run.open_peer(path, Setup(threads, longest=16, vocab_size=config.vocab_size))
                progress(f"{path.name}: cold start")
                try:
                    _measure(path, threads, options, run.peer, samples, ours, theirs)
                finally:
                    if samples.ours:
                        cells = [path.stem, str(threads), *_cells(ours, first=True)]
                        if run.peer is not None:
                            cells += [*_cells(theirs, first=False), ratio_text(samples)]
                        record = {
                            "model_filename": str(path),
                            "n_threads": threads,
                            "starts": [asdict(start) for start in ours],
                            "peer_starts": [asdict(start) for start in theirs],
                            **speed_record(samples, run.peer),
                        }
                        run.row(path, config, [("cold start", samples)], cells, record)


def _measure(
    path: Path,
    threads: int,
    options: BenchOptions,
    peer: "Peer | None",
    samples: "Samples",
    ours: "list[ColdStart]",
    theirs: "list[ColdStart]",
) -> None:
    """Fill the lists, round by round."""
    from ..measure.bench_rounds import run_rounds
    from ..measure.bench_start import measure_own_start

    words = ["--backend", options.backend]
    for name, value in options.backend_options(threads).items():
        words += [f"--{name}", str(value)]

    def own() -> list[float]:
        ours.append(measure_own_start(path, words))
        return [ours[-1].end]

    def other(_: str) -> list[float]:
        assert peer is not None
        theirs.append(peer.run_cold())
        return [theirs[-1].end]

    # After the first process, which is not counted, the file lies in the page cache.
    measure_own_start(path, words)
    rounds = run_rounds([samples], options.repetitions, own, theirs=None if peer is None else other)
    for _ in rounds:
        pass


def _cells(starts: "Sequence[ColdStart]", *, first: bool) -> list[str]:
    """Medians: the first token where it is known apart, the end, and the peak."""
    if not starts:
        return ["–", "–", "–"] if first else ["–", "–"]
    cells = [f"{statistics.median(s.first_token for s in starts):.3f}"] if first else []
    cells.append(f"{statistics.median(s.end for s in starts):.3f}")
    peak = statistics.median(s.peak for s in starts)
    return [*cells, format_bytes(peak) if peak else "–"]
