"""A request's priority reaches the scheduler: what waits runs in its order."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import serving_endless
from tests.server.raw_http import connect, request, running, wait_until

LONG: dict[str, Any] = {"max_tokens": 400_000, "ignore_eos": True, "stream": True}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": LONG | {"prompt": "A "},
    "/v1/chat/completions": LONG | {"messages": [{"role": "user", "content": "A "}]},
}


@pytest.mark.parametrize("path", ROUTES)
def test_what_waits_runs_by_priority(endless_model: Path, tmp_path: Path, path: str) -> None:
    options = ("--max-num-seqs", "1", "--scheduling-policy", "priority")
    with serving_endless(endless_model, tmp_path / "log", *options) as server:

        def wait_for(expected: dict[int, str]) -> None:
            """Wait until these are the priorities and the states of all requests."""
            wait_until(
                lambda: {r["priority"]: r["status"] for r in running(server.url)} == expected
            )

        def send(priority: int) -> socket.socket:
            connection = connect(server.url)
            body = json.dumps(ROUTES[path] | {"priority": priority}).encode()
            connection.sendall(request("POST", path, body))
            return connection

        first = send(1)
        wait_for({1: "running"})
        last = send(30)
        wait_for({1: "running", 30: "waiting"})
        second = send(20)
        wait_for({1: "running", 30: "waiting", 20: "waiting"})
        waiting = [r for r in running(server.url) if r["status"] == "waiting"]
        assert all(r["waits_for"] for r in waiting)
        first.close()
        wait_for({20: "running", 30: "waiting"})
        second.close()
        wait_for({30: "running"})
        last.close()
        wait_for({})
