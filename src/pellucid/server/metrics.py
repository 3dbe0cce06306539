"""Metrics for Prometheus, with vLLM's names and labels behind the prefix `pellucid:`, and behind
`vllm:` too where aliases are switched on.

Counters and gauges of the engine are read when they are asked for. Histograms are filled once per
request, and once per output of a stream.

A scrape never holds the event loop for long: it writes one family of metrics at a time, and lets
others run in between. What bound a request takes 0.3 ms to explain, so no request waits for it: a
scrape explains the last requests since the scrape before, at most 64, one at a time as well.
"""

import asyncio
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..engine.stats import STEP_SECONDS
from ..outputs import PooledOutput, RequestMetrics, RequestOutput, SpeculationReceipt

if TYPE_CHECKING:
    from .service import Service

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

# histogram: what it measures, its buckets
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token", _SECONDS),
    "inter_token_latency_seconds": ("Seconds between tokens of a stream", _BETWEEN),
    "request_time_per_output_token_seconds": ("Mean seconds per token after the first", _BETWEEN),
    "e2e_request_latency_seconds": ("Seconds from arrival to the last token", _SECONDS),
    "request_queue_time_seconds": ("Seconds before the first step", _SECONDS),
    "request_prefill_time_seconds": ("Seconds from the first step to the first token", _SECONDS),
    "request_decode_time_seconds": ("Seconds from the first token to the last", _SECONDS),
    "request_inference_time_seconds": ("Seconds from the first step to the last token", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer", _TOKENS),
    "request_params_n": ("Answers that a request asked for", _COUNTS),
    "request_params_max_tokens": ("Most tokens that a request asked for", _TOKENS),
    "request_share_of_ceiling": ("Least time at the machine's ceilings over time taken", _SHARES),
}

# counter: what it counts, its labels beside the model's name
_COUNTERS = {
    "request_success": ("Answers that ended, by reason", ("finished_reason",)),
    "request_errors": ("Requests that were answered with an error, by status", ("status",)),
    "admission_rejections": ("Requests that were refused for load", ()),
    "http_requests": (
        "HTTP requests, by route; 499: the client left",
        ("route", "method", "status"),
    ),
    "request_bound": ("Explained requests, by what took most of their time", ("bound",)),
}
_METHODS = ("GET", "POST", "HEAD", "OPTIONS")  # others count as one
_MAX_EXPLAINED = 64  # requests per scrape
_PREFIX = "pellucid:"
_NAME = re.compile(rb"^(# \w+ )?" + _PREFIX.encode(), re.MULTILINE)  # where a metric's name begins


class Metrics:
    """One server's metrics, told under the prefix `pellucid:` and each of `aliases`."""

    def __init__(self, service: "Service", aliases: tuple[str, ...] = ()) -> None:
        self._service = service
        self._aliases = [rb"\g<1>" + alias.encode() for alias in aliases]
        self._registry = CollectorRegistry(auto_describe=False)
        labels = ("model_name",)
        self._histograms = {
            name: Histogram(
                _PREFIX + name, help_text, labels, buckets=buckets, registry=self._registry
            ).labels(service.name)
            for name, (help_text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(_PREFIX + name, help_text, (*labels, *more), registry=self._registry)
            for name, (help_text, more) in _COUNTERS.items()
        }
        self._count("admission_rejections", by=0)  # told from the start
        self._unexplained: deque[RequestMetrics] = deque(maxlen=_MAX_EXPLAINED)
        self._is_explained_before = False
        self._registry.register(_EngineCollector(service))

    async def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        await self._explain()
        parts = []
        for family in self._registry.collect():
            parts.append(generate_latest(_OneFamily(family)))
            await asyncio.sleep(0)
        ours = b"".join(parts)
        return ours + b"".join(_NAME.sub(alias, ours) for alias in self._aliases)

    def observe(self, name: str, value: float | None) -> None:
        """Add one reading to a histogram."""
        if value is not None:
            self._histograms[name].observe(value)

    def _count(self, name: str, *labels: str, by: int = 1) -> None:
        self._counters[name].labels(self._service.name, *labels).inc(by)

    def refuse(self, status: int) -> None:
        """Count an error."""
        self._count("request_errors", str(status))
        if status in (429, 503):
            self._count("admission_rejections")

    def count_http(self, route: str, method: str, status: int) -> None:
        """Count an HTTP request. `status` 0: its client left before the response began."""
        known = method if method in _METHODS else "other"
        self._count("http_requests", route or "none", known, str(status or 499))

    async def _explain(self) -> None:
        """Count what bound the last requests."""
        waiting = list(self._unexplained)
        self._unexplained.clear()
        for times in waiting:
            if self._is_explained_before:
                told = times.explain()
                await asyncio.sleep(0)
            else:  # the first one loads the machine's ceilings, which takes 80 ms
                told = await asyncio.to_thread(times.explain)
                self._is_explained_before = True
            self._count("request_bound", told.bound or "unknown")
            self.observe("request_share_of_ceiling", told.share_of_ceiling)

    def finish(self, output: RequestOutput, max_tokens: int | None) -> None:
        """Count an answer or an embedding that ended. `max_tokens` is what the client asked for."""
        times = output.metrics
        num_tokens = sum(c.num_tokens for c in output.outputs)
        first, last, arrival = times.first_token_time, times.last_token_time, times.arrival_time
        self.observe("e2e_request_latency_seconds", None if last is None else last - arrival)
        self.observe("request_queue_time_seconds", times.time_in_queue)
        self.observe("request_prefill_time_seconds", times.time_in_prefill)
        scheduled = times.first_scheduled_time
        self.observe(
            "request_inference_time_seconds",
            None if last is None or scheduled is None else last - scheduled,
        )
        self._unexplained.append(times)
        self.observe("request_prompt_tokens", len(output.prompt_token_ids))
        if not isinstance(output, PooledOutput):
            self.observe("time_to_first_token_seconds", None if first is None else first - arrival)
            self.observe("request_decode_time_seconds", times.time_in_decode)
            self.observe("request_generation_tokens", num_tokens)
            self.observe("request_params_n", len(output.outputs))
            self.observe("request_params_max_tokens", max_tokens)
        longest = max(c.num_tokens for c in output.outputs)
        if times.time_in_decode is not None and longest > 1:
            self.observe(
                "request_time_per_output_token_seconds", times.time_in_decode / (longest - 1)
            )
        for completion in output.outputs:
            self._count("request_success", completion.finish_reason or "abort")


class _OneFamily(CollectorRegistry):
    """A registry of one family of metrics, whose text is wanted."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        """The family."""
        yield self._family


class _EngineCollector(Collector):
    """What the engine counts itself, read at each scrape."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        """The families of metrics."""
        stats, model = self._service.engine.stats(), self._service.name
        usage = stats.num_held_blocks / max(1, stats.num_kv_blocks)
        for name, text, value in (
            ("num_requests_running", "Requests in the batch", stats.num_running),
            ("num_requests_waiting", "Requests that wait", stats.num_waiting),
            ("num_requests_preempted", "Those that were preempted", stats.num_preempted),
            ("kv_cache_usage_perc", "Share of the KV cache that requests hold, 0 to 1", usage),
            ("kv_cache_blocks", "Blocks of the KV cache", stats.num_kv_blocks),
            ("kv_cache_cached_blocks", "Blocks that hold prefixes alone", stats.num_cached_blocks),
            ("swap_file_bytes", "Size of the swap file", stats.swap_file_bytes),
            ("num_http_requests", "HTTP requests that are served", self._service.num_requests),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=("model_name",))
            gauge.add_metric((model,), value)
            yield gauge
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts", stats.num_prompt_tokens),
            ("prompt_tokens_cached", "Those that the prefix cache had", stats.num_cached_tokens),
            ("prefix_cache_queries", "Tokens of prompts looked up", stats.num_prompt_tokens),
            ("prefix_cache_hits", "Those that the prefix cache had", stats.num_cached_tokens),
            ("computed_tokens", "Positions that went through the model", stats.num_computed_tokens),
            ("generation_tokens", "Tokens of answers", stats.num_output_tokens),
            ("num_preemptions", "Requests that gave way to others", stats.num_preemptions),
            ("spec_decode_num_drafts", "Steps of requests with drafts", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Drafted tokens", stats.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Those accepted", stats.num_accepted_tokens),
            ("spec_decode_draft_seconds", "Seconds in a draft model", stats.draft_seconds),
            ("steps", "Steps of the engine", stats.num_steps),
            ("forward_seconds", "Seconds of steps in the model", stats.all_steps.forward),
            ("python_cpu_seconds", "CPU time of steps in Python", stats.python_cpu_seconds),
        ):
            counter = CounterMetricFamily(_PREFIX + name, text, labels=("model_name",))
            counter.add_metric((model,), count)
            yield counter
        yield _accepted_per_position(model, stats.speculation)
        yield _step_histogram(model, stats.step_histogram, stats.all_steps.total)


def _accepted_per_position(model: str, receipt: SpeculationReceipt | None) -> CounterMetricFamily:
    """Accepted draft tokens by their place in the draft, from 0 on, as vLLM counts them."""
    family = CounterMetricFamily(
        f"{_PREFIX}spec_decode_num_accepted_tokens_per_pos",
        "Accepted draft tokens by their place in the draft",
        labels=("model_name", "position"),
    )
    counts = () if receipt is None else receipt.num_accepted_tokens_per_position
    for position, count in enumerate(counts):
        family.add_metric((model, str(position)), count)
    return family


def _step_histogram(model: str, counts: Iterable[int], total: float) -> HistogramMetricFamily:
    """Seconds per step, with cumulative buckets."""
    family = HistogramMetricFamily(
        f"{_PREFIX}step_seconds", "Seconds of a step", labels=("model_name",)
    )
    buckets: list[tuple[str, float]] = []
    so_far = 0
    for bound, count in zip((*STEP_SECONDS, float("inf")), counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), so_far))
    family.add_metric((model,), buckets, sum_value=total)
    return family
