"""The response of a route that generates: whole or as a stream of server-sent events, given up as
soon as its client leaves.

A client that disconnects cancels its request, streamed or not, and the engine frees its blocks
before the next step. A client that reads slowly holds up its own response alone: the engine's
mailbox keeps the newest output, and what the client missed comes in one piece. If it reads nothing
for `write_timeout`, `connection` drops it.

Headers are sent with the first output, so a request that is refused has its own status.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ..outputs import RequestOutput
from .errors import ApiError, as_api_error, error_body
from .generation import Job
from .service import Service
from .wire import compact

__all__ = ["GeneratedResponse", "Renderer", "event"]

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class Renderer(Protocol):
    """Makes a route's bodies from outputs; it keeps what was sent of each completion."""

    def begin(self) -> bytes:
        """The events that come before the first token."""
        ...

    def push(self, place: int, output: RequestOutput) -> bytes:
        """The events of what is new in an output of the prompt at `place`."""
        ...

    def end(self, outputs: list[RequestOutput]) -> bytes:
        """The last events."""
        ...

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + compact(data) + b"\n\n"


class GeneratedResponse(Response):
    """Runs a job and sends what its renderer makes of it."""

    def __init__(
        self,
        service: Service,
        job: Job,
        renderer: Renderer,
        failed: Callable[[ApiError], bytes] = lambda error: event(error_body(error)),
    ) -> None:
        """`failed` makes the event of an error within a stream."""
        super().__init__()
        self._service = service
        self._job = job
        self._renderer = renderer
        self._failed = failed
        self._is_started = False
        self._outputs: dict[int, RequestOutput] = {}  # the last one of each prompt
        self._error: ApiError | None = None  # what the client was told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.time_ns()
        try:
            await self._respond(scope, receive, send)
        except Exception as error:
            self._error = as_api_error(error, self._job.body_fields)
            raise self._error from error
        finally:
            if self._service.tracing is not None:
                self._service.tracing.record(
                    began, Headers(scope=scope), self._job, self._ordered(), self._error
                )

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.admitted(self._job.key):
            work = asyncio.create_task(self._work(scope, receive, send))
            leaving = asyncio.create_task(_wait_for_disconnect(receive))
            giving_up = asyncio.create_task(self._service.giving_up.wait())
            tasks = {work, leaving, giving_up}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if work.cancelled() and self._service.giving_up.is_set():
                message = "the server shut down before the answer was whole"
                await self._fail(ApiError(503, message, code="draining"), send)
            if not work.cancelled() and (error := work.exception()) is not None:
                raise error

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run to the end. Raises what went wrong before the response began."""
        seconds = self._service.settings.request_timeout or None
        try:
            async with asyncio.timeout(seconds):
                outputs = await self._generate(send)
            if not self._job.is_stream:
                response = await self._respond_whole(outputs)
                self._is_started = True
                await response(scope, receive, send)
        except TimeoutError:
            await self._fail(
                ApiError(504, f"the request took more than {seconds} s", code="timeout"), send
            )
        except Exception as error:
            if not self._is_started:
                raise
            await self._fail(as_api_error(error), send)

    async def _respond_whole(self, outputs: list[RequestOutput]) -> Response:
        """The response that is not streamed."""
        return JSONResponse(self._renderer.whole(outputs))

    async def _generate(self, send: Send) -> list[RequestOutput]:
        """All prompts' last outputs; a stream has been sent by then."""
        job, renderer, outputs = self._job, self._renderer, self._outputs
        async with aclosing(job.outputs) as found:
            async for place, output in found:
                self._observe(outputs.get(place), output)
                outputs[place] = output
                _check_whole(output)
                if job.is_stream:
                    chunk = renderer.push(place, output)
                    if not self._is_started:
                        chunk = renderer.begin() + chunk
                    await self._send(chunk, send)
                if output.finished:
                    self._service.metrics.finish(output, job.max_tokens)
        if job.is_stream:
            await self._send(renderer.end(self._ordered()), send, is_last=True)
        return self._ordered()

    def _ordered(self) -> list[RequestOutput]:
        """The last output of each prompt, in the prompts' order."""
        return [self._outputs[place] for place in sorted(self._outputs)]

    def _observe(self, before: RequestOutput | None, output: RequestOutput) -> None:
        """The time between two outputs of a stream."""
        last = None if before is None else before.metrics.last_token_time
        now = output.metrics.last_token_time
        if last is not None and now is not None and now > last:
            self._service.metrics.observe("inter_token_latency_seconds", now - last)

    async def _send(self, chunk: bytes, send: Send, *, is_last: bool = False) -> None:
        """Send events, and the headers before the first."""
        if not self._is_started:
            self._is_started = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if not chunk and not is_last:
            return
        message: Message = {"type": "http.response.body", "body": chunk, "more_body": not is_last}
        await send(message)  # `connection` ends a client that reads nothing

    async def _fail(self, error: ApiError, send: Send) -> None:
        """Tell of an error, within the stream if it has begun."""
        if not self._is_started:
            raise error
        self._error = error
        if not self._job.is_stream:
            return  # half a body cannot be mended: the connection is closed
        self._service.metrics.refuse(error.status)
        await self._send(self._failed(error), send, is_last=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has left; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_whole(output: RequestOutput) -> None:
    """Raise ApiError where the engine ended an answer by an error."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise ApiError(
                500, f"the answer broke off: {completion.stop_reason}", code="generation_failed"
            )
