"""The outermost layer of the app: API keys, the size and time of bodies, and the access log."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_body, route_path
from .service import Service, tenant_of
from .settings import ServerSettings

__all__ = ["Guard"]

# open to all: whether the server lives, and the files of the page, which hold nothing
_OPEN = ("/health", "/ready")
_access = logging.getLogger("pellucid.access")


class Guard:
    """ASGI middleware. It puts the client's API key into `scope["state"]["key"]`."""

    def __init__(self, app: ASGIApp, service: Service, open_paths: Sequence[str] = ()) -> None:
        self._app = app
        self._service = service
        self._open = {*_OPEN, *open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        request_id = uuid.uuid4().hex[:16]
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["key"] = _key(headers)

        body = _Body(receive, self._service.settings)

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [*message["headers"], (b"x-request-id", request_id.encode())]
                message = {**message, "headers": named}
                if status >= 400:
                    self._service.metrics.refuse(status)
            elif not message.get("more_body", False) and not body.is_whole:
                await send({**message, "more_body": True})
                await body.skip()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self._app(scope, body.receive, send_and_note)
            else:
                told = error_body(refusal, route_path(scope))
                await JSONResponse(told, refusal.status, headers=refusal.headers)(
                    scope, receive, send_and_note
                )
        finally:
            self._service.metrics.count_http(_route(scope), scope["method"], status)
            # a route may ask not to be logged while all is well
            is_logged = status >= 400 or scope["state"].get("is_logged", True)
            if self._service.settings.access_log and is_logged:
                seconds = time.perf_counter() - start
                _access.info("%s", _line(scope, request_id, status, seconds))

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why a request is not let in; None where it is."""
        settings = self._service.settings
        path = route_path(scope)
        if settings.api_key and path not in self._open and scope["method"] != "OPTIONS":
            given = scope["state"]["key"].encode()
            # all keys are compared, so that the time tells nothing
            matches = [hmac.compare_digest(given, key.encode()) for key in settings.api_key]
            if not any(matches):
                return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > settings.max_body_bytes:
            return _too_large(settings.max_body_bytes)
        return None


class _Body:
    """The body of a request, with limits on its size and time."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive = receive
        self._most = settings.max_body_bytes
        self._deadline = time.monotonic() + settings.read_timeout
        self._num_bytes = 0
        self.is_whole = False  # it has come, or its client has left

    async def receive(self) -> Message:
        """The next message of the connection. Raises ApiError 413 or 408."""
        if self.is_whole:
            return await self._receive()
        try:
            message = await self._next()
        except TimeoutError:
            raise ApiError(408, "the body took too long", code="timeout") from None
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._most:
            raise _too_large(self._most)
        return message

    async def skip(self) -> None:
        """Read what is left and drop it, for as long as the deadline allows. A connection that is
        closed before all was read is reset, and its client may lose the answer.
        """
        with contextlib.suppress(TimeoutError):
            while not self.is_whole:
                await self._next()

    async def _next(self) -> Message:
        async with asyncio.timeout(self._deadline - time.monotonic()):
            message = await self._receive()
        self.is_whole = not message.get("more_body", False)
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"the body has more than {most} bytes, which is the most", code="body_too_large"
    )


def _route(scope: Scope) -> str:
    """The route that a request matched, such as "/v1/models/{name}"; empty where none did. A client
    chooses the path but not the routes, so their number is bounded.
    """
    route = scope.get("route")
    return route.path if isinstance(route, Route) else ""


def _key(headers: Headers) -> str:
    """The API key that a client sends: as a bearer token, or as Anthropic's clients do."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _line(scope: Scope, request_id: str, status: int, seconds: float) -> str:
    """A line of the access log: JSON, without prompts and without keys."""
    client = scope.get("client") or ("", 0)
    return json.dumps(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": request_id,
            "client": client[0],
            "tenant": tenant_of(scope["state"]["key"])[:8],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,  # 0: the client left before the response began
            "ms": round(1e3 * seconds, 1),
        }
    )
