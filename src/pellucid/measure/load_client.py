"""Sends requests to an OpenAI-compatible server and records when each part of an answer comes.

The clock is `time.perf_counter`. A chunk gets the time at which its bytes reach this program,
before they are parsed. A request is sent when its body lies ready as bytes, so making and encoding
a prompt is in no figure. Each request opens a connection of its own, and the time for that counts:
some servers close a connection after an answer, and a request sent on it at that moment would fail
for no fault of theirs. The library is aiohttp (extra `bench`): docs/decisions.md says why.
"""

import errno
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import ConfigError, RequestError
from .load_statistics import RequestRecord
from .load_stream import Answer, EventReader, StreamError, error_sentence
from .load_workload import LoadRequest

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Server", "check_url", "encode_request"]

MAX_ERROR_BODY = 1 << 16  # bytes
MAX_MODELS_BODY = 16 << 20
READ_BUFFER = 4 << 20  # bytes of one answer that may wait; less slows down a server that is ahead
CONNECT_SECONDS = 30.0


def check_url(url: str, name: str = "--url") -> str:
    """The URL without a slash at its end. Raises ConfigError unless it is http(s)://host…"""
    parts = urlsplit(url)
    try:
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_sound = False
    if not is_sound or parts.query or parts.fragment:
        raise ConfigError(f"{name} is {url!r:.200}; it must be like http://127.0.0.1:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ConfigError(
            f"{name} is {url!r:.200}; leave out the endpoint (--endpoint names it), such as "
            "http://127.0.0.1:8000/v1"
        )
    return url.rstrip("/")


def encode_request(
    request: LoadRequest, model: str, *, ignore_eos: bool, extra: Mapping[str, Any]
) -> bytes:
    """The body as bytes. Fields of `extra` replace others; null removes a field."""
    body: dict[str, Any] = {
        "model": model,
        **request.body,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ignore_eos:
        body["ignore_eos"] = True
    body |= extra
    return json.dumps({k: v for k, v in body.items() if v is not None}).encode()


class Server:
    """A client of one server. Use it as an async context manager."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise ConfigError(
                "bench serve needs aiohttp: install pellucid with the extra `bench`"
            ) from error
        self._aiohttp = aiohttp
        self.url = url
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> "Server":
        aiohttp = self._aiohttp
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_create_end.append(_note_connection)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=self._timeout
            ),
            read_bufsize=READ_BUFFER,
            headers=self._headers,
            trace_configs=[tracing],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def find_model(self, wanted: str | None) -> str:
        """The model to ask for: `wanted` if the server has it, or the first that it lists.

        Raises RequestError with one sentence: no connection, no OpenAI-compatible server, no model.
        """
        where = f"{self.url}/models"
        try:
            async with self._session.get(where, allow_redirects=False) as response:
                body = await _read_bounded(response, MAX_MODELS_BODY)
                status, reason = response.status, response.reason
        except (OSError, TimeoutError, self._aiohttp.ClientError) as error:
            raise RequestError(f"{self.url}: {self._describe(error)[1]}") from error
        if status == 404 and wanted is not None:
            return wanted  # a server without a list; the first request will tell
        if status != 200:
            sentence = _body_sentence(body, reason)
            hint = "" if self.url.endswith("/v1") else f"; is it {self.url}/v1?"
            raise RequestError(f"GET {where} was answered with HTTP {status}: {sentence}{hint}")
        names = _model_names(body)
        if names is None:
            hint = "" if self.url.endswith("/v1") else f"; is it {self.url}/v1?"
            raise RequestError(
                f"{self.url} is not an OpenAI-compatible server: GET {where} gave no list of "
                f"models{hint}"
            )
        if wanted is None and not names:
            raise RequestError(f"{self.url} lists no models; name one with --model")
        if wanted is not None and names and wanted not in names:
            listed = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise RequestError(f"{self.url} has no model {wanted!r:.200}; it has: {listed}")
        return wanted or names[0]

    async def send(self, path: str, body: bytes, record: RequestRecord, origin: float) -> None:
        """Send one request and fill its record; `origin` is the clock at the start of the run.

        A failure is written into the record. Only cancellation is raised.
        """
        answer, reader = Answer(), EventReader()
        record.sent = time.perf_counter() - origin
        try:
            async with self._session.post(
                f"{self.url}/{path}",
                data=body,
                allow_redirects=False,
                trace_request_ctx=(record, origin),
            ) as response:
                if response.status != 200:
                    text = await _read_bounded(response, MAX_ERROR_BODY)
                    sentence = _body_sentence(text, response.reason)
                    raise StreamError(f"HTTP {response.status}", sentence)
                if "json" in response.content_type:
                    text = await _read_bounded(response, MAX_ERROR_BODY)
                    raise StreamError("no stream", f"one JSON came: {_body_sentence(text, None)}")
                async for piece in response.content.iter_any():
                    now = time.perf_counter() - origin
                    for event in reader.feed(piece):
                        answer.take(event, now)
                for event in reader.end():
                    answer.take(event, time.perf_counter() - origin)
            answer.finish()
        except StreamError as error:
            record.error_kind, record.error = error.kind, str(error)
        except (OSError, TimeoutError, self._aiohttp.ClientError) as error:
            record.error_kind, record.error = self._describe(error)
        # Also of a request that failed: what had come until then.
        last = answer.times[-1] if answer.times else answer.finish_time
        is_whole = record.error is None and last is not None
        record.end = last if is_whole and last is not None else time.perf_counter() - origin
        record.chunk_times, record.chunk_tokens = answer.times, answer.counts
        record.input_tokens = answer.prompt_tokens
        record.cached_tokens = answer.cached_tokens
        record.output_tokens = answer.num_tokens
        record.is_counted = answer.completion_tokens is not None
        record.finish_reason = answer.finish_reason

    def _describe(self, error: Exception) -> tuple[str, str]:
        """(a few words to count by, a sentence)."""
        if isinstance(error, TimeoutError):
            return "timeout", f"nothing came for {self._timeout:g} s"
        if isinstance(error, self._aiohttp.ClientConnectorError):
            cause = error.os_error
            if cause.errno == errno.ECONNREFUSED:
                return "connection refused", "connection refused; does the server run?"
            return "no connection", cause.strerror or str(cause)
        if isinstance(error, self._aiohttp.InvalidURL):
            return "no connection", "the URL is wrong"
        if isinstance(error, self._aiohttp.ClientPayloadError):
            return "connection lost", "the connection was closed in the middle of the answer"
        return "connection lost", "the connection was closed before the answer"


async def _note_connection(_: object, context: Any, __: object) -> None:
    """Called by aiohttp when a connection stands."""
    if context.trace_request_ctx is not None:
        record, origin = context.trace_request_ctx
        record.connected = time.perf_counter() - origin


async def _read_bounded(response: "aiohttp.ClientResponse", max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            break
    return b"".join(parts)[:max_bytes]


def _body_sentence(body: bytes, reason: str | None) -> str:
    """What a server says in an error's body, or else the status line's reason."""
    try:
        return error_sentence(json.loads(body))
    except (ValueError, RecursionError):
        text = " ".join(body.decode("utf-8", "replace").split())
        is_page = text[:1] == "<"
        return (reason or "no reason given") if is_page or not text else text[:200]


def _model_names(body: bytes) -> list[str] | None:
    """The names of GET /models; None if that is no such list."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    data = value.get("data") if isinstance(value, dict) else None
    if data is None and isinstance(value, dict) and value.get("object") == "list":
        return []  # Ollama without models
    if not isinstance(data, list):
        return None
    rows = (row for row in data if isinstance(row, dict))
    return [row["id"] for row in rows if isinstance(row.get("id"), str)]
