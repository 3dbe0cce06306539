"""A load test over real sockets, against servers that misbehave in known ways.

The servers are scripts of raw bytes: no real server can be made to break off in the middle of a
chunk. What a sound server gives is tested in tests/server.
"""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterator
from itertools import repeat
from typing import Any

import pytest

from pellucid.errors import RequestError
from pellucid.measure.load import LoadRun, LoadSettings, client_report, run_load
from pellucid.measure.load_client import Server
from pellucid.measure.load_statistics import summarize
from pellucid.measure.load_workload import COMPLETIONS, random_workload

pytest.importorskip("aiohttp")

Reply = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


def head(status: str = "200 OK", kind: str = "text/event-stream") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str, reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": reason}])


SOUND = (
    head()
    + token(" a")
    + token(" b", "length")
    + event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 2})
    + b"data: [DONE]\n\n"
)


def sends(data: bytes) -> Reply:
    async def reply(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return reply


async def with_server(
    reply: Reply, use: Callable[[Server], Awaitable[Any]], timeout: float = 30.0
) -> Any:
    """What `use` gives with a client of a server that answers each request by `reply`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = request.lower().partition("content-length: ")[2].partition("\r\n")[0]
            await reader.readexactly(int(length or 0))
            await reply(request.partition("\r\n")[0], writer)
            await writer.drain()
        finally:
            writer.close()

    served = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = served.sockets[0].getsockname()[1]
    async with served, Server(f"http://127.0.0.1:{port}/v1", None, timeout) as server:
        return await use(server)


def run(
    reply: Reply, settings: LoadSettings, arrivals: Iterator[float] | None = None, **extra: Any
) -> LoadRun:
    found = LoadRun()

    async def use(server: Server) -> None:
        workload = random_workload(COMPLETIONS, 4, 2)
        await run_load(server, "m", workload, arrivals or repeat(0.0), settings, found)

    asyncio.run(with_server(reply, use, **extra))
    return found


def only_error(reply: Reply, **extra: Any) -> tuple[str | None, str | None]:
    (record,) = run(reply, LoadSettings(1), **extra).records
    return record.error_kind, record.error


def test_a_sound_answer_is_measured() -> None:
    found = run(sends(SOUND), LoadSettings(5, max_concurrency=2))
    assert [record.error for record in found.records] == [None] * 5
    summary = summarize(found.records, found.seconds)
    assert (summary["completed"], summary["total_output_tokens"]) == (5, 10)
    assert summary["total_input_tokens"] == 20 and summary["max_concurrent_requests"] <= 2
    for record in found.records:
        assert record.connected is not None
        assert record.scheduled <= record.sent <= record.connected <= record.chunk_times[0]
    assert client_report(found, summary)["cpu_share"] > 0


BROKEN = {
    "HTTP 400": (
        head("400 Bad Request", "application/json") + b'{"error": {"message": "too long"}}',
        "too long",
    ),
    "HTTP 502": (head("502 Bad Gateway", "text/html") + b"<html>no</html>", "Bad Gateway"),
    "HTTP 307": (head("307 Temporary Redirect") + b"", "Temporary Redirect"),
    "no stream": (head(kind="application/json") + b'{"detail": "busy"}', "one JSON came: busy"),
    "error in the stream": (
        head() + token("a") + event(error={"message": "out of memory"}),
        "out of memory",
    ),
    "stream broke off": (head() + token("a"), "ended after 1 chunks without"),
    "no JSON in the stream": (head() + b"data: <html>\n\n", "an event is '<html>'"),
    "connection lost": (b"", "closed before the answer"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_each_failure_has_a_kind_and_the_sentence_of_the_server(kind: str) -> None:
    data, sentence = BROKEN[kind]
    found = only_error(sends(data))
    assert found[0] == kind and sentence in (found[1] or "")


def test_an_answer_that_is_cut_short_is_a_failure() -> None:
    data = SOUND.replace(b"Connection: close", b"Content-Length: 100000")
    kind, sentence = only_error(sends(data))
    assert kind == "connection lost" and "in the middle of the answer" in (sentence or "")


def test_silence_is_a_timeout() -> None:
    async def reply(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head() + token("a"))
        await writer.drain()
        await asyncio.sleep(5)

    assert only_error(reply, timeout=0.2) == ("timeout", "nothing came for 0.2 s")


def test_a_server_that_is_not_there_is_refused_with_a_sentence() -> None:
    async def find() -> None:
        async with Server("http://127.0.0.1:1/v1", None, 5.0) as server:
            await server.find_model(None)

    with pytest.raises(RequestError, match="connection refused; does the server run"):
        asyncio.run(find())


@pytest.mark.parametrize(
    ("body", "wanted", "sentence"),
    [
        (b"<html>", None, "is not an OpenAI-compatible server"),
        (b'{"data": []}', None, "lists no models"),
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', "c", "has no model 'c'; it has: a, b"),
    ],
)
def test_a_wrong_server_or_model_is_told(body: bytes, wanted: str | None, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        asyncio.run(
            with_server(sends(head(kind="application/json") + body), lambda s: s.find_model(wanted))
        )


def test_the_first_model_is_taken_and_a_missing_list_is_no_obstacle() -> None:
    async def find(server: Server, wanted: str | None) -> str:
        return await server.find_model(wanted)

    listed = sends(head(kind="application/json") + b'{"data": [{"id": "a"}, {"id": "b"}]}')
    assert asyncio.run(with_server(listed, lambda s: find(s, None))) == "a"
    assert asyncio.run(with_server(listed, lambda s: find(s, "b"))) == "b"
    absent = sends(head("404 Not Found"))
    assert asyncio.run(with_server(absent, lambda s: find(s, "c"))) == "c"
    with pytest.raises(RequestError, match="HTTP 404: Not Found"):
        asyncio.run(with_server(absent, lambda s: find(s, None)))


def test_a_closed_loop_never_has_more_than_its_clients_at_the_server() -> None:
    running, most = 0, 0

    async def reply(_: str, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        writer.write(SOUND)

    found = run(reply, LoadSettings(20, max_concurrency=3))
    assert len(found.records) == 20 and most == 3


def test_an_open_loop_sends_at_the_arrival_times_whatever_the_server_does() -> None:
    gate = asyncio.Event()
    asked = 0

    async def reply(_: str, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        if asked == 4:  # nothing is answered before all are sent
            gate.set()
        await gate.wait()
        writer.write(SOUND)

    due = [0.0, 0.02, 0.04, 0.06]
    found = run(reply, LoadSettings(None), iter(due))
    assert [record.scheduled for record in found.records] == due
    assert all(record.sent >= record.scheduled for record in found.records)
    assert summarize(found.records, 1.0)["max_concurrent_requests"] == 4


def test_sending_ends_with_the_duration_and_answers_are_waited_for() -> None:
    found = run(sends(SOUND), LoadSettings(None, duration=0.3, max_concurrency=1))
    assert found.records and all(record.error is None for record in found.records)
    assert max(record.sent for record in found.records) <= 0.3 + max(found.late_sends)


def test_a_cancelled_run_keeps_what_was_measured() -> None:
    found = LoadRun()
    answered = 0

    async def use(server: Server) -> None:
        workload = random_workload(COMPLETIONS, 4, 2)
        settings = LoadSettings(10, max_concurrency=2)
        task = asyncio.create_task(run_load(server, "m", workload, repeat(0.0), settings, found))
        while len(found.records) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def reply(_: str, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        answered += 1
        if answered > 3:  # the fourth and the fifth wait for ever
            await asyncio.sleep(3600)
        writer.write(SOUND)

    asyncio.run(with_server(reply, use))
    assert len(found.records) == 3 and found.num_unfinished == 2
    assert all(math.isfinite(record.end) for record in found.records)
