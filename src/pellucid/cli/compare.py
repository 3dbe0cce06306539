"""`pellucid compare`: models beside a base, in one table: size, what each loses, and how fast it
is; which of them are dominated, and which one to take.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..backends.registry import BACKENDS
from ..errors import ConfigError
from ..units import format_bytes
from ..weights import hub
from .bench_run import progress
from .options import debug_option, json_option
from .perplexity import read_text
from .terminal import one_line, print_table, say

if TYPE_CHECKING:
    from ..engine_config import EngineConfig
    from ..measure.compare import Comparison, Entry
    from ..measure.compare_report import Report, Row
    from ..measure.perplexity import Estimate

__all__ = ["compare"]

_KV = ":kv="
MAX_MODELS = 64


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL…")
@click.option(
    "--base",
    required=True,
    metavar="MODEL",
    help="The model that all others are compared with: usually the original, in F16 or BF16.",
)
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The text to predict. No model should have been calibrated on it.",
)
@click.option("--n-ctx", type=click.IntRange(8, 1 << 24), help="Tokens per chunk.  [default: 512]")
@click.option(
    "--chunks", type=click.IntRange(min=2), help="Use the first so many chunks.  [default: all]"
)
@click.option("--speed/--no-speed", default=True, help="Measure tokens/s too.  [default: yes]")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.svg",
    help="Draw bytes against KL divergence, and decode speed (needs matplotlib).",
)
@click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default="native",
    show_default=True,
    help="What computes.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Threads of the native backend.")
@click.option("--isa", help="Its kernels, by their instruction set.")
@click.option(
    "--kv-dtype",
    default="auto",
    show_default=True,
    help="What keys and values are kept in, where :kv= does not say it.",
)
@json_option
@debug_option
def compare(
    models: tuple[str, ...],
    base: str,
    text_file: Path,
    n_ctx: int | None,
    chunks: int | None,
    speed: bool,
    plot: Path | None,
    backend: str,
    threads: int | None,
    isa: str | None,
    kv_dtype: str,
    as_json: bool,
) -> None:
    """Compare models with a base, and say which of them to take.

    Each MODEL is a .gguf file, a folder of safetensors, or a name, in any format. MODEL:kv=int8
    runs it with that KV cache dtype (MODEL:kv=int8,int4: keys, values). One model may be given with
    several. All must have the base's vocabulary.

    \b
    perplexity   of the text, in chunks of 512 tokens, as by llama-perplexity
    KL           how far the predictions are from the base's, in nats per token
    same top     how often the likeliest token is the base's
    noise floor  KL of the base from itself on the other backend: what rounding
                 alone changes

    A row is dominated if another is as small, as fast and as close to the base, and better in size
    or closeness. Chunks and speeds are measured in turns. Ctrl-C ends the run with the result so
    far.
    """
    from ..engine.options import build_engine_config
    from ..measure.compare import open_comparison
    from ..measure.compare_plot import check_plot, plot_comparison
    from ..measure.compare_report import build_report
    from ..measure.compare_speed import Speed, run_speeds, speed_test

    # Check the options before a model is fetched, and all models before one is loaded.
    given = {"threads": threads, "isa": isa}
    config = build_engine_config(
        {
            "backend": backend,
            "kv_cache_dtype": _plain_dtype(kv_dtype),
            **{name: value for name, value in given.items() if value is not None},
        }
    )
    if plot is not None:
        check_plot(plot)
    text = read_text(text_file)
    entries = _entries(base, models, config)
    comparison = open_comparison(entries, text, n_ctx=n_ctx, chunks=chunks)
    # Run to the end, or until Ctrl-C.
    test = speed_test(comparison) if speed else None
    speeds = [Speed() for _ in entries]
    interrupted = False
    watch = _Watch()
    try:
        for done, total in comparison.run():
            watch.show("chunks", done, total)
        if test is not None:
            watch = _Watch()
            for done, total in run_speeds(entries, test, speeds):
                watch.show("speeds", done, total)
    except KeyboardInterrupt:
        interrupted = True
    progress("")
    if not comparison.num_chunks(0):  # interrupted before the first chunk
        raise KeyboardInterrupt
    # Show the result.
    report = build_report(comparison, speeds, test, is_complete=not interrupted)
    if plot is not None and not interrupted:
        plot_comparison(report, plot)
    if as_json:
        click.echo(json.dumps({"text": str(text_file), **asdict(report)}))
    else:
        _print(report)
    if interrupted:
        without = "" if plot is None else f"; {plot} is not written"
        say(f"interrupted: {_so_far(comparison)}{without}")
        raise click.exceptions.Exit(130)


# ---- the models


def _entries(base: str, models: Sequence[str], config: "EngineConfig") -> "list[Entry]":
    """The base, and the others without it. Raises ConfigError for an entry that is given twice.
    Models that are not here are fetched.
    """
    from ..measure.compare import Entry

    if len(models) > MAX_MODELS:
        raise ConfigError(f"{len(models)} models are given; at most {MAX_MODELS} are compared")
    found: dict[tuple[Path, str], str] = {}
    for text in (base, *models):
        name, kv_dtype = _split(text, config.kv_cache_dtype)
        key = hub.resolve_model(name, progress=True).resolve(), kv_dtype
        if key not in found:
            found[key] = text
        elif key != next(iter(found)):  # the base has its row anyway
            raise ConfigError(f"{text} is given twice; give each model once per KV cache dtype")
    if len(found) == 1:
        raise ConfigError(f"no model is given beside the base {base}; give one, or another :kv=")
    names = _short_names(list(found.values()))
    return [
        Entry(name, path, replace(config, kv_cache_dtype=kv_dtype))
        for name, (path, kv_dtype) in zip(names, found, strict=True)
    ]


def _split(text: str, kv_dtype: str) -> tuple[str, str]:
    """(the model, the KV cache dtype) of an entry; without :kv= that of all entries."""
    if _KV not in text or hub.existing_path(text) is not None:
        return text, kv_dtype
    name, _, asked = text.rpartition(_KV)
    if not name or not asked:
        raise ConfigError(f"{text!r} must be a model, {_KV} and a dtype: model.gguf{_KV}int8")
    return name, _plain_dtype(asked)


def _plain_dtype(asked: str) -> str:
    """A KV cache dtype, or two with a comma, by the engine's names."""
    from ..measure.kv_formula import KV_ALIASES

    return ",".join(KV_ALIASES.get(word.strip(), word.strip()) for word in asked.split(","))


def _short_names(texts: Sequence[str]) -> list[str]:
    """Names for the table: without folder and suffix, unless two would be the same."""

    def short(text: str) -> str:
        name, mark, kv_dtype = text.partition(_KV)
        path = hub.existing_path(name)
        return (name if path is None else path.name.removesuffix(".gguf")) + mark + kv_dtype

    names = [short(text) for text in texts]
    return [
        name if names.count(name) == 1 else text for name, text in zip(names, texts, strict=True)
    ]


# ---- the output


class _Watch:
    """Progress on one line of a terminal, with the time that is left."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def show(self, what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            left = round((time.monotonic() - self._start) / done * (total - done))
            progress(f"{done} of {total} {what} · about {left // 60}:{left % 60:02d} left")


def _print(report: "Report") -> None:
    """The table, the noise floor, how all was measured, and the verdict."""
    kv_differs = len({row.kv_bytes_per_token for row in report.results}) > 1
    header = ["model", "size", "bits", *(["KV/token"] if kv_differs else []), "perplexity"]
    header += ["KL", "median", "99 %", "max", "same top"]
    header += ["prefill t/s", "decode t/s"] if report.speed else []
    rows = [_cells(row, kv_differs, report.speed is not None) for row in report.results]
    print_table([*header, ""], rows)
    click.echo()
    floor = report.noise_floor
    if floor is not None:
        click.echo(
            f"noise floor: KL {_plus_minus(floor.kl)}, median {_nats(floor.kl_median)}, 99 % "
            f"{_nats(floor.kl_99)}, max {_nats(floor.kl_max)}, same top {floor.same_top.value:.2%} "
            f"({report.base} on the {floor.backend} backend, {floor.num_chunks} chunks)"
        )
    elif report.noise_floor_obstacle is not None:
        click.echo(one_line(f"noise floor: not measured; {report.noise_floor_obstacle}"))
    scored = max(row.num_scored_tokens for row in report.results)
    chunks = max(row.num_chunks for row in report.results)
    click.echo(
        f"measured: protocol {report.protocol}, {chunks} chunks of {report.n_ctx}, {scored} tokens "
        "scored; KL in nats, ± standard error"
    )
    if report.speed is not None:
        click.echo(
            f"speed: prefill of {report.speed.prompt} tokens, decode of {report.speed.output} "
            f"behind them; medians of {report.speed.rounds} rounds, in turns"
        )
    if report.recommendation is not None:
        click.echo(f"\n{one_line(report.recommendation.sentence)}")


def _cells(row: "Row", with_kv: bool, with_speed: bool) -> list[str]:
    note = "base" if row.is_base else ""
    if row.dominated_by is not None:
        note = f"dominated by {row.dominated_by}"
    ppl = row.perplexity
    cells = [row.name, format_bytes(row.file_bytes), f"{row.bits_per_weight:.2f}"]
    cells += [format_bytes(row.kv_bytes_per_token)] if with_kv else []
    cells.append("–" if ppl is None else f"{ppl.value:.4f} ± {ppl.error:.4f}")
    if row.kl is not None and row.same_top is not None:
        figures = [row.kl_median, row.kl_99, row.kl_max]
        cells += [_plus_minus(row.kl), *map(_nats, figures), f"{row.same_top.value:.2%}"]
    else:
        cells += ["0", "0", "0", "0", "100%"] if row.is_base else ["–"] * 5
    if with_speed:
        cells += ["–" if v is None else f"{v:.1f}" for v in (row.prefill, row.decode)]
    return [*cells, note]


def _plus_minus(estimate: "Estimate") -> str:
    places = _places(estimate.value)
    return f"{estimate.value:.{places}} ± {estimate.error:.{places}}"


def _nats(value: float | None) -> str:
    """Two digits of small numbers, and five places of others."""
    return "–" if value is None else f"{value:.{_places(value)}}"


def _places(value: float) -> str:
    return "5f" if abs(value) >= 0.0001 else "1e"


def _so_far(comparison: "Comparison") -> str:
    """Which models have been compared, and on how much."""
    total = len(comparison.windows)
    counts: dict[int, list[str]] = {}
    for i, entry in enumerate(comparison.entries[1:], 1):
        counts.setdefault(comparison.num_chunks(i), []).append(entry.name)
    return "; ".join(
        f"{', '.join(names)}: {count} of {total} chunks" for count, names in counts.items()
    )
