"""Signals: a server that is told to end lets its requests end first; how it starts and fails to."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, serving, serving_endless
from tests.server.raw_http import SECONDS, connect, get, post, read_answer, request, wait_until

# Several MB: more than the system's buffers hold, so that it ends when the test reads it.
LARGE: dict[str, Any] = {"prompt": "A ", "max_tokens": 1900, "ignore_eos": True, "stream": True,
                         "logprobs": 20, "n": 8}  # fmt: skip
ENDLESS = LARGE | {"max_tokens": 400_000}


def start(server: Server, body: dict[str, Any]) -> socket.socket:
    """A connection on which a stream has begun."""
    connection = connect(server.url, receive_buffer=1 << 16)
    connection.sendall(request("POST", "/v1/completions", json.dumps(body).encode()))
    assert connection.recv(1, socket.MSG_PEEK)
    return connection


def events(connection: socket.socket) -> list[Any]:
    """The events of a stream, to its end."""
    answer = read_answer(connection)
    # the logprobs alone; a slow machine puts more tokens into an event, which saves its frame
    assert answer.status == 200 and len(answer.body) > 3 << 20
    pieces = answer.body.decode().strip().split("\n\n")
    return [p if p.endswith("[DONE]") else json.loads(p.removeprefix("data: ")) for p in pieces]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end(tiny_model: Path, tmp_path: Path, sig: signal.Signals) -> None:
    times = ("--write-timeout", "100000", "--drain-timeout", "100000")
    with serving(tiny_model, tmp_path / "log", "--served-model-name", "tiny", *times) as server:
        with start(server, LARGE) as connection:
            server.process.send_signal(sig)
            while (ready := get(server.url, "/ready")).status == 200:
                pass
            # New requests are refused, what runs goes on.
            assert ready.status == 503 and ready.error["code"] == "draining"
            refused = post(server.url, "/v1/completions", {"prompt": "A "})
            assert refused.status == 503 and "retry-after" in refused.headers
            assert get(server.url, "/health").status == 200
            found = events(connection)
        assert found[-1] == "data: [DONE]"
        reasons = [c["finish_reason"] for e in found[:-1] for c in e["choices"]]
        assert reasons.count("length") == 8
        assert server.process.wait(SECONDS) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("is_stream", [True, False])
def test_what_takes_too_long_is_told_and_given_up(
    endless_model: Path, tmp_path: Path, is_stream: bool
) -> None:
    with serving_endless(endless_model, tmp_path / "log", "--drain-timeout", "0.1") as server:
        connection = connect(server.url)
        body = ENDLESS | {"stream": is_stream, "n": 1, "logprobs": None}
        connection.sendall(request("POST", "/v1/completions", json.dumps(body).encode()))
        wait_until(lambda: b'"request_id"' in get(server.url, "/debug/requests").body)
        server.process.send_signal(signal.SIGTERM)
        answer = read_answer(connection)
        connection.close()
        if is_stream:
            last = answer.body.strip().split(b"\n\n")[-1].removeprefix(b"data: ")
            assert json.loads(last)["error"]["code"] == "draining"
        else:
            assert answer.status == 503 and answer.error["code"] == "draining"
        assert server.process.wait(SECONDS) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_second_signal_ends_at_once(endless_model: Path, tmp_path: Path) -> None:
    times = ("--write-timeout", "100000", "--drain-timeout", "100000")
    log = tmp_path / "log"
    with serving_endless(endless_model, log, *times) as server, start(server, ENDLESS):
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(server.url, "/ready").status == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_idle_connections_do_not_hold_the_end(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--served-model-name", "tiny", "--drain-timeout", "100000")
    with serving(tiny_model, tmp_path / "log", *options) as server:
        used = connect(server.url)
        used.sendall(request("GET", "/health"))
        assert read_answer(used).status == 200
        with used, connect(server.url):
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(SECONDS) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "{port}"],
        ["--port", "0", "--host", "203.0.113.1"],
        ["--port", "0", "--host", "no.such.host.invalid"],
        ["--port", "0", "--ssl-certfile", "/nowhere/cert.pem"],
        ["--port", "0", "--ssl-certfile", "{model}", "--ssl-keyfile", "{model}"],
        ["--port", "0", "--ssl-keyfile", "{model}"],
    ],
)
def test_a_server_that_cannot_start_says_why(tiny_model: Path, options: list[str]) -> None:
    """One sentence, and exit code 1 as for every wrong setting."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = [option.format(port=port, model=tiny_model) for option in options]
        found = subprocess.run(
            [sys.executable, "-m", "pellucid", "serve", str(tiny_model), *given],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.count("error:") == 1 and found.stderr.splitlines()[-1].startswith(
        "pellucid"
    )
