"""HTTP over a bare socket, for requests that no client library would send."""

import contextlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SECONDS = 600  # on a busy machine


@dataclass(frozen=True)
class Answer:
    """A response. A status of 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error of a body in OpenAI's form or Anthropic's, which is checked."""
        body: dict[str, Any] = json.loads(self.body)
        error: dict[str, Any] = body["error"]
        is_anthropic = body.get("type") == "error"
        names = {"message", "type"} | (set() if is_anthropic else {"param", "code"})
        assert set(error) == names
        assert isinstance(error["message"], str) and error["message"]
        return error


def connect(url: str, receive_buffer: int = 0) -> socket.socket:
    """A connection to a server. A small `receive_buffer` (bytes) holds back a fast sender."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(SECONDS)
    connection.connect((parts.hostname, parts.port))
    return connection


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """The bytes of a request with JSON, if any."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-enc")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def read_answer(connection: socket.socket, *, is_head: bool = False) -> Answer:
    """Read one response, with a body of known length, in chunks, or until the connection ends."""
    file = connection.makefile("rb")
    try:
        first = file.readline()
        if not first:
            return Answer(0, {}, b"")
        headers: dict[str, str] = {}
        while line := file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = b""
        if is_head:
            pass
        elif "content-length" in headers:
            body = file.read(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(file.readline(), 16):
                body += file.read(size)
                file.readline()
            file.readline()
        return Answer(int(first.split()[1]), headers, body)
    except ConnectionResetError:
        return Answer(0, {}, b"")


def exchange(url: str, data: bytes) -> Answer:
    """Send bytes on a connection of their own, and read the answer."""
    with connect(url) as connection:
        # The server may refuse before the end; the answer is there all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        return read_answer(connection, is_head=data.startswith(b"HEAD "))


def post(url: str, path: str, body: Any, *headers: str) -> Answer:
    """POST JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return exchange(url, request("POST", path, data, *headers))


def get(url: str, path: str, *headers: str) -> Answer:
    """GET a path."""
    return exchange(url, request("GET", path, b"", *headers))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(url: str, *headers: str) -> list[Any]:
    """The requests that the engine has."""
    found: list[Any] = json.loads(get(url, "/debug/requests", *headers).body)["requests"]
    return found


def metric(url: str, name: str, *headers: str) -> float:
    """One number of /metrics."""
    text = get(url, "/metrics", *headers).body.decode()
    line = next(line for line in text.splitlines() if line.startswith(f"pellucid:{name}{{"))
    return float(line.rpartition(" ")[2])
