"""OpenTelemetry traces: one span for each request that the engine was given, sent to a collector by
OTLP over HTTP. The span's and the attributes' names are vLLM's.

A span is made when its request has ended, from the times that the engine took anyway. It goes into
a bounded queue, and a thread of its own sends the queue. So neither the event loop nor the engine
ever waits for a collector. While the collector is down, spans are dropped, and the log says so
once. Spans hold no prompts, answers or keys.

Reference: https://github.com/open-telemetry/semantic-conventions-genai and vLLM's `SpanAttributes`.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from ..outputs import RequestOutput
from .errors import ApiError

if TYPE_CHECKING:
    from .generation import Job

__all__ = ["Tracing"]

_MAX_QUEUE = 2048  # spans that wait to be sent; more are dropped
_BATCH = 64  # spans that are encoded at a time: the thread holds the interpreter while it encodes
_DELAY_MS = 1000  # longest wait for a batch
_FLUSH = 2  # seconds that the end of the server waits for the last spans
_log = logging.getLogger(__name__)


class Tracing:
    """Sends the spans of one server."""

    def __init__(self, endpoint: str, model: str) -> None:
        """`endpoint` is the collector's URL, and `model` the model's name in the API. Headers,
        timeouts and certificates are those of OpenTelemetry's environment variables.
        """
        self._model = model
        exporter = _Exporter(endpoint)
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=_MAX_QUEUE,
                max_export_batch_size=_BATCH,
                schedule_delay_millis=_DELAY_MS,
            )
        )
        self._tracer = self._provider.get_tracer("pellucid.server", __version__)
        self._parents = TraceContextTextMapPropagator()

    def record(
        self,
        began: int,
        headers: Mapping[str, str],
        job: "Job",
        outputs: Sequence[RequestOutput],
        error: ApiError | None,
    ) -> None:
        """Record a request that has ended.

        `began`: nanoseconds of the time of day at which it came. `headers`: the client's, whose
        `traceparent` the span continues. `outputs`: the last output of each prompt; none if the
        engine refused the request. `error`: what the client was told, if it failed.
        """
        span = self._tracer.start_span(
            "llm_request",
            context=self._parents.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.response.model": self._model, **_request(job), **_answer(outputs)},
            start_time=began,
        )
        if error is not None:
            span.set_attribute("error.type", error.code or str(error.status))
            span.set_attribute("http.response.status_code", error.status)
            if error.status >= 500:
                span.set_status(Status(StatusCode.ERROR, error.message))
        span.end(time.time_ns())

    def close(self) -> None:
        """Send what is left, for at most two seconds."""
        # The exporter's own wait for a collector that is down is longer.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_FLUSH)


def _request(job: "Job") -> dict[str, Any]:
    """What was asked for."""
    found: dict[str, Any] = {"gen_ai.request.id": job.id}
    if job.params is not None:
        found["gen_ai.request.n"] = job.params.n
        found["gen_ai.request.temperature"] = job.params.temperature
        found["gen_ai.request.top_p"] = job.params.top_p
        if job.params.max_tokens is not None:
            found["gen_ai.request.max_tokens"] = job.params.max_tokens
    return found


def _answer(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """What was made, and where the time went, in seconds. With several prompts, tokens are summed,
    and times reach from the first event of any prompt to the last.
    """
    if not outputs:
        return {}
    completions = [completion for output in outputs for completion in output.outputs]
    times = [output.metrics for output in outputs]
    found: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
        "gen_ai.usage.completion_tokens": sum(c.num_tokens for c in completions),
        "gen_ai.usage.num_sequences": len(completions),
        "gen_ai.response.finish_reasons": [c.finish_reason or "abort" for c in completions],
    }
    arrival = min(t.arrival_time for t in times)
    scheduled = min(filter(None, (t.first_scheduled_time for t in times)), default=None)
    first = min(filter(None, (t.first_token_time for t in times)), default=None)
    last = max(filter(None, (t.last_token_time for t in times)), default=None)
    for name, start, end in (
        ("time_in_queue", arrival, scheduled),
        ("time_to_first_token", arrival, first),
        ("e2e", arrival, last),
        ("time_in_model_prefill", scheduled, first),
        ("time_in_model_decode", first, last),
        ("time_in_model_inference", scheduled, last),
    ):
        if start is not None and end is not None:
            found[f"gen_ai.latency.{name}"] = end - start
    return found


def _resource() -> Resource:
    """Who sends the spans. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` go first."""
    given = Resource.create()
    ours = {SERVICE_VERSION: __version__}
    if str(given.attributes[SERVICE_NAME]).startswith("unknown_service"):
        ours[SERVICE_NAME] = "pellucid"
    return given.merge(Resource(ours))


class _Exporter(SpanExporter):
    """OpenTelemetry's exporter, which logs each failed try. This one says once that a collector is
    gone, and once that it is back.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        self._reasons = _Reasons()
        self._num_dropped = 0
        for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
            logger = logging.getLogger(name)
            logger.addHandler(self._reasons)
            logger.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans, or drop them."""
        self._reasons.first = None
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._num_dropped:
                _log.warning("traces are sent again; %d spans were dropped", self._num_dropped)
            self._num_dropped = 0
        else:
            if not self._num_dropped:
                reason = self._reasons.first or "no reason is known"
                _log.warning(
                    "traces cannot be sent to %s and are dropped: %s", self._endpoint, reason
                )
            self._num_dropped += len(spans)
        return result

    def shutdown(self) -> None:
        """End a try that is under way."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _Reasons(logging.Handler):
    """Keeps the first message of a try to send."""

    first: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.first = self.first or record.getMessage()[:300]
