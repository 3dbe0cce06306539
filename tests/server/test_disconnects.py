"""Clients that leave or do not read: their requests end, and their blocks are free again."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, serving, serving_endless
from tests.server.raw_http import SECONDS, connect, get, metric, post, request, running, wait_until

LONG: dict[str, Any] = {"prompt": "A ", "max_tokens": 400_000, "ignore_eos": True, "logprobs": 20}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "A "}], "max_tokens": 400_000,
                        "ignore_eos": True, "logprobs": True, "top_logprobs": 20}  # fmt: skip
RESPONSES: dict[str, Any] = {"input": "A ", "max_output_tokens": 400_000}
MESSAGES: dict[str, Any] = {"messages": CHAT["messages"], "max_tokens": 400_000}
ROUTES = {"/v1/completions": LONG, "/v1/chat/completions": CHAT, "/v1/responses": RESPONSES,
          "/v1/messages": MESSAGES}  # fmt: skip


def send(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection with a request whose answer is not read."""
    connection = connect(server.url, receive_buffer=4096)
    connection.sendall(request("POST", path, json.dumps(body).encode()))
    return connection


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_a_client_that_leaves_frees_its_blocks(
    endless: Server, path: str, is_stream: bool, count: int
) -> None:
    body = ROUTES[path] | {"stream": is_stream, "n": count}
    with send(endless, path, body):
        wait_until(lambda: metric(endless.url, "kv_cache_usage_perc") > 0)
    wait_until(lambda: running(endless.url) == [])
    wait_until(lambda: metric(endless.url, "num_http_requests") == 0)
    assert metric(endless.url, "kv_cache_usage_perc") == 0
    # Nothing is computed for it any more.
    tokens = metric(endless.url, "generation_tokens_total")
    assert metric(endless.url, "generation_tokens_total") == tokens


def test_a_client_that_leaves_one_of_several_prompts(endless: Server) -> None:
    body = LONG | {"prompt": ["A ", "B ", "C "], "stream": True}
    with send(endless, "/v1/completions", body):
        wait_until(lambda: len(running(endless.url)) == 3)
    wait_until(lambda: running(endless.url) == [])
    assert metric(endless.url, "kv_cache_usage_perc") == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_requests_in_a_row(endless: Server, is_stream: bool) -> None:
    """The first runs, the others wait for its answer: all of them are given up."""
    data = request("POST", "/v1/completions", json.dumps(LONG | {"stream": is_stream}).encode())
    with connect(endless.url, receive_buffer=4096) as connection:
        connection.sendall(3 * data)
        wait_until(lambda: metric(endless.url, "num_http_requests") == 1)
    wait_until(lambda: metric(endless.url, "num_http_requests") == 0)
    assert running(endless.url) == []


def test_a_client_that_leaves_while_it_sends(server: Server) -> None:
    """Half a head, half a body: nothing begins, and it is no fault of the server."""
    data = request("POST", "/v1/completions", json.dumps(LONG).encode())
    for length in (0, 1, 20, len(data) // 2, len(data) - 1):
        with connect(server.url) as connection:
            connection.sendall(data[:length])
    wait_until(lambda: metric(server.url, "num_http_requests") == 0)
    assert running(server.url) == []
    assert get(server.url, "/health").status == 200
    assert "Traceback" not in server.log.read_text()


def test_a_client_that_waits_in_the_queue_and_leaves(endless_model: Path, tmp_path: Path) -> None:
    with serving_endless(endless_model, tmp_path / "log", "--max-num-seqs", "1") as server:
        with send(server, "/v1/completions", LONG | {"stream": True}):
            wait_until(lambda: metric(server.url, "num_requests_running") == 1)
            with send(server, "/v1/completions", LONG):
                wait_until(lambda: metric(server.url, "num_requests_waiting") == 1)
            wait_until(lambda: metric(server.url, "num_requests_waiting") == 0)
        wait_until(lambda: running(server.url) == [])
        assert post(server.url, "/v1/completions", {"prompt": "A ", "max_tokens": 1}).status == 200


@pytest.mark.parametrize("asked", ["stream", "descriptions"])
def test_a_slow_reader_is_dropped_and_holds_nobody(
    tiny_model: Path, tmp_path: Path, asked: str
) -> None:
    """It asks for much and reads nothing: others are served, and the server closes its connection,
    whatever is still to be sent.
    """
    options = ("--served-model-name", "tiny", "--write-timeout", "1")
    with serving(tiny_model, tmp_path / "log", *options) as server:
        before = _num_sockets(server)
        if asked == "stream":
            # about 20 MB, of which the system's buffers hold a part
            body = LONG | {"max_tokens": 1900, "n": 8, "stream": True}
            connection = send(server, "/v1/completions", body)
        else:
            connection = connect(server.url, receive_buffer=4096)
            connection.setblocking(False)
            connection.send(request("GET", "/openapi.json") * 1000)
            connection.settimeout(SECONDS)
        with connection:
            assert connection.recv(1, socket.MSG_PEEK)
            assert post(server.url, "/v1/completions", {"prompt": "A "}).status == 200
            wait_until(lambda: _num_sockets(server) <= before)
            assert running(server.url) == []
        assert get(server.url, "/health").status == 200
    assert "Traceback" not in (tmp_path / "log").read_text()


def _num_sockets(server: Server) -> int:
    """How many sockets the server has open."""
    count = 0
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            count += os.readlink(link).startswith("socket:")
    return count
