"""OpenTelemetry: what a collector gets of each request, and that a collector which is down changes
nothing. The collector is a real receiver of OTLP over HTTP.
"""

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("opentelemetry.sdk", reason="traces need the extra 'otel'")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pellucid.errors import ConfigError
from pellucid.server.settings import ServerSettings
from tests.server.conftest import START_SECONDS, Server, serving, serving_endless

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "abcabcabcabc"  # long: an identifier in hexadecimal holds "abc" now and then
Span = dict[str, Any]


class Collector:
    """Receives spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if collector.status == 200:
                    collector.take(self.path, data)
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, path: str, data: bytes) -> None:
        """Keep the spans of one request."""
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            service = _attributes(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    told = _attributes(span) | {"path": path, "service": service, "span": span}
                    self.spans.append(told)

    def wait_for(self, request_id: str) -> Span:
        """The span of the request with this id."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for span in list(self.spans):
                if span["gen_ai.request.id"] == request_id:
                    return span
            time.sleep(0.05)
        raise AssertionError(f"no span of {request_id} came")

    def close(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()


def _attributes(holder: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in holder.attributes:
        kind = entry.value.WhichOneof("value")
        value = getattr(entry.value, kind)
        found[entry.key] = (
            [v.string_value for v in value.values] if kind == "array_value" else value
        )
    return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def traced(
    endless_model: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("traced") / "server.log"
    with serving_endless(endless_model, log, "--otlp-traces-endpoint", collector.url) as running:
        yield running


def test_an_answer_is_a_span_with_vllms_attributes(traced: Server, collector: Collector) -> None:
    answer = traced.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": SECRET}],
        n=2,
        max_tokens=7,
        temperature=0.5,
        top_p=0.75,
        extra_headers={"traceparent": PARENT},
    )
    span = collector.wait_for(answer.id)
    assert span["path"] == "/v1/traces" and span["service"] == "pellucid"
    assert span["gen_ai.response.model"] == "tiny"
    asked = {name: span[f"gen_ai.request.{name}"] for name in ("n", "temperature", "top_p")}
    assert asked == {"n": 2, "temperature": 0.5, "top_p": 0.75}
    assert span["gen_ai.request.max_tokens"] == 7
    assert answer.usage is not None
    assert span["gen_ai.usage.prompt_tokens"] == answer.usage.prompt_tokens
    assert span["gen_ai.usage.completion_tokens"] == answer.usage.completion_tokens == 14
    assert span["gen_ai.usage.num_sequences"] == 2
    assert span["gen_ai.response.finish_reasons"] == ["length", "length"]
    queue, first, whole, prefill, decode, inference = (
        span[f"gen_ai.latency.{name}"]
        for name in (
            *("time_in_queue", "time_to_first_token", "e2e"),
            *("time_in_model_prefill", "time_in_model_decode", "time_in_model_inference"),
        )
    )
    assert queue + prefill == pytest.approx(first) and first + decode == pytest.approx(whole)
    assert prefill + decode == pytest.approx(inference)
    # The client's trace goes on.
    sent = span["span"]
    assert sent.name == "llm_request" and sent.kind == sent.SPAN_KIND_SERVER
    assert sent.trace_id.hex() == PARENT.split("-")[1]
    assert sent.parent_span_id.hex() == PARENT.split("-")[2]
    assert whole <= (sent.end_time_unix_nano - sent.start_time_unix_nano) / 1e9
    assert abs(time.time() - sent.start_time_unix_nano / 1e9) < START_SECONDS
    assert SECRET not in str(sent)


def test_each_route_that_runs_the_model_is_traced(traced: Server, collector: Collector) -> None:
    client = traced.client()
    stream = list(client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True))
    span = collector.wait_for(stream[0].id)
    assert span["gen_ai.usage.completion_tokens"] == 3
    assert not span["span"].parent_span_id  # no traceparent: a trace of its own
    several = client.completions.create(model="tiny", prompt=["a", "bc"], max_tokens=3)
    span = collector.wait_for(several.id)
    assert several.usage is not None
    assert span["gen_ai.usage.prompt_tokens"] == several.usage.prompt_tokens
    assert span["gen_ai.usage.num_sequences"] == 2
    response = client.responses.create(model="tiny", input="abc", max_output_tokens=3)
    assert collector.wait_for(response.id)["gen_ai.request.max_tokens"] == 3
    embedded = client.embeddings.create(model="tiny", input=["ab", "c"])
    span = collector.wait_for(str(embedded.model_extra["id"]))  # type: ignore[index]
    assert span["gen_ai.usage.prompt_tokens"] == 3
    assert "gen_ai.request.temperature" not in span


def test_a_trace_that_is_not_sampled_is_not_sent(traced: Server, collector: Collector) -> None:
    def answer(parent: str) -> str:
        return (
            traced.client()
            .completions.create(
                model="tiny", prompt="a", max_tokens=1, extra_headers={"traceparent": parent}
            )
            .id
        )

    unsampled = answer(PARENT.removesuffix("01") + "00")
    broken = answer("00-zz-zz-01")
    assert not collector.wait_for(broken)["span"].parent_span_id
    assert unsampled not in [span["gen_ai.request.id"] for span in collector.spans]


def test_errors_and_clients_that_leave_are_told(traced: Server, collector: Collector) -> None:
    with pytest.raises(openai.BadRequestError):
        traced.client().completions.create(
            model="tiny",
            prompt=[1] * 600_000,
            max_tokens=1,
            extra_headers={"traceparent": PARENT.replace("b7ad6b71", "00000001")},
        )
    with traced.client().completions.create(
        model="tiny", prompt="a", max_tokens=400_000, stream=True
    ) as stream:
        left = next(iter(stream)).id
    assert collector.wait_for(left)["gen_ai.response.finish_reasons"] == ["abort"]
    (refused,) = (
        s for s in collector.spans if s["span"].parent_span_id.hex() == "0000000169203331"
    )
    assert refused["error.type"] == "context_length_exceeded"
    assert refused["http.response.status_code"] == 400
    assert "gen_ai.latency.e2e" not in refused


def test_a_collector_that_is_down_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        options = ("--served-model-name", "tiny", "--otlp-traces-endpoint", endpoint)
        with serving(tiny_model, tmp_path / "log", *options) as running:
            client = running.client()
            for _ in range(200):
                answer = client.completions.create(model="tiny", prompt="a", max_tokens=1)
                assert answer.choices[0].finish_reason is not None
            running.process.terminate()
            # Spans that nobody takes hold the end up for two seconds at most.
            assert running.process.wait(START_SECONDS) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_log_says_once_that_a_collector_is_gone(tiny_model: Path, tmp_path: Path) -> None:
    collector, log = Collector(), tmp_path / "log"
    collector.status = 400
    options = ("--served-model-name", "tiny", "--otlp-traces-endpoint", collector.url)
    with serving(tiny_model, log, *options) as running:
        client = running.client()

        def lines(text: str) -> int:
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
            return log.read_text().count(text)

        _wait_until(lambda: lines("traces cannot be sent to") == 1)
        assert "code: 400" in log.read_text()
        time.sleep(2.5)  # more tries, which say nothing
        assert lines("traces cannot be sent to") == 1
        collector.status = 200
        _wait_until(lambda: lines("traces are sent again") == 1)
        assert collector.spans
        with urllib.request.urlopen(f"{running.url}/health") as response:
            assert response.status == 200
    collector.close()


def _wait_until(holds: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_last_spans_are_sent_at_the_end(tiny_model: Path, tmp_path: Path) -> None:
    collector = Collector()
    options = ("--served-model-name", "tiny", "--otlp-traces-endpoint", collector.url)
    with serving(tiny_model, tmp_path / "log", *options) as running:
        answer = running.client().completions.create(model="tiny", prompt="a", max_tokens=1)
        running.process.terminate()
        assert running.process.wait(START_SECONDS) == 0
    collector.wait_for(answer.id)
    collector.close()


@pytest.mark.parametrize(
    "endpoint", ["localhost:4318", "grpc://localhost:4317", "http://", "http://h:x/", "ftp://h/"]
)
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint is .*OTLP over HTTP"):
        ServerSettings(otlp_traces_endpoint=endpoint)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("http://h:4318/", "http://h:4318/v1/traces"),
        ("https://h/v1/traces", "https://h/v1/traces"),
        ("https://h/custom?x=1", "https://h/custom?x=1"),
    ],
)
def test_an_endpoint_without_a_path_gets_one(given: str, used: str) -> None:
    assert ServerSettings(otlp_traces_endpoint=given).otlp_traces_endpoint == used


def test_a_missing_extra_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['opentelemetry.sdk'] = None\n"
    command = f"{hide}from pellucid.cli.main import main; main(sys.argv[1:])"
    told = subprocess.run(
        [
            *(sys.executable, "-c", command, "serve", str(tmp_path / "no-model.gguf")),
            *("--otlp-traces-endpoint", "http://localhost:4318"),
        ],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1, told.stderr
    assert "pip install 'pellucid[otel]'" in told.stderr
    assert "Traceback" not in told.stderr and "no-model" not in told.stderr
