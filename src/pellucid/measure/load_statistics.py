"""Figures of a load test, from the record of each request.

TTFT   time from sending the request to its first token
TPOT   time per token after the first: (last token - first token) / (tokens after the first chunk)
ITL    time between two tokens; a chunk of k tokens that comes d seconds after the one before it
       counts as k times d / k
E2EL   time from sending the request to its last token

Failed requests are counted, and are in no mean and no throughput. Goodput is the rate of requests
that keep every limit given for them. Times are seconds in records and milliseconds in summaries;
names are those of `vllm bench serve`. Percentiles interpolate linearly, as NumPy's.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError

__all__ = [
    "METRICS",
    "RequestRecord",
    "parse_goodput",
    "parse_names",
    "parse_percentiles",
    "peak_concurrency",
    "percentile_name",
    "summarize",
]

METRICS = ("ttft", "tpot", "itl", "e2el")
_PER_REQUEST = ("ttft", "tpot", "e2el")  # those that goodput can limit


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds from the start of the run."""

    index: int
    scheduled: float  # when it was due; with a limit of concurrency it may be sent later
    sent: float  # before a connection was opened for it
    connected: float | None = None
    end: float = math.nan  # of its last token, or of its failure
    chunk_times: Sequence[float] = ()
    chunk_tokens: Sequence[int] = ()
    input_tokens: int | None = None  # by the server's usage
    cached_tokens: int | None = None
    output_tokens: int = 0
    is_counted: bool = True  # output_tokens comes from the server's usage, not from chunks
    asked_input: int | None = None
    asked_output: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # one sentence
    error_kind: str | None = None

    @property
    def ttft(self) -> float | None:
        return self.chunk_times[0] - self.sent if self.chunk_times else None

    @property
    def e2el(self) -> float:
        return self.end - self.sent

    @property
    def tpot(self) -> float | None:
        """None for an answer that came in one chunk: nothing came after the first."""
        if len(self.chunk_times) < 2:
            return None
        later = sum(self.chunk_tokens[1:])
        return (self.chunk_times[-1] - self.chunk_times[0]) / later

    def itls(self) -> list[float]:
        gaps: list[float] = []
        for i in range(1, len(self.chunk_times)):
            gap, count = self.chunk_times[i] - self.chunk_times[i - 1], self.chunk_tokens[i]
            gaps += [gap / count] * count
        return gaps

    def keeps(self, limits: Mapping[str, float]) -> bool:
        """Whether it succeeded within all limits, in ms. A figure that it lacks keeps any limit."""
        found = {"ttft": self.ttft, "tpot": self.tpot, "e2el": self.e2el}
        return self.error is None and all(
            (value := found[name]) is None or value * 1e3 <= limit for name, limit in limits.items()
        )


def summarize(
    records: Sequence[RequestRecord],
    seconds: float,
    *,
    goodput: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (90, 99),
    metrics: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """All figures of a run of `seconds`, by vLLM's names; times in ms, rates per second."""
    done = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    seconds = max(seconds, 1e-9)
    num_input = sum(record.input_tokens or 0 for record in done)
    num_output = sum(record.output_tokens for record in done)
    num_chunks = sum(len(record.chunk_times) for record in done)
    found: dict[str, Any] = {
        "completed": len(done),
        "failed": len(failed),
        "errors": dict(Counter(record.error_kind or "" for record in failed).most_common()),
        "duration": seconds,
        "total_input_tokens": num_input,
        "total_cached_tokens": _sum_known([record.cached_tokens for record in done]),
        "total_output_tokens": num_output,
        "tokens_counted_by": _counted_by(done),
        "tokens_per_chunk": num_output / num_chunks if num_chunks else None,
        "request_throughput": len(done) / seconds,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_concurrent_requests": peak_concurrency(records),
    }
    if goodput:
        found["goodput_limits_ms"] = dict(goodput)
        found["request_goodput"] = sum(record.keeps(goodput) for record in done) / seconds
    values: dict[str, list[float | None]] = {
        "ttft": [record.ttft for record in done],
        "tpot": [record.tpot for record in done],
        "itl": [gap for record in done for gap in record.itls()],
        "e2el": [record.e2el for record in done],
    }
    for name in metrics:
        found |= _spread(name, [v for v in values[name] if v is not None], percentiles)
    return found


def _spread(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, Any]:
    """Mean, median, deviation and percentiles in ms; None without values."""
    keys = [f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms"]
    keys += [f"{percentile_name(p)}_{name}_ms" for p in percentiles]
    if not values:
        return dict.fromkeys(keys)
    array = np.asarray(values) * 1e3
    figures = [array.mean(), np.median(array), array.std(), *np.percentile(array, percentiles)]
    return {key: float(figure) for key, figure in zip(keys, figures, strict=True)}


def percentile_name(percentile: float) -> str:
    """p90, p99.9: as in vLLM's keys."""
    return f"p{percentile:g}"


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """The most requests that were with the server at one moment."""
    changes = [(record.sent, 1) for record in records]
    changes += [(record.end, -1) for record in records if not math.isnan(record.end)]
    running = peak = 0
    for _, change in sorted(changes):  # at one moment, ends come before beginnings
        running += change
        peak = max(peak, running)
    return peak


def _sum_known(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _counted_by(done: Sequence[RequestRecord]) -> str:
    kinds = {record.is_counted for record in done}
    return "usage and chunks" if len(kinds) == 2 else "chunks" if False in kinds else "usage"


# ---- what users write


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """`ttft:500 tpot:50` → limits in ms. Raises ConfigError."""
    limits: dict[str, float] = {}
    for part in (part for text in texts for part in text.replace(",", " ").split()):
        name, _, value = part.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in _PER_REQUEST or not 0 < limit < math.inf:
            raise ConfigError(
                f"--goodput has {part!r:.60}; it must be NAME:MILLISECONDS, with a name of "
                f"{', '.join(_PER_REQUEST)}"
            )
        if name in limits:
            raise ConfigError(f"--goodput limits {name} twice")
        limits[name] = limit
    return limits


def parse_names(text: str) -> list[str]:
    """`ttft,tpot` → names of metrics. Raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"--percentile-metrics has {name!r:.60}; the names are: {', '.join(METRICS)}"
            )
    return [name for name in METRICS if name in names]


def parse_percentiles(text: str) -> list[float]:
    """`90,99.9` → numbers. Raises ConfigError."""
    found: set[float] = set()
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 100:
            raise ConfigError(
                f"--metric-percentiles has {part!r:.60}; it must be numbers of 0 to 100 with "
                "commas between them"
            )
        found.add(number)
    return sorted(found)
