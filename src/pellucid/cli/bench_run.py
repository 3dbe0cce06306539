"""What the benchmarks of a model share: the models one after another, beside a peer, with rows
that are printed as they come, and a summary.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..units import format_bytes
from .bench_options import BenchOptions
from .bench_table import RowPrinter

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..measure.bench_model import BenchModel
    from ..measure.bench_peers import Peer, Setup
    from ..measure.bench_rounds import Samples
    from ..measure.bench_summary import Result

__all__ = [
    "BenchRun",
    "common_record",
    "model_cells",
    "model_columns",
    "plus_minus",
    "progress",
    "ratio_text",
    "roof_cells",
    "speed_record",
]


class BenchRun:
    """One run: its results so far, and its last lines, which are also printed after an
    interruption.
    """

    def __init__(self, printer: RowPrinter, options: BenchOptions) -> None:
        self._printer, self._options = printer, options
        self._results: list[Result] = []
        self._facts: dict[str, Any] | None = None
        self.peer: Peer | None = None

    @contextmanager
    def running(self) -> "Iterator[BenchRun]":
        """Start the peer, and end both; the last lines are printed in any case."""
        from ..measure.bench_python_peers import open_peer

        options = self._options
        if options.against is not None:
            self.peer = open_peer(
                options.against, llama_cpp=options.llama_cpp, python=options.peer_python
            )
        try:
            yield self
        finally:
            if self.peer is not None:
                self.peer.close()
            progress("")
            self._end()

    def models(
        self, batch_size: Sequence[int], ubatch_size: Sequence[int], *, sequences: int, longest: int
    ) -> "Iterator[tuple[BenchModel, Setup]]":
        """Load each model, for each number of threads and each size of a step, on both sides."""
        from ..measure.bench_model import BenchModel
        from ..measure.bench_peers import Setup

        options = self._options
        for path in options.paths():
            for threads in options.thread_counts():
                for batch in batch_size:
                    for ubatch in ubatch_size:
                        progress(f"loading {path.name}")
                        model = BenchModel(
                            path,
                            backend=options.backend,
                            options=options.backend_options(threads),
                            kv_dtype=options.kv_dtype,
                            quantization=options.quantization,
                            sequences=sequences,
                            longest=longest,
                            chunk=min(batch, ubatch),
                        )
                        setup = Setup(
                            threads,
                            batch,
                            ubatch,
                            model.kv_dtypes,
                            longest,
                            sequences,
                            model.config.vocab_size,
                        )
                        self.open_peer(path, setup)
                        yield model, setup

    def row(
        self,
        path: Path,
        config: "ModelConfig",
        columns: "Sequence[tuple[str, Samples]]",
        cells: Sequence[str],
        record: dict[str, Any],
    ) -> None:
        """Print a row, and keep its ratios for the summary. `columns`: the figures of the row, by
        their names in the summary.
        """
        from ..measure.bench_summary import Result, model_shape

        progress("")
        self._printer.row(cells, record)
        for name, samples in columns:
            if samples.ratio is not None:
                self._results.append(
                    Result(
                        name,
                        model_shape(config),
                        str(path),
                        statistics.median(samples.speeds),
                        statistics.median(samples.peer_speeds),
                        samples.ratio.median,
                    )
                )

    def open_peer(self, path: Path, setup: "Setup") -> None:
        """Open this model in the peer, if there is one; print its facts above the table."""
        if self.peer is None:
            return
        progress(f"{self.peer.name} loads {path.name}")
        self.peer.open(path, setup)
        if self._facts is None:
            facts = self.peer.facts()
            self._facts = asdict(facts)
            progress("")
            self._printer.note(str(facts))
            self._printer.note("")

    def _end(self) -> None:
        """The means over several files, and the last line."""
        from ..measure.bench_summary import summarize

        about: dict[str, Any] = {"repetitions": self._options.repetitions}
        if self._facts is not None:
            about["peer"] = self._facts
        summaries = summarize(self._results)
        if summaries and summaries[0].files > 1:
            about["summary"] = [asdict(found) for found in summaries]
            files, models = summaries[0].files, summaries[0].models
            for title, means in (
                (f"same file ({files})", [s.same_file for s in summaries]),
                (f"best format of either ({models})", [s.best_format for s in summaries]),
                (f"the peer's best format ({models})", [s.peer_format for s in summaries]),
            ):
                shown = ", ".join(
                    f"{s.column} {mean:.2f}" for s, mean in zip(summaries, means, strict=True)
                )
                self._printer.note(f"geometric mean of the ratios, {title}: {shown}")
        self._printer.end(**about)


def progress(text: str) -> None:
    """One line on a terminal that says what runs; "" takes it away."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", err=True, nl=False)


def model_columns(options: BenchOptions, with_sizes: bool) -> list[tuple[str, int]]:
    """(title, width) of the first columns of a row."""
    columns = [
        ("model", max(len(path.stem) for path in options.paths())),
        ("size", 8),
        ("params", 8),
        ("backend", 13),
        ("threads", 7),
    ]
    return columns + ([("n_batch", 7), ("n_ubatch", 8)] if with_sizes else [])


def model_cells(model: "BenchModel", setup: "Setup", with_sizes: bool) -> list[str]:
    """The cells of these columns."""
    from ..measure.bench_model import backend_label

    cells = [
        model.path.stem,
        format_bytes(model.file_bytes),
        f"{model.num_parameters / 1e6:.1f} M",
        backend_label(model.backend),
        str(setup.threads),
    ]
    return cells + ([str(setup.batch), str(setup.ubatch)] if with_sizes else [])


def plus_minus(speeds: Sequence[float]) -> str:
    """Mean and standard deviation, as llama-bench shows them."""
    from ..measure.bench_tests import mean_and_deviation

    if not speeds:
        return "–"
    mean, deviation = mean_and_deviation(speeds)
    return f"{mean:.2f} ± {deviation:.2f}"


def ratio_text(samples: "Samples") -> str:
    """The median of the rounds, and the quartiles."""
    ratio = samples.ratio
    if ratio is None:
        return "–"
    return f"{ratio.median:.2f} ({ratio.lower:.2f} – {ratio.upper:.2f})"


def roof_cells(samples: "Samples") -> list[str]:
    """The share of the machine's ceiling, and what binds."""
    share = samples.roof_share
    return ["–" if share is None else f"{share[0]:.0%}–{share[1]:.0%}", samples.bound or "–"]


def common_record(model: "BenchModel", setup: "Setup") -> dict[str, Any]:
    """What all rows of a model have, under llama-bench's names where it has one."""
    from .. import __version__
    from ..cpu import detect_cpu
    from ..measure.bench_model import backend_label

    k, v = setup.kv_dtypes
    return {
        "build": __version__,
        "cpu_info": detect_cpu().name,
        "backends": backend_label(model.backend),
        "model_filename": str(model.path),
        "model_size": model.file_bytes,
        "model_n_params": model.num_parameters,
        "n_batch": setup.batch,
        "n_ubatch": setup.ubatch,
        "n_threads": setup.threads,
        "type_k": k,
        "type_v": v,
    }


def speed_record(samples: "Samples", peer: "Peer | None", suffix: str = "") -> dict[str, Any]:
    """One figure for programs: ours, the roof, the peer, and the ratio."""
    from ..measure.bench_tests import mean_and_deviation

    nanoseconds = [round(seconds * 1e9) for seconds in samples.ours]
    mean_ns, deviation_ns = mean_and_deviation(nanoseconds)
    mean, deviation = mean_and_deviation(samples.speeds)
    share = samples.roof_share
    record: dict[str, Any] = {
        "test_time": samples.started_at,
        "avg_ns": round(mean_ns),
        "stddev_ns": round(deviation_ns),
        "avg_ts": mean,
        "stddev_ts": deviation,
        "roof_share_least": share[0] if share else None,
        "roof_share_most": share[1] if share else None,
        "bound": samples.bound,
        "samples_ns": nanoseconds,
        "samples_ts": samples.speeds,
    }
    if peer is not None and samples.ratio is not None:
        theirs, spread = mean_and_deviation(samples.peer_speeds)
        record |= {
            "peer": peer.name,
            "peer_variant": samples.variant,
            "peer_avg_ts": theirs,
            "peer_stddev_ts": spread,
            "ratio": samples.ratio.median,
            "peer_samples_ts": samples.peer_speeds,
            "peer_tried_ts": samples.tried,
            "ratio_spread": asdict(samples.ratio),
        }
    return {f"{key}{suffix}": value for key, value in record.items()}
