"""Requests that break HTTP or JSON: refused with OpenAI's error body, never by a fault."""

import json
import random
import socket
from typing import Any

import pytest

from tests.server.conftest import Server
from tests.server.raw_http import connect, exchange, get, post, request

CHAT = "/v1/chat/completions"
POSTS = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
         "/v1/embeddings", "/tokenize", "/detokenize")  # fmt: skip

BODIES: dict[str, bytes] = {
    "empty": b"",
    "garbage": b"\x00\xff\xfe garbage",
    "cut": b'{"model": "tiny", "messages": [{"role"',
    "no object": b"[1, 2, 3]",
    "a number": b"1",
    "null": b"null",
    "deep list": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "deep and open": b"[" * 1_000_000,
    "invalid UTF-8": b'{"prompt": "\xff\xfe", "messages": [{"role": "user", "content": "\xc3"}]}',
    "lone surrogate": b'{"prompt": "\\ud800", "messages": [{"role":"user","content":"\\udc00"}]}',
    "surrogate in a name": b'{"prompt": "a", "\\ud800": 1}',
    "NaN": b'{"prompt": "a", "messages": [{"role":"user","content":"a"}], "temperature": NaN,'
    b' "tokens": [NaN]}',
    "infinity": b'{"prompt": 1, "messages": [], "temperature": -Infinity, "tokens": [Infinity]}',
    "overflow": b'{"prompt": 1e999, "messages": [], "temperature": 1e999, "tokens": [1e999]}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"tokens": 1}',
    "two values": b'{"tokens": [1]} {"tokens": [1]}',
    "comments": b'{/* a */ "tokens": [1]}',
    "single quotes": b"{'tokens': [1]}",
    "long number": b'{"tokens": [' + b"9" * 100_000 + b"]}",
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_json_is_refused(server: Server, path: str, name: str) -> None:
    answer = post(server.url, path, BODIES[name])
    assert answer.status == 400, answer
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 2000


def test_a_key_that_stands_twice_is_taken_once(server: Server) -> None:
    """JSON leaves open which of them counts; here it is the last, as in Python."""
    body = b'{"tokens": [9999999], "tokens": [1]}'
    assert post(server.url, "/detokenize", body).status == 200


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "", "json"])
def test_only_json_is_taken(server: Server, kind: str) -> None:
    """A page of another origin can send no JSON without being asked for leave first."""
    for path in POSTS:
        answer = post(server.url, path, {"tokens": [1]}, f"Content-Type: {kind}")
        assert answer.status == 415 and answer.error["message"].startswith("content-type")


RAW: dict[str, tuple[bytes, int]] = {
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, 400),
    "no HTTP": (b"hello\r\n\r\n", 400),
    "unknown method": (b"BREW /health HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "HTTP/2 without TLS": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "bytes in the path": (b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a line without colon": (b"GET /health HTTP/1.1\r\nHost a\r\n\r\n", 400),
    "two lengths": (
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        400,
    ),
    "length and chunks": (
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "negative length": (b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
    "length of letters": (b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
    "connect": (b"CONNECT a.example:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "all of the server": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    "delete": (request("DELETE", CHAT), 405),
    "put": (request("PUT", "/health"), 405),
    "patch": (request("PATCH", "/v1/models"), 405),
    "options": (request("OPTIONS", CHAT), 405),
    "trace": (request("TRACE", "/health"), 405),
    "get where post is": (request("GET", "/v1/completions"), 405),
    "unknown path": (request("GET", "/admin"), 404),
    "out of the root": (request("GET", "/v1/models/../../etc/passwd"), 404),
    "out of the root, hidden": (request("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), 404),
    "zero in the path": (request("GET", "/v1/models/%00"), 404),
    "half a letter in the path": (request("GET", "/v1/models/%ff"), 404),
}


@pytest.mark.parametrize("name", RAW)
def test_broken_http_is_refused(server: Server, name: str) -> None:
    data, status = RAW[name]
    answer = exchange(server.url, data)
    assert answer.status == status
    assert answer.error["message"]


def test_bad_chunks_are_refused(server: Server) -> None:
    head = request("POST", "/tokenize", b"", "Transfer-Encoding: chunked")
    for chunks in (b"xyz\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n"):
        answer = exchange(server.url, head + chunks)
        assert answer.status == 400 and answer.error


def test_older_http_is_answered(server: Server) -> None:
    answer = exchange(server.url, b"GET /health HTTP/1.0\r\n\r\n")
    assert answer.status == 200 and answer.headers["connection"] == "close"


def test_head_has_no_body(server: Server) -> None:
    assert exchange(server.url, b"HEAD /health HTTP/1.1\r\nHost: a\r\n\r\n").status in (200, 405)


def test_requests_in_a_row_are_answered_in_order(server: Server) -> None:
    """Several requests are sent before the first answer is read."""
    bodies = [{"tokens": [i]} for i in range(5)]
    data = b"".join(request("POST", "/detokenize", json.dumps(b).encode()) for b in bodies)
    with connect(server.url) as connection:
        connection.sendall(data + request("GET", "/nothing") + request("GET", "/health"))
        file_answers = _read_all(connection, 7)
    assert [status for status, _ in file_answers] == [200] * 5 + [404, 200]
    alone = [post(server.url, "/detokenize", body).body for body in bodies]
    assert [body for _, body in file_answers[:5]] == alone


def _read_all(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Responses with a known length, one after another."""
    file, answers = connection.makefile("rb"), []
    for _ in range(count):
        status, length = int(file.readline().split()[1]), 0
        while line := file.readline().strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        answers.append((status, file.read(length)))
    return answers


def test_other_origins_are_not_let_in(server: Server) -> None:
    origin = "Origin: https://evil.example"
    answer = get(server.url, "/v1/models", origin)
    assert not any(name.startswith("access-control") for name in answer.headers)
    asked = request("OPTIONS", CHAT, b"", origin, "Access-Control-Request-Method: POST")
    answer = exchange(server.url, asked)
    assert answer.status == 405
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_ten_megabytes_of_random_bodies(server: Server) -> None:
    """Random texts that look like JSON, of all lengths: each is answered, none with a fault."""
    rng = random.Random(4)
    words = ['"messages"', '"prompt"', '"role"', '"content"', '"n"', '"stop"', '"logit_bias"',
             "{", "}", "[", "]", ":", ",", "1", "-1", "1e308", "true", "null", '"a"', '"\\u00e9"',
             '"tools"', '"response_format"', " ", '"model"', '"tiny"', "\\", '"', "é"]  # fmt: skip
    total, statuses = 0, set()
    while total < 10 << 20:
        size = int(2 ** rng.uniform(0, 17))
        text = "".join(rng.choices(words, k=size))
        body = text.encode() if rng.random() < 0.3 else _around(text, rng)
        answer = post(server.url, rng.choice(POSTS), body)
        total += len(body)
        statuses.add(answer.status)
        assert 200 <= answer.status < 500, (answer, body[:500])
    assert get(server.url, "/health").status == 200
    assert 400 in statuses


def _around(text: str, rng: random.Random) -> bytes:
    """A valid body that holds a random text, or random values."""
    value: Any = rng.choice([text, [text], {"a": text}, len(text), -1.5, None, True, [1, [2]], {}])
    field = rng.choice(["prompt", "messages", "n", "stop", "tools", "tokens", "logit_bias",
                        "response_format", "seed", "stream_options", "model", "input", "system",
                        "instructions", "text", "tool_choice", "reasoning", "thinking",
                        "stop_sequences"])  # fmt: skip
    body = {"prompt": "a", "input": "a", "messages": [{"role": "user", "content": "a"}]}
    limits = {"max_tokens": 1, "max_output_tokens": 1}
    return json.dumps(body | limits | {field: value}).encode()


def test_the_log_holds_no_tracebacks(server: Server) -> None:
    """Runs last in this file: nothing above was a fault of the server."""
    assert "Traceback" not in server.log.read_text()
