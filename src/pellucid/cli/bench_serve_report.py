"""What `pellucid bench serve` prints and saves."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..units import format_count
from .terminal import print_table

if TYPE_CHECKING:
    from ..measure.load_rounds import LoadPlan, MeasuredRun, RoundResults

__all__ = ["print_ratios", "print_run", "save_records"]

MAX_SHOWN_ERRORS = 10
CACHED_SHARE = 0.1  # of input tokens in the prefix cache: more is worth a sentence

# Figures of a comparison: key of the summary, name, decimals.
_RATES = (
    ("request_throughput", "requests/s", 2),
    ("request_goodput", "goodput, requests/s", 2),
    ("output_throughput", "output tokens/s", 1),
    ("total_token_throughput", "all tokens/s", 1),
)


def print_run(measured: "MeasuredRun", plan: "LoadPlan") -> None:
    """The tables of one run, and how far they can be trusted."""
    found = measured.summary
    click.echo(f"{measured.url}, model {measured.model}: {_load(plan)}\n")
    # requests and rates
    rows = [
        ("requests answered", f"{found['completed']:,}"),
        ("requests failed", f"{found['failed']:,}"),
        ("most at once", f"{found['max_concurrent_requests']:,}"),
        ("duration, s", f"{found['duration']:.2f}"),
        ("input tokens", f"{found['total_input_tokens']:,}"),
        ("output tokens", f"{found['total_output_tokens']:,}"),
    ]
    rows += [(name, f"{found[key]:,.{digits}f}") for key, name, digits in _RATES if key in found]
    print_table(["run", "value"], rows)
    # times
    columns = ["mean", "median", *_percentiles(plan)]
    rows_of_times = []
    for name in plan.metrics:
        values = (found[f"{column}_{name}_ms"] for column in columns)
        rows_of_times.append(
            [name.upper(), *("–" if value is None else f"{value:,.2f}" for value in values)]
        )
    click.echo()
    print_table(["ms", *(c.upper() if c[0] == "p" else c for c in columns)], rows_of_times)
    # failures and doubts
    click.echo()
    _print_errors(measured)
    for sentence in _remarks(measured, plan):
        click.echo(sentence)


def _load(plan: "LoadPlan") -> str:
    """The load in words."""
    settings = plan.settings
    parts = []
    if plan.trace is not None:
        parts.append(f"arrivals of {plan.trace.name}")
    if plan.request_rate != float("inf"):
        kind = "a mean of" if plan.trace or plan.burstiness != 1 else "Poisson,"
        parts.append(f"{kind} {plan.request_rate:g} requests/s")
    if settings.max_concurrency is not None:
        parts.append(f"at most {settings.max_concurrency} at once")
    return ", ".join(parts) or "all requests at once"


def _percentiles(plan: "LoadPlan") -> list[str]:
    from ..measure.load_statistics import percentile_name

    return [percentile_name(p) for p in plan.percentiles]


def _print_errors(measured: "MeasuredRun") -> None:
    """Each kind of error with the sentence of its first request."""
    failed = [record for record in measured.run.records if record.error is not None]
    for kind, count in list(measured.summary["errors"].items())[:MAX_SHOWN_ERRORS]:
        first = next(record for record in failed if (record.error_kind or "") == kind)
        click.echo(f"failed, {kind}: {count} (request {first.index}: {first.error})")


def _remarks(measured: "MeasuredRun", plan: "LoadPlan") -> list[str]:
    found, client = measured.summary, measured.client
    remarks = [
        f"client: {client['cpu_share']:.0%} of a CPU; connects in "
        f"{client['connecting_median_ms']:.2f} ms; sends late by up to "
        f"{client['late_sends_p99_ms']:.2f} ms (99 %); event loop late by "
        f"{client['loop_lag_median_ms']:.2f} ms, up to {client['loop_lag_p99_ms']:.2f} (99 %)"
    ]
    if client["doubt"]:
        remarks.append(f"The figures are doubtful: {client['doubt']}.")
    if plan.settings.max_concurrency is not None and plan.request_rate != float("inf"):
        wait = client["max_concurrency_wait_p99_ms"]
        remarks.append(f"Requests waited up to {wait:.0f} ms (99 %) for --max-concurrency.")
    if found["tokens_counted_by"] != "usage":
        remarks.append("The server sent no usage: each chunk is counted as one token.")
    elif found["tokens_per_chunk"] is not None and found["tokens_per_chunk"] > 1.05:
        remarks.append(f"Chunks hold {found['tokens_per_chunk']:.2f} tokens on average.")
    records = [r for r in measured.run.records if r.error is None]
    asked = sum(r.asked_input or 0 for r in records if r.input_tokens is not None)
    if asked and found["total_input_tokens"]:
        known = sum(r.asked_input is not None for r in records)
        remarks.append(
            f"Prompts: {asked / known:,.1f} tokens asked for on average, "
            f"{found['total_input_tokens'] / len(records):,.1f} by the server's count."
        )
    asked_output = sum(r.asked_output or 0 for r in records)
    if found["total_output_tokens"] < 0.98 * asked_output:
        remarks.append(
            f"Answers have {found['total_output_tokens'] / len(records):,.1f} tokens of "
            f"{asked_output / len(records):,.1f} on average; --ignore-eos asks for all."
        )
    cached = found["total_cached_tokens"]
    if (
        cached
        and found["total_input_tokens"]
        and cached > CACHED_SHARE * found["total_input_tokens"]
    ):
        share = cached / found["total_input_tokens"]
        remarks.append(f"{share:.0%} of the input tokens came from the server's prefix cache.")
    return remarks


def print_ratios(results: "RoundResults") -> dict[str, Any]:
    """Both servers by figure, medians of rounds, and the ratio with its spread; the JSON report."""
    import statistics

    plan = results.plan
    by_server = [[m for m in results.runs if m.server == i] for i in range(2)]
    for letter, runs in zip("AB", by_server, strict=True):
        if runs:
            click.echo(
                f"{letter}: {runs[0].url}, model {runs[0].model}, "
                f"{format_count(len(runs), 'round')}"
            )
            for measured in runs:
                _print_errors(measured)
    click.echo(f"{_load(plan)}; medians of rounds, and A / B within rounds\n")
    # a row per figure
    figures = [
        (key, name, digits) for key, name, digits in _RATES if key in by_server[0][0].summary
    ]
    for metric in plan.metrics:
        for column in ("mean", "median", *_percentiles(plan)):
            figures.append((f"{column}_{metric}_ms", f"{column} {metric.upper()}, ms", 2))
    rows, ratios = [], {}
    for key, name, digits in figures:
        cells = []
        for runs in by_server:
            values = [m.summary[key] for m in runs if m.summary[key] is not None]
            cells.append(f"{statistics.median(values):,.{digits}f}" if values else "–")
        ratio = results.ratios(key)
        if ratio is not None:
            ratios[key] = asdict(ratio)
        spread = f"{ratio.median:.2f} ({ratio.least:.2f} – {ratio.most:.2f})" if ratio else "–"
        rows.append([name, *cells, spread])
    print_table(["", "A", "B", "A / B"], rows)
    click.echo()
    for measured in results.runs:
        if measured.client["doubt"]:
            name = f"round {measured.round + 1} of {measured.url}"
            click.echo(f"The figures of {name} are doubtful: {measured.client['doubt']}.")
    return {"ratios": ratios, "runs": [results.report(measured) for measured in results.runs]}


def save_records(path: Path, results: "RoundResults") -> None:
    """A line per run with its report, then a line per request; times in seconds."""
    with path.open("x", encoding="utf-8") as file:
        for measured in results.runs:
            file.write(json.dumps({"run": results.report(measured)}) + "\n")
            for record in measured.run.records:
                row: Mapping[str, Any] = {
                    "server": "AB"[measured.server],
                    "round": measured.round,
                    **asdict(record),
                    "ttft": record.ttft,
                    "tpot": record.tpot,
                    "e2el": record.e2el,
                }
                file.write(json.dumps(row) + "\n")
