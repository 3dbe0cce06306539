"""`pellucid bench serve` as a user sees it: tables, JSON at the end, sentences for bad input."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pellucid.cli.bench_serve_report import print_run
from pellucid.cli.main import main
from pellucid.measure.load import LoadRun, LoadSettings, client_report
from pellucid.measure.load_rounds import LoadPlan, MeasuredRun
from pellucid.measure.load_statistics import RequestRecord, summarize

pytest.importorskip("aiohttp")

HEAD = "HTTP/1.1 {}\r\nContent-Type: {}\r\nConnection: close\r\n\r\n"
MODELS = HEAD.format("200 OK", "application/json") + '{"data": [{"id": "tiny"}]}'
CHUNK = 'data: {"choices": [{"text": " a", "delta": {"content": " a"}, "finish_reason": null}]}\n\n'
USAGE = (
    'data: {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 3, '
    '"prompt_tokens_details": {"cached_tokens": 4}}}\n\ndata: [DONE]\n\n'
)
ANSWER = HEAD.format("200 OK", "text/event-stream") + 3 * CHUNK + USAGE
REFUSAL = HEAD.format("500 Oops", "application/json") + '{"error": {"message": "no room"}}'


@contextmanager
def server(refuse_after: int = 1 << 30) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL, the bodies that came). From request `refuse_after` on it answers with HTTP 500."""
    bodies: list[dict[str, Any]] = []
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []
    is_up = threading.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        if request.startswith("GET"):
            writer.write(MODELS.encode())
        else:
            length = request.lower().partition("content-length: ")[2].partition("\r\n")[0]
            body = json.loads(await reader.readexactly(int(length)))
            bodies.append({**body, "path": request.split()[1]})
            writer.write((REFUSAL if len(bodies) > refuse_after else ANSWER).encode())
        await writer.drain()
        writer.close()

    async def serve() -> None:
        end = asyncio.Event()
        served = await asyncio.start_server(handle, "127.0.0.1", 0)
        started.append((asyncio.get_running_loop(), end, served.sockets[0].getsockname()[1]))
        is_up.set()
        async with served:
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    is_up.wait()
    loop, end, port = started[0]
    try:
        yield f"http://127.0.0.1:{port}/v1", bodies
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()


def bench(*arguments: str, **extra: Any) -> Result:
    return CliRunner().invoke(main, ["bench", "serve", *arguments], **extra)


def last_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_a_run_prints_tables_and_ends_with_json(tmp_path: Path) -> None:
    saved = tmp_path / "records.jsonl"
    with server() as (url, bodies):
        result = bench(
            *("--url", url, "--num-prompts", "6", "--max-concurrency", "2", "--save", str(saved)),
            *("--goodput", "ttft:60000", "tpot:60000", "--random-input-len", "8"),
            *("--random-output-len", "3", "--ignore-eos"),
        )
    assert result.exit_code == 0, result.output
    found = last_json(result)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (6, 0, 18)
    assert found["model_id"] == "tiny" and found["complete"] is True
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert "requests answered" in result.stdout and "TTFT" in result.stdout
    assert "50% of the input tokens came from the server's prefix cache" in result.stdout
    # one request to warm up, then six of different prompts
    assert len(bodies) == 7 and len({body["prompt"] for body in bodies}) == 7
    assert all(b["max_tokens"] == 3 and b["ignore_eos"] and b["stream"] for b in bodies)
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert "run" in rows[0] and [row["index"] for row in rows[1:]] == list(range(6))
    assert all(row["output_tokens"] == 3 and row["ttft"] > 0 for row in rows[1:])


def test_two_servers_get_the_same_prompts_in_turns() -> None:
    with server() as (url, ours), server() as (other, theirs):
        result = bench(
            *("--url", url, "--against", other, "--rounds", "3", "--num-prompts", "2"),
            *("--endpoint", "chat", "--random-input-len", "8"),
        )
    assert result.exit_code == 0, result.output
    found = last_json(result)
    assert [run["url"] for run in found["runs"]] == [url, other] * 3
    assert found["ratios"]["mean_ttft_ms"]["least"] <= found["ratios"]["mean_ttft_ms"]["most"]
    assert "A / B" in result.stdout
    ours.sort(key=str), theirs.sort(key=str)
    assert ours == theirs and len({str(body["messages"]) for body in ours}) == 7
    assert {body["path"] for body in ours} == {"/v1/chat/completions"}


def test_a_server_compared_with_itself_sees_no_prompt_twice() -> None:
    with server() as (url, bodies):
        result = bench("--url", url, "--against", url, "--rounds", "2", "--num-prompts", "2")
    assert result.exit_code == 0, result.output
    measured = [body["prompt"] for body in bodies][2:]  # each server was warmed up
    assert len(set(measured)) == len(measured) == 8


def test_failures_are_shown_with_the_sentence_of_the_server() -> None:
    with server(refuse_after=3) as (url, _):
        result = bench("--url", url, "--num-prompts", "5", "--max-concurrency", "1")
    assert result.exit_code == 0
    assert "failed, HTTP 500: 3 (request 2: no room)" in result.stdout
    assert last_json(result)["errors"] == {"HTTP 500": 3}
    with server(refuse_after=1) as (url, _):
        assert bench("--url", url, "--num-prompts", "2").exit_code == 1  # all failed


def test_the_key_comes_from_the_environment_and_is_not_printed() -> None:
    with server() as (url, _):
        result = bench("--url", url, "--num-prompts", "1", env={"OPENAI_API_KEY": "sk-secret"})
    assert result.exit_code == 0 and "sk-secret" not in result.output


def sentence(*arguments: str) -> str:
    result = bench(*arguments)
    assert result.exit_code != 0
    return result.output


def test_bad_input_gets_one_sentence(tmp_path: Path) -> None:
    gone = "http://127.0.0.1:1/v1"
    assert "connection refused; does the server run?" in sentence("--url", gone)
    assert "it must be like http://" in sentence("--url", "127.0.0.1:8000")
    assert "NAME:MILLISECONDS" in sentence("--url", gone, "--goodput", "ttft=5")
    assert "NAME:MILLISECONDS" in sentence("--url", gone, "--goodput", "ttft:5", "tpot=5")
    assert "'tpot:5' belongs to no option" in sentence("--url", gone, "tpot:5")
    assert "is no rate" in sentence("--url", gone, "--request-rate", "0")
    assert "is no rate" in sentence("--url", gone, "--request-rate", "nan")
    assert "need --against" in sentence("--url", gone, "--rounds", "3")
    assert "--extra-body is not a JSON object" in sentence("--url", gone, "--extra-body", "{")
    file = tmp_path / "there"
    file.write_text("")
    assert "exists already" in sentence("--url", gone, "--save", str(file))
    assert "has no requests" in sentence("--url", gone, "--dataset-path", str(file))
    assert "has no requests" in sentence("--url", gone, "--trace", str(file))
    both = ("--trace", str(file), "--dataset-path", str(file))
    assert "exclude each other" in sentence("--url", gone, *both)
    with server() as (url, _):
        assert "has no model 'big'; it has: tiny" in sentence("--url", url, "--model", "big")
    with server(refuse_after=0) as (url, _):
        assert "does not answer the first request (HTTP 500): no room" in sentence("--url", url)


def test_a_late_client_is_told_beside_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    record = RequestRecord(0, 0.0, 0.0, end=0.2, chunk_times=[0.1, 0.2], chunk_tokens=[1, 1])
    run = LoadRun([record], 0.2, loop_lags=[0.05] * 9)
    summary = summarize(run.records, run.seconds)
    client = client_report(run, summary)
    plan = LoadPlan(
        *(("http://a/v1",), (None,), None, 1.0, LoadSettings(1), float("inf"), 1.0, 0, 1, 1, {}),
        *((90.0,), ("ttft", "itl"), "completions", None, None, 1, 1, 1, 0.0, 0),
    )
    print_run(MeasuredRun(0, "http://a/v1", "m", 0, run, summary, client), plan)
    told = "The figures are doubtful: the client was 50.0 ms late, beside 100.0 ms of ITL."
    assert told in capsys.readouterr().out
    # a client that is late by a thousandth is not worth a sentence
    run = LoadRun([record], 0.2, loop_lags=[0.0001] * 9)
    assert client_report(run, summary)["doubt"] is None
