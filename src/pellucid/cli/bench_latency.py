"""`pellucid bench latency`: the speed of one sequence, in llama-bench's rows and columns."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..units import format_bytes
from .bench_options import BenchOptions, Numbers, Pair, bench_options
from .bench_table import RowPrinter
from .options import debug_option

if TYPE_CHECKING:
    from ..measure.bench_model import BenchModel
    from ..measure.bench_peers import Peer, Setup
    from ..measure.bench_rounds import Samples
    from ..measure.bench_tests import Test

__all__ = ["latency"]


@click.command()
@bench_options
@click.option(
    "-p", "--n-prompt", type=Numbers(0), default="512", show_default=True, help="Prompt lengths."
)
@click.option(
    "-n",
    "--n-gen",
    type=Numbers(0),
    default="128",
    show_default=True,
    help="How many tokens to decode.",
)
@click.option("-pg", "pairs", type=Pair(), multiple=True, help="A prompt and then tokens: 512,128.")
@click.option(
    "-d",
    "--n-depth",
    type=Numbers(0),
    default="0",
    show_default=True,
    help="Tokens that lie in the cache before.",
)
@click.option(
    "-b",
    "--batch-size",
    type=Numbers(1),
    default="2048",
    show_default=True,
    help="Tokens of a prompt that are handed over at once.",
)
@click.option(
    "-ub",
    "--ubatch-size",
    type=Numbers(1),
    default="512",
    show_default=True,
    help="Tokens of a prompt in a step; at most --batch-size.",
)
@debug_option
def latency(
    options: BenchOptions,
    n_prompt: tuple[int, ...],
    n_gen: tuple[int, ...],
    pairs: tuple[tuple[int, int], ...],
    n_depth: tuple[int, ...],
    batch_size: tuple[int, ...],
    ubatch_size: tuple[int, ...],
) -> None:
    """Measure the speed of one sequence, in tokens per second: mean ± standard deviation.

    \b
    pp512          prefill of a prompt of 512 tokens
    tg128          decode of 128 tokens
    pp512+tg128    both, one after the other
    … @ d4096      behind 4,096 tokens

    Logits are computed and no token is chosen, as by llama-bench. With --against, rounds of ours
    and of the peer alternate; the ratio is the median of the rounds, with its quartiles.
    """
    from ..measure.bench_tests import build_tests

    tests = build_tests(n_prompt, n_gen, pairs, n_depth)
    paths = options.paths()
    columns = _Columns(with_sizes=len(batch_size) > 1 or len(ubatch_size) > 1, options=options)
    printer = RowPrinter("latency", options.form, *columns.layout(paths, tests))
    done: list[tuple[Path, Test, Samples]] = []
    try:
        with ExitStack() as stack:
            peer = None
            if options.against is not None:
                from ..measure.bench_peers import LlamaCpp

                peer = LlamaCpp(options.llama_cpp)
                stack.callback(peer.close)
            for path in paths:
                for model, setup in _setups(options, path, tests, batch_size, ubatch_size):
                    if peer is not None:
                        peer.open(path, setup)
                    for test in tests:
                        samples = _measure(model, setup, test, options, peer)
                        printer.row(
                            columns.cells(model, setup, test, samples),
                            _record(model, setup, test, samples, peer),
                        )
                        done.append((path, test, samples))
    finally:
        printer.end(repetitions=options.repetitions)


def _setups(
    options: BenchOptions,
    path: Path,
    tests: "list[Test]",
    batch_size: tuple[int, ...],
    ubatch_size: tuple[int, ...],
) -> "Iterator[tuple[BenchModel, Setup]]":
    """Load the model for each number of threads and each size of a step."""
    from ..measure.bench_model import BenchModel
    from ..measure.bench_peers import Setup

    longest = max(test.context for test in tests)
    for threads in options.thread_counts():
        for batch in batch_size:
            for ubatch in ubatch_size:
                model = BenchModel(
                    path,
                    backend=options.backend,
                    options=options.backend_options(threads),
                    kv_dtype=options.kv_dtype,
                    longest=longest,
                    chunk=min(batch, ubatch),
                )
                yield model, Setup(threads, batch, ubatch, model.kv_dtypes, longest)


def _measure(
    model: "BenchModel", setup: "Setup", test: "Test", options: BenchOptions, peer: "Peer | None"
) -> "Samples":
    from ..measure.bench_model import Roof
    from ..measure.bench_rounds import Samples, run_rounds

    samples = Samples(test.num_tokens)
    meter = Roof(model) if options.roof and Roof.is_known(model) else None

    def ours() -> list[float]:
        model.fill(1, test.depth)
        if not test.prompt:
            model.step(1, test.depth, 1)  # wakes the threads
        seconds = model.prefill(1, test.depth, test.prompt)
        return [seconds + model.decode(1, test.depth + test.prompt, test.output)]

    def roof() -> list[tuple[float, float]]:
        assert meter is not None
        now, end = meter.take(), test.depth + test.prompt
        prompt = meter.least_seconds(now, 1, test.depth, test.prompt, model.chunk)
        output = meter.least_seconds(now, 1, end, test.output, 1)
        return [(prompt[0] + output[0], prompt[1] + output[1])]

    rounds = run_rounds(
        [samples],
        options.repetitions,
        ours,
        roof=None if meter is None else roof,
        theirs=None if peer is None else lambda variant: [peer.run_test(test, variant)],
        variants=("",) if peer is None else peer.variants,
    )
    for _ in rounds:
        pass
    return samples


class _Columns:
    """Which columns the table has, and what stands in them."""

    def __init__(self, *, with_sizes: bool, options: BenchOptions) -> None:
        self._sizes, self._roof, self._peer = with_sizes, options.roof, options.against

    def layout(self, paths: list[Path], tests: "list[Test]") -> tuple[list[str], list[int]]:
        """(header, widths)."""
        columns = [
            ("model", max(len(path.stem) for path in paths)),
            ("size", 8),
            ("params", 8),
            ("backend", 13),
            ("threads", 7),
        ]
        if self._sizes:
            columns += [("n_batch", 7), ("n_ubatch", 8)]
        columns += [("test", max(len(test.name) for test in tests)), ("t/s", 17)]
        if self._roof:
            columns += [("of roof", 9), ("bound by", 10)]
        if self._peer:
            columns += [(f"{self._peer} t/s", 17), ("ratio (quartiles)", 20)]
        return [name for name, _ in columns], [width for _, width in columns]

    def cells(
        self, model: "BenchModel", setup: "Setup", test: "Test", samples: "Samples"
    ) -> list[str]:
        from ..measure.bench_model import backend_label

        cells = [
            model.path.stem,
            format_bytes(model.file_bytes),
            f"{model.num_parameters / 1e6:.1f} M",
            backend_label(model.backend),
            str(setup.threads),
        ]
        if self._sizes:
            cells += [str(setup.batch), str(setup.ubatch)]
        cells += [test.name, _plus_minus(samples.speeds)]
        if self._roof:
            share = samples.roof_share
            cells.append("–" if share is None else f"{share[0]:.0%}–{share[1]:.0%}")
            cells.append(samples.bound or "–")
        if self._peer:
            ratio = samples.ratio
            assert ratio is not None
            cells.append(_plus_minus(samples.peer_speeds))
            cells.append(f"{ratio.median:.2f} ({ratio.lower:.2f} – {ratio.upper:.2f})")
        return cells


def _plus_minus(speeds: list[float]) -> str:
    """Mean and standard deviation, as llama-bench shows them."""
    from ..measure.bench_tests import mean_and_deviation

    mean, deviation = mean_and_deviation(speeds)
    return f"{mean:.2f} ± {deviation:.2f}"


def _record(
    model: "BenchModel", setup: "Setup", test: "Test", samples: "Samples", peer: "Peer | None"
) -> dict[str, Any]:
    """The same for programs, under llama-bench's names where it has one."""
    from .. import __version__
    from ..cpu import detect_cpu
    from ..measure.bench_model import backend_label
    from ..measure.bench_tests import mean_and_deviation

    nanoseconds = [round(seconds * 1e9) for seconds in samples.ours]
    mean_ns, deviation_ns = mean_and_deviation(nanoseconds)
    mean, deviation = mean_and_deviation(samples.speeds)
    k, v = setup.kv_dtypes
    record: dict[str, Any] = {
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
        "n_prompt": test.prompt,
        "n_gen": test.output,
        "n_depth": test.depth,
        "test": test.name,
        "test_time": samples.started_at,
        "avg_ns": round(mean_ns),
        "stddev_ns": round(deviation_ns),
        "avg_ts": mean,
        "stddev_ts": deviation,
        "roof_share_least": samples.roof_share[0] if samples.roof_share else None,
        "roof_share_most": samples.roof_share[1] if samples.roof_share else None,
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
    return record
