"""Limits of time, size and number: each is told by a status, and frees what it held."""

import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, serving, serving_endless
from tests.server.raw_http import (
    SECONDS,
    connect,
    exchange,
    get,
    metric,
    post,
    read_answer,
    request,
    running,
    wait_until,
)

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"prompt": "A ", "max_tokens": 400_000, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "a"}]
ENDLESS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 400_000},
}


@pytest.fixture(scope="module")
def hasty(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with short times. A machine that stops for a second exceeds them too, so no test
    may expect of it that something is still in time.
    """
    log = tmp_path_factory.mktemp("log") / "hasty.log"
    times = ("--read-timeout", "1", "--write-timeout", "1", "--request-timeout", "0.2")
    with serving_endless(endless_model, log, *times) as running:
        yield running


@pytest.fixture(scope="module")
def strict(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with low limits, and with times that no machine exceeds."""
    log = tmp_path_factory.mktemp("log") / "strict.log"
    options = {
        "read-timeout": 100_000,
        "write-timeout": 100_000,
        "request-timeout": 0,
        "max-body-bytes": 20_000,
        "max-header-bytes": 2048,
        "max-requests": 4,
        "max-requests-per-key": 2,
        "max-connections": 64,
        "max-messages": 3,
        "max-stop": 2,
        "max-prompts": 3,
        "max-completions": 4,
        "max-schema": 900,
        "max-schema-depth": 6,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    keys = ("--api-key", "secret", "--api-key", "other", "--api-key", "third")
    with serving_endless(endless_model, log, *keys, *given) as running:
        yield running


KEY = "Authorization: Bearer secret"


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/debug/requests", "/nothing"],
)
@pytest.mark.parametrize("header", ["X: 1", "Authorization: Bearer wrong", "Authorization: Bearer",
                                    "Authorization: Basic secret", "X-Api-Key: secre",
                                    "Authorization: Bearer sécret"])  # fmt: skip
def test_every_route_asks_for_the_key(strict: Server, path: str, header: str) -> None:
    answer = get(strict.url, path, header)
    assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages",
                                  "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize",
                                  "/detokenize"])  # fmt: skip
def test_every_route_that_works_asks_for_the_key(strict: Server, path: str) -> None:
    assert post(strict.url, path, {}).status == 401


def test_health_is_open_and_each_key_works(strict: Server) -> None:
    assert get(strict.url, "/health").status == get(strict.url, "/ready").status == 200
    assert get(strict.url, "/v1/models", KEY).status == 200
    assert get(strict.url, "/v1/models", "X-Api-Key: other").status == 200


def test_a_large_body_is_refused(strict: Server) -> None:
    large = {"prompt": "a" * 30_000}
    answer = post(strict.url, "/v1/completions", large, KEY)
    assert answer.status == 413 and "20000" in answer.error["message"]
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    head = request("POST", "/v1/completions", b"", KEY, "Transfer-Encoding: chunked")
    answer = exchange(strict.url, head + 10 * chunk + b"0\r\n\r\n")
    assert answer.status == 413 and answer.error["code"] == "body_too_large"


@pytest.mark.parametrize("path", ["/v1/completions", "/nothing", "/health"])
@pytest.mark.parametrize("key", [KEY, "X: 1"])
def test_a_refusal_arrives_before_the_connection_ends(strict: Server, path: str, key: str) -> None:
    """A server that closes before it has read the whole body resets the connection, and the
    client loses the answer.
    """
    data = request("POST", path, b"a" * (8 << 20), key, "Connection: close")
    for _ in range(5):
        with connect(strict.url) as connection:
            connection.sendall(data)
            answer = read_answer(connection)
        assert answer.status == (401 if key != KEY and path != "/health" else 413)
        assert answer.error["message"]


def test_a_body_that_is_not_sent_is_refused_at_once(strict: Server) -> None:
    head = request("POST", CHAT, b"", KEY, "Content-Length: 99999999999999999999999")
    assert exchange(strict.url, head).status in (400, 413)
    answer = exchange(strict.url, request("POST", CHAT, b"", KEY, "Content-Length: 9999999999"))
    assert answer.status == 413


@pytest.mark.parametrize("header", [f"X: {'a' * 3000}", "\r\n".join(["X: 1"] * 600)])
def test_large_headers_are_refused(strict: Server, header: str) -> None:
    answer = get(strict.url, "/health", header)
    assert answer.status == 431 and "2048" in answer.error["message"]


def test_a_long_path_is_refused(strict: Server) -> None:
    assert get(strict.url, "/" + "a" * 3000).status == 431


@pytest.mark.parametrize("data", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: a\r\nX:"])
def test_headers_that_never_end_are_refused(hasty: Server, data: bytes) -> None:
    with connect(hasty.url) as connection:
        connection.sendall(data)
        answer = read_answer(connection)
    assert answer.status == 408 and "headers" in answer.error["message"]


def test_headers_that_trickle_are_refused(hasty: Server) -> None:
    """Each byte comes in time, but not the whole."""
    assert _trickle(hasty, b"GET /health HTTP/1.1\r\nX: ") == 408


def test_a_body_that_trickles_is_refused(hasty: Server) -> None:
    assert _trickle(hasty, request("POST", "/tokenize", b"", "Content-Length: 10000")) == 408


def test_a_body_that_nobody_reads_is_cut_off(hasty: Server) -> None:
    """A route that is answered before its body has come holds no connection for it."""
    with _answered(hasty, request("GET", "/health", b"", "Content-Length: 10000")) as connection:
        wait_until(lambda: _is_closed(connection))


def test_blank_lines_do_not_hold_a_connection(hasty: Server) -> None:
    with _answered(hasty, request("GET", "/health")) as connection:
        connection.sendall(b"\r\n")
        assert read_answer(connection).status == 408


def _answered(server: Server, data: bytes) -> socket.socket:
    """A connection whose first request was answered, once the machine is fast enough for it."""
    while True:
        connection = connect(server.url)
        connection.sendall(data)
        if read_answer(connection).status == 200:
            return connection
        connection.close()


def _trickle(server: Server, head: bytes) -> int:
    """Send a byte at a time until there is an answer; its status."""
    with connect(server.url) as connection:
        connection.sendall(head)
        connection.settimeout(0.1)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                connection.sendall(b" ")
        connection.settimeout(SECONDS)
        return read_answer(connection).status


def _is_closed(connection: socket.socket) -> bool:
    """True once the other side has closed."""
    try:
        connection.sendall(b"a")
        connection.settimeout(0.1)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_that_takes_too_long_is_told(hasty: Server, is_stream: bool) -> None:
    body = LONG | {"prompt": ["A "] * 2, "n": 2, "stream": is_stream}
    answer = post(hasty.url, "/v1/completions", body)
    if is_stream and answer.status == 200:  # 504 where no token came in time
        last = answer.body.strip().split(b"\n\n")[-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
    else:
        assert answer.status == 504 and answer.error["code"] == "timeout"
    wait_until(lambda: running(hasty.url) == [])


@pytest.mark.parametrize(("path", "kind"), [("/v1/responses", "response.failed"),
                                            ("/v1/messages", "error")])  # fmt: skip
def test_a_stream_of_another_api_tells_that_it_took_too_long(
    hasty: Server, path: str, kind: str
) -> None:
    answer = post(hasty.url, path, ENDLESS[path] | {"stream": True})
    if answer.status == 200:
        name, data = answer.body.decode().strip().split("\n\n")[-1].split("\n")
        assert name == f"event: {kind}"
        event = json.loads(data.removeprefix("data: "))
        assert event["type"] == kind and "took more than 0.2 s" in str(event)
    else:
        assert answer.status == 504
    wait_until(lambda: running(hasty.url) == [])


def test_one_request_too_many_is_refused(strict: Server) -> None:
    """429 where a key has too many, 503 where all have. Both tell when to come back."""
    held: list[socket.socket] = []

    def hold(key: str) -> None:
        """Send an endless request that is let in."""
        body = json.dumps(LONG | {"stream": True}).encode()
        held.append(connect(strict.url))
        held[-1].sendall(request("POST", "/v1/completions", body, f"X-Api-Key: {key}"))
        assert held[-1].recv(1, socket.MSG_PEEK)

    def refused(key: str) -> tuple[int, str]:
        for path, body in ENDLESS.items():
            other = post(strict.url, path, body, f"X-Api-Key: {key}")
            assert int(other.headers["retry-after"]) >= 1
            answer = post(strict.url, "/v1/completions", LONG, f"X-Api-Key: {key}")
            assert (other.status, other.error["type"]) == (answer.status, answer.error["type"])
        return answer.status, answer.error["code"]

    try:
        hold("secret")
        hold("secret")
        assert refused("secret") == (429, "rate_limit_exceeded")
        hold("other")
        hold("third")
        assert refused("secret") == (429, "rate_limit_exceeded")
        assert refused("other") == refused("third") == (503, "overloaded")
        # A place that becomes free is free for the key that had none.
        held.pop(0).close()
        wait_until(lambda: metric(strict.url, "num_http_requests", KEY) == 3)
        hold("secret")
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: running(strict.url, KEY) == [])
    wait_until(lambda: metric(strict.url, "num_http_requests", KEY) == 0)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 4}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "stop": ["a"] * 3}, "stop"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 5}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 4}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 3, "n": 2}, "n"),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 4}, "input"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 3, "instructions": "b"},
         "input"),
    ],
)  # fmt: skip
def test_counts_are_limited(strict: Server, path: str, body: Any, param: str) -> None:
    answer = post(strict.url, path, body, KEY)
    assert answer.status == 400 and answer.error["param"] == param


def nested(depth: int) -> dict[str, Any]:
    """A schema of lists in lists. Its deepest text is one level more."""
    return {"type": "array", "items": nested(depth - 1)} if depth > 1 else {"type": "null"}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"structured_outputs": {"json": nested(6)}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {"regex": "a" * 901}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {"choice": ["ab" * 50] * 10}}, "structured_outputs"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "schema": nested(6)}}}, "response_format"),
        (CHAT, {"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "f", "parameters": nested(6)}}]}, "tools"),
        (CHAT, {"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "f", "parameters": {"enum": ["a" * 900]}}}]}, "tools"),
        ("/v1/responses", {"text": {"format": {
            "type": "json_schema", "name": "a", "schema": nested(6)}}}, "text.format"),
    ],
)  # fmt: skip
def test_schemas_are_limited(strict: Server, path: str, fields: dict[str, Any], param: str) -> None:
    message = [{"role": "user", "content": "a"}]
    body = ({"messages": message} if path == CHAT else {"input": message}) | fields
    error = post(strict.url, path, body, KEY).error
    assert error["param"] == param and error["message"].startswith(param)
    assert "900" in error["message"] or "6 levels" in error["message"]


def test_a_schema_within_the_limits_is_taken(strict: Server) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    body |= {"structured_outputs": {"json": nested(5)}}
    assert post(strict.url, CHAT, body, KEY).status == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": [{"role": "user", "content": "a"}] * 4}, "messages"),
        ({"messages": []}, "messages"),
        # each result of a tool is a message
        ({"messages": [{"role": "user", "content": 4 * [
            {"type": "tool_result", "tool_use_id": "1", "content": "a"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [
            {"name": "f", "input_schema": {}}] * 2000}, "tools"),
    ],
)  # fmt: skip
def test_counts_of_messages_are_limited(strict: Server, path: str, body: Any, word: str) -> None:
    answer = post(strict.url, path, body | {"max_tokens": 1}, KEY)
    assert answer.status in (400, 413)
    assert answer.status == 413 or answer.error["message"].startswith(word)


def test_idle_connections_are_refused_beyond_the_limit(strict: Server) -> None:
    """64 are open at most; the others are told so, and the server goes on."""
    held = [connect(strict.url) for _ in range(100)]
    try:
        assert {read_answer(connection).status for connection in held[64:]} == {503}
        held[0].sendall(request("GET", "/health"))
        assert read_answer(held[0]).status == 200
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: get(strict.url, "/health").status == 200)


def test_a_system_with_few_files_refuses_connections(tiny_model: Path, tmp_path: Path) -> None:
    """Where the system allows 100 open files, connections beyond them are told so."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    times = ("--read-timeout", "100000")
    with serving(tiny_model, tmp_path / "log", *times, preexec_fn=limit) as few:
        held = [connect(few.url) for _ in range(120)]
        statuses = [read_answer(connection).status for connection in held[100:]]
        assert set(statuses) == {503}
        for connection in held:
            connection.close()
        wait_until(lambda: get(few.url, "/health").status == 200)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_thousand_idle_connections(server: Server) -> None:
    held = [connect(server.url) for _ in range(1000)]
    try:
        assert get(server.url, "/health").status == 200
        answer = server.client().completions.create(model="tiny", prompt="A ", max_tokens=4)
        assert answer.choices
    finally:
        for connection in held:
            connection.close()
    assert get(server.url, "/health").status == 200


def test_the_log_holds_no_tracebacks(strict: Server, hasty: Server) -> None:
    """Runs last in this file: nothing above was a fault of the server."""
    log = strict.log.read_text() + hasty.log.read_text()
    assert "Traceback" not in log and "secret" not in log.replace("sécret", "")
