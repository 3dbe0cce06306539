"""What uvicorn leaves open to hostile connections: headers that never end or are too large, and
too many connections at once.

A connection has `read_timeout` to send the headers of its first request, and of each later one from
its first byte. Idle connections are closed by uvicorn's keep-alive timeout; slow bodies by `guard`.
"""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError, error_body
from .settings import ServerSettings
from .wire import compact

__all__ = ["guarded_protocol"]


def guarded_protocol(settings: ServerSettings) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with the limits of the settings."""

    class GuardedProtocol(HttpToolsProtocol):
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _num_bytes = 0  # received since the headers began
        _num_header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._refuse(503, "too many connections are open")
            else:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._has_headers()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._num_bytes += len(data)
            super().data_received(data)
            if self._deadline is not None and self._num_bytes > settings.max_header_bytes:
                self._refuse_headers()

        def on_message_begin(self) -> None:
            self._num_bytes = self._num_header_bytes = 0
            if self._deadline is None:
                self._await_headers()
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            self._num_header_bytes += len(url)
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._num_header_bytes += len(name) + len(value) + 4
            if self._num_header_bytes <= settings.max_header_bytes:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._has_headers()
            if self._num_header_bytes > settings.max_header_bytes:
                self._refuse_headers()
            else:
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self.cycle is not None:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self.cycle is not None:
                super().on_message_complete()

        def _await_headers(self) -> None:
            self._deadline = self.loop.call_later(
                settings.read_timeout, self._refuse, 408, "the headers took too long"
            )

        def _has_headers(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse_headers(self) -> None:
            most = settings.max_header_bytes
            self._refuse(431, f"the headers have more than {most} bytes")

        def _refuse(self, status: int, message: str) -> None:
            """Answer with an error, and close."""
            self._has_headers()
            if self.transport.is_closing():
                return
            body = compact(error_body(ApiError(status, message)))
            self.transport.write(
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                "content-type: application/json\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            self.transport.close()

    return GuardedProtocol
