"""`pellucid bench throughput`: many sequences at once, in llama-batched-bench's rows, or many
requests through the engine, as `vllm bench throughput` measures them.
"""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import click

from ..errors import ConfigError
from ..units import format_count
from .bench_options import BenchOptions, Numbers, bench_options, size_options
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
    from ..measure.bench_offline import OfflineLoad
    from ..measure.bench_peers import Peer, Setup
    from ..measure.bench_rounds import Samples

__all__ = ["throughput"]


@click.command()
@bench_options
@click.option(
    "-npp", "prompts", type=Numbers(1), default="128", show_default=True, help="Prompt lengths."
)
@click.option(
    "-ntg",
    "outputs",
    type=Numbers(1),
    default="32",
    show_default=True,
    help="How many tokens to decode after each prompt.",
)
@click.option(
    "-npl",
    "sequences",
    type=Numbers(1, 4096),
    default="1,8,32",
    show_default=True,
    help="How many sequences at once.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(1, 100_000),
    help="Instead: so many requests through the whole engine, which batches them itself. It "
    "decodes without drafts.",
)
@click.option(
    "--input-len",
    type=click.IntRange(1, 1 << 20),
    default=128,
    show_default=True,
    help="With --num-prompts: tokens of each prompt.",
)
@click.option(
    "--output-len",
    type=click.IntRange(1, 1 << 20),
    default=128,
    show_default=True,
    help="With --num-prompts: tokens of each answer.",
)
@click.option(
    "--dataset",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.jsonl",
    help='With --num-prompts: prompts from this file, a line each: {"prompt": "…"}.',
)
@size_options
@debug_option
def throughput(
    options: BenchOptions,
    prompts: tuple[int, ...],
    outputs: tuple[int, ...],
    sequences: tuple[int, ...],
    num_prompts: int | None,
    input_len: int,
    output_len: int,
    dataset: Path | None,
    batch_size: tuple[int, ...],
    ubatch_size: tuple[int, ...],
) -> None:
    """Measure many sequences at once, in tokens per second of all together: mean ± standard
    deviation.

    \b
    PP, TG, B   tokens of a prompt, decoded tokens, sequences at once
    N_KV        tokens in the cache at the end
    S_PP, S_TG  speed of prefill and of decode; S: of both together

    Logits are computed and no token is chosen, as by llama-batched-bench. With --num-prompts all
    requests go through the whole engine at once: requests/s, tokens/s and output tokens/s, as by
    vLLM's offline throughput.
    """
    with_sizes = len(batch_size) > 1 or len(ubatch_size) > 1
    if num_prompts is not None:
        if with_sizes:
            raise ConfigError("--num-prompts takes one --batch-size and one --ubatch-size")
        _run_offline(
            options, num_prompts, input_len, output_len, dataset, min(*batch_size, *ubatch_size)
        )
        return
    if dataset is not None:
        raise ConfigError("--dataset needs --num-prompts")
    # The columns.
    columns = model_columns(options, with_sizes)
    columns += [("PP", 5), ("TG", 5), ("B", 4), ("N_KV", 6)]
    columns += [("S_PP t/s", 17), ("S_TG t/s", 17), ("S t/s", 17)]
    if options.roof:
        columns += [("PP of roof", 9), ("by", 10), ("TG of roof", 9), ("by", 10)]
    if options.against:
        columns += [(f"{options.against} S_PP", 17), (f"{options.against} S_TG", 17)]
        columns += [("ratio PP (quartiles)", 20), ("ratio TG (quartiles)", 20)]
    # Measure. A shape that is interrupted leaves the rounds that it finished.
    shapes = [(p, n, b) for p in prompts for n in outputs for b in sequences]
    longest = max(prompts) + max(outputs)
    with BenchRun(RowPrinter("throughput", options.form, columns), options).running() as run:
        for model, setup in run.models(
            batch_size, ubatch_size, sequences=max(sequences), longest=longest
        ):
            for prompt, output, many in shapes:
                found = _Batch(prompt, output, many)
                progress(f"{model.path.name}: {many} x {prompt}+{output}")
                try:
                    found.measure(model, options, run.peer)
                finally:
                    if found.decode.ours:
                        cells = model_cells(model, setup, with_sizes)
                        cells += found.cells(options.roof, run.peer)
                        record = {**common_record(model, setup), **found.record(run.peer)}
                        run.row(model.path, model.config, found.columns(), cells, record)


class _Batch:
    """One shape, and what was measured of it."""

    def __init__(self, prompt: int, output: int, sequences: int) -> None:
        from ..measure.bench_rounds import Samples

        self.prompt, self.output, self.sequences = prompt, output, sequences
        self.prefill = Samples(prompt * sequences)
        self.decode = Samples(output * sequences)

    def measure(self, model: "BenchModel", options: BenchOptions, peer: "Peer | None") -> None:
        """Fill the samples, round by round."""
        from ..measure.bench_rounds import run_rounds

        prompt, output, many = self.prompt, self.output, self.sequences
        meter = model.roof if options.roof else None

        def ours() -> list[float]:
            model.step(many, 0, 1)  # wakes the threads
            return [model.prefill(many, 0, prompt), model.decode(many, prompt, output)]

        def roof() -> "list[Callable[[], tuple[float, float]]]":
            assert meter is not None
            now, width = meter.take(), max(1, model.chunk // many)
            return [
                lambda: meter.least_seconds(now, many, 0, prompt, width),
                lambda: meter.least_seconds(now, many, prompt, output, 1),
            ]

        rounds = run_rounds(
            [self.prefill, self.decode],
            options.repetitions,
            ours,
            roof=None if meter is None else roof,
            theirs=None
            if peer is None
            else lambda variant: peer.run_batch(prompt, output, many, variant),
            variants=("",) if peer is None else peer.variants,
        )
        for _ in rounds:
            pass

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of prefill and decode together."""
        tokens = (self.prompt + self.output) * self.sequences
        return [tokens / (a + b) for a, b in zip(self.prefill.ours, self.decode.ours, strict=True)]

    def columns(self) -> "list[tuple[str, Samples]]":
        shape = f"{self.prompt}+{self.output} B{self.sequences}"
        return [(f"PP {shape}", self.prefill), (f"TG {shape}", self.decode)]

    def cells(self, with_roof: bool, peer: "Peer | None") -> list[str]:
        n_kv = (self.prompt + self.output) * self.sequences
        cells = [str(n) for n in (self.prompt, self.output, self.sequences, n_kv)]
        cells += [plus_minus(self.prefill.speeds), plus_minus(self.decode.speeds)]
        cells.append(plus_minus(self.speeds))
        if with_roof:
            cells += [*roof_cells(self.prefill), *roof_cells(self.decode)]
        if peer is not None:
            cells += [plus_minus(self.prefill.peer_speeds), plus_minus(self.decode.peer_speeds)]
            cells += [ratio_text(self.prefill), ratio_text(self.decode)]
        return cells

    def record(self, peer: "Peer | None") -> dict[str, object]:
        return {
            "n_prompt": self.prompt,
            "n_gen": self.output,
            "n_sequences": self.sequences,
            "n_kv": (self.prompt + self.output) * self.sequences,
            "samples_ts": self.speeds,
            **speed_record(self.prefill, peer, "_pp"),
            **speed_record(self.decode, peer, "_tg"),
        }


# ---- requests through the whole engine


def _run_offline(
    options: BenchOptions,
    num_prompts: int,
    input_len: int,
    output_len: int,
    dataset: Path | None,
    chunk: int,
) -> None:
    """One row per model and number of threads."""
    from ..measure.bench_offline import file_load, random_load
    from ..measure.bench_peers import Setup
    from ..measure.bench_rounds import Samples
    from ..measure.headers import read_headers

    if options.against not in (None, "vllm"):
        raise ConfigError(
            f"--against is {options.against!r}; it batches no requests by itself: --num-prompts is "
            "measured beside vllm"
        )
    columns = [("model", max(len(path.stem) for path in options.paths())), ("threads", 7)]
    columns += [("requests", 8), ("input", 8), ("output", 8), ("requests/s", 12)]
    columns += [("tokens/s", 17), ("output tokens/s", 17)]
    if options.against:
        columns += [(f"{options.against} tokens/s", 17), ("ratio (quartiles)", 20)]
    with BenchRun(RowPrinter("throughput", options.form, columns), options).running() as run:
        for path in options.paths():
            config = read_headers(path).config
            if dataset is None:
                load = random_load(num_prompts, input_len, output_len, config.vocab_size)
            else:
                load = file_load(dataset, num_prompts, output_len, path)
            for threads in options.thread_counts():
                setup = Setup(
                    threads,
                    chunk,
                    chunk,
                    longest=load.longest,
                    sequences=num_prompts,
                    vocab_size=config.vocab_size,
                )
                samples = Samples(load.input_tokens + load.output_tokens)
                progress(f"{path.name}: {format_count(num_prompts, 'request')}")
                try:
                    run.open_peer(path, setup)
                    _measure_offline(path, setup, load, options, run.peer, samples)
                finally:
                    if samples.ours:
                        cells, record = _offline_row(path, setup, load, samples, run.peer)
                        run.row(path, config, [("tokens/s", samples)], cells, record)


def _measure_offline(
    path: Path,
    setup: "Setup",
    load: "OfflineLoad",
    options: BenchOptions,
    peer: "Peer | None",
    samples: "Samples",
) -> None:
    """Fill `samples`, round by round."""
    from ..measure.bench_offline import OfflineEngine
    from ..measure.bench_rounds import run_rounds

    engine_options = {
        **options.backend_options(setup.threads),
        "backend": options.backend,
        "kv_cache_dtype": options.kv_dtype,
        "quantization": options.quantization,
        "max_num_batched_tokens": setup.ubatch,
    }

    def theirs(variant: str) -> list[float]:
        assert peer is not None
        return [peer.run_requests(load.prompts, load.outputs)]

    engine = OfflineEngine(path, load.longest, engine_options)
    try:
        rounds = run_rounds(
            [samples],
            options.repetitions,
            lambda: [engine.run(load)],
            theirs=None if peer is None else theirs,
        )
        for _ in rounds:
            pass
    finally:
        engine.close()


def _offline_row(
    path: Path, setup: "Setup", load: "OfflineLoad", samples: "Samples", peer: "Peer | None"
) -> tuple[list[str], dict[str, object]]:
    """(the cells, the record)."""
    requests = [len(load.prompts) / seconds for seconds in samples.ours]
    outputs = [load.output_tokens / seconds for seconds in samples.ours]
    counts = (setup.threads, len(load.prompts), load.input_tokens, load.output_tokens)
    cells = [path.stem, *map(str, counts), f"{fmean(requests):.3f}"]
    cells += [plus_minus(samples.speeds), plus_minus(outputs)]
    if peer is not None:
        cells += [plus_minus(samples.peer_speeds), ratio_text(samples)]
    record = {
        "model_filename": str(path),
        "n_threads": setup.threads,
        "num_requests": len(load.prompts),
        "num_input_tokens": load.input_tokens,
        "num_output_tokens": load.output_tokens,
        "requests_per_second": fmean(requests),
        "output_tokens_per_second": fmean(outputs),
        **speed_record(samples, peer),
    }
    return cells, record
