"""`pellucid bench latency`: the speed of one sequence, in llama-bench's rows and columns."""

from typing import TYPE_CHECKING

import click

from .bench_options import BenchOptions, Numbers, Pair, bench_options, size_options
from .bench_run import (
    BenchRun,
    common_record,
    model_cells,
    model_columns,
    plus_minus,
    progress,
    ratio_text,
    roof_cells,
    speed_record,
)
from .bench_table import RowPrinter
from .options import debug_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..measure.bench_model import BenchModel
    from ..measure.bench_peers import Peer
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
@size_options
@click.option(
    "--cold-start",
    is_flag=True,
    help="Instead: a fresh process from its start to the first token, and its peak of memory.",
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
    cold_start: bool,
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
    from ..measure.bench_rounds import Samples
    from ..measure.bench_tests import build_tests

    if cold_start:
        from .bench_cold import run_cold_start

        run_cold_start(options)
        return
    # The rows and the columns.
    tests = build_tests(n_prompt, n_gen, pairs, n_depth)
    with_sizes = len(batch_size) > 1 or len(ubatch_size) > 1
    columns = model_columns(options, with_sizes)
    columns += [("test", max(len(test.name) for test in tests)), ("t/s", 17)]
    columns += [("of roof", 9), ("bound by", 10)] if options.roof else []
    if options.against:
        columns += [(f"{options.against} t/s", 17), ("ratio (quartiles)", 20)]
    longest = max(test.context for test in tests)
    # Measure. A test that is interrupted leaves the rounds that it finished.
    with BenchRun(RowPrinter("latency", options.form, columns), options).running() as run:
        for model, setup in run.models(batch_size, ubatch_size, sequences=1, longest=longest):
            for test in tests:
                samples = Samples(test.num_tokens)
                progress(f"{model.path.name}: {test.name}")
                try:
                    _measure(model, test, options, run.peer, samples)
                finally:
                    if samples.ours:
                        cells = [*model_cells(model, setup, with_sizes), test.name]
                        cells.append(plus_minus(samples.speeds))
                        cells += roof_cells(samples) if options.roof else []
                        if run.peer is not None:
                            cells += [plus_minus(samples.peer_speeds), ratio_text(samples)]
                        record = {
                            **common_record(model, setup),
                            "n_prompt": test.prompt,
                            "n_gen": test.output,
                            "n_depth": test.depth,
                            "test": test.name,
                            **speed_record(samples, run.peer),
                        }
                        run.row(model.path, model.config, [(test.name, samples)], cells, record)


def _measure(
    model: "BenchModel",
    test: "Test",
    options: BenchOptions,
    peer: "Peer | None",
    samples: "Samples",
) -> None:
    """Fill `samples`, round by round."""
    from ..measure.bench_rounds import run_rounds

    meter = model.roof if options.roof else None

    def ours() -> list[float]:
        model.fill(1, test.depth)
        if not test.prompt:
            model.step(1, test.depth, 1)  # wakes the threads
        seconds = model.prefill(1, test.depth, test.prompt)
        return [seconds + model.decode(1, test.depth + test.prompt, test.output)]

    def roof() -> "list[Callable[[], tuple[float, float]]]":
        assert meter is not None
        now, end = meter.take(), test.depth + test.prompt

        def least() -> tuple[float, float]:
            prompt = meter.least_seconds(now, 1, test.depth, test.prompt, model.chunk)
            output = meter.least_seconds(now, 1, end, test.output, 1)
            return prompt[0] + output[0], prompt[1] + output[1]

        return [least]

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
