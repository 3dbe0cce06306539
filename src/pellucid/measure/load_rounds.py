"""Runs a load test: one run on one server, or rounds on two servers in turns.

In each round both servers get the same requests, A first. Each round has new requests, so that no
prefix cache holds them. The two runs of a round are close in time, so they see similar conditions,
and ratios are taken within each round.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .load import LoadRun, LoadSettings, client_report, run_load
from .load_arrivals import TraceEntry, random_arrivals, read_trace, scale_trace
from .load_client import Server
from .load_statistics import summarize
from .load_workload import Workload, file_workload, random_workload, trace_workload

__all__ = ["LoadPlan", "MeasuredRun", "Ratio", "RoundResults", "run_rounds"]

_WARMUP_SEED = 1 << 62  # its prompts are in no round


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The parameters of a load test."""

    urls: tuple[str, ...]  # one server, or two that are compared
    models: tuple[str | None, ...]  # of each; None: its first
    api_key: str | None
    timeout: float  # seconds
    settings: LoadSettings
    request_rate: float  # per second
    burstiness: float
    seed: int
    num_warmups: int
    rounds: int
    goodput: dict[str, float]  # ms
    percentiles: tuple[float, ...]
    metrics: tuple[str, ...]
    path: str
    trace: Path | None
    dataset: Path | None
    output_length: int
    random_input: int
    random_output: int
    random_range_ratio: float
    random_prefix: int


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One run on one server."""

    server: int  # its place in the plan
    url: str
    model: str
    round: int
    run: LoadRun
    summary: dict[str, Any]
    client: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of the first server over that of the second, within rounds."""

    median: float
    least: float
    most: float


@dataclass(slots=True)
class RoundResults:
    """The results so far."""

    plan: LoadPlan
    runs: list[MeasuredRun] = field(default_factory=list)

    def report(self, measured: MeasuredRun) -> dict[str, Any]:
        """One run as JSON, with vLLM's names."""
        plan = self.plan
        infinite = plan.request_rate == float("inf")
        return {
            "url": measured.url,
            "model_id": measured.model,
            "endpoint": plan.path,
            "num_prompts": plan.settings.num_requests,
            "request_rate": "inf" if infinite else plan.request_rate,
            "burstiness": plan.burstiness,
            "max_concurrency": plan.settings.max_concurrency,
            "seed": plan.seed,
            **measured.summary,
            "client": measured.client,
        }

    def ratios(self, figure: str) -> Ratio | None:
        """Of the rounds in which both servers have the figure."""
        a, b = (
            {m.round: m.summary[figure] for m in self.runs if m.server == i and m.summary[figure]}
            for i in range(2)
        )
        found = [a[i] / b[i] for i in a if i in b]
        return Ratio(statistics.median(found), min(found), max(found)) if found else None


async def run_rounds(results: RoundResults, progress: Callable[[str, int, int, int], None]) -> None:
    """Check each server, warm it up, and fill `results`, also if this is cancelled.

    Raises RequestError if a server does not answer the first request.
    """
    plan = results.plan
    files = _read_files(plan)  # before anything is sent
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(Server(url, plan.api_key, plan.timeout))
            for url in plan.urls
        ]
        # All servers are checked before any is measured.
        names = [
            await server.find_model(model)
            for server, model in zip(servers, plan.models, strict=True)
        ]
        for server, name in zip(servers, names, strict=True):
            await _warm_up(plan, server, name, files)
        for i in range(plan.rounds):
            for place, (server, name) in enumerate(zip(servers, names, strict=True)):
                await _measure(results, place, server, name, files, i, progress)


async def _warm_up(plan: LoadPlan, server: Server, model: str, files: "_Files") -> None:
    """Requests that are not measured; the first one's error ends the test."""
    run = LoadRun()
    settings = LoadSettings(
        plan.num_warmups, None, 1, plan.settings.ignore_eos, plan.settings.extra_body
    )
    workload = _workload(plan, files, _WARMUP_SEED + plan.seed % _WARMUP_SEED)
    await run_load(server, model, workload, random_arrivals(float("inf"), 1, 0), settings, run)
    first = run.records[0]
    if first.error is not None:
        hint = "" if server.url.endswith("/v1") else f"; is it {server.url}/v1?"
        raise RequestError(
            f"{server.url}/{plan.path} does not answer the first request ({first.error_kind}): "
            f"{first.error}{hint}"
        )


async def _measure(
    results: RoundResults,
    place: int,
    server: Server,
    model: str,
    files: "_Files",
    round: int,
    progress: Callable[[str, int, int, int], None],
) -> None:
    plan, run = results.plan, LoadRun()
    # A server that is compared with itself must not find the prompts in its prefix cache.
    is_itself = len(set(plan.urls)) < len(plan.urls)
    seed = plan.seed + (2 * round + place if is_itself else round)
    what = f"round {round + 1} of {plan.rounds}, {'AB'[place]}: " if len(plan.urls) > 1 else ""
    arrivals: Iterator[float] = random_arrivals(plan.request_rate, plan.burstiness, seed)
    if files.trace is not None:
        arrivals = iter([entry.arrival for entry in files.trace])
    try:
        await run_load(
            server,
            model,
            _workload(plan, files, seed),
            arrivals,
            plan.settings,
            run,
            lambda *numbers: progress(what, *numbers),
        )
    finally:
        summary = summarize(
            run.records,
            run.seconds,
            goodput=plan.goodput,
            percentiles=plan.percentiles,
            metrics=plan.metrics,
        )
        client = client_report(run, summary)
        results.runs.append(MeasuredRun(place, server.url, model, round, run, summary, client))


@dataclass(frozen=True, slots=True)
class _Files:
    """The content of the user's files."""

    trace: Sequence[TraceEntry] | None
    dataset: Workload | None


def _read_files(plan: LoadPlan) -> _Files:
    count = plan.settings.num_requests
    trace, dataset = None, None
    if plan.trace is not None:
        trace = read_trace(plan.trace, count)
        if plan.request_rate != float("inf"):
            trace = scale_trace(trace, plan.request_rate)
    if plan.dataset is not None:
        dataset = file_workload(plan.path, plan.dataset, plan.output_length, count)
    return _Files(trace, dataset)


def _workload(plan: LoadPlan, files: _Files, seed: int) -> Workload:
    if files.trace is not None:
        return trace_workload(plan.path, files.trace, seed)
    if files.dataset is not None:
        return files.dataset
    return random_workload(
        plan.path,
        plan.random_input,
        plan.random_output,
        range_ratio=plan.random_range_ratio,
        prefix_length=plan.random_prefix,
        seed=seed,
    )
