"""What uvicorn leaves open to hostile connections: headers and bodies that never end, headers that
are too large, responses that are never read, and too many connections at once.

A connection has `read_timeout` to send the headers of a request, and again for its body. One that
reads nothing of a large response for `write_timeout` is cut off. Idle connections are closed by
uvicorn's keep-alive timeout. What is no HTTP gets an error body like any other request.
"""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .errors import ApiError, error_body
from .settings import ServerSettings
from .wire import compact

__all__ = ["guarded_protocol"]

_GRACE = 1  # seconds: within them the app itself refuses a body that is late


def guarded_protocol(settings: ServerSettings, max_connections: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with the limits of the settings, and as many connections as the system
    allows.
    """

    class GuardedProtocol(HttpToolsProtocol):
        """One connection."""

        _reading: asyncio.TimerHandle | None = None  # ends headers or a body that are late
        _writing: asyncio.TimerHandle | None = None  # ends a connection that reads nothing
        _is_head = True  # headers are expected
        _num_bytes = 0  # received since the headers began
        _num_header_bytes = 0
        _cycles: tuple[RequestResponseCycle, ...] = ()  # the requests that are not yet answered

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refuse(503, "too many connections are open")
            else:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_reading()
            self._stop_writing()
            # uvicorn tells only the newest request that its client has left.
            for cycle in self._cycles:
                if not cycle.response_complete:
                    cycle.disconnected = True
                cycle.message_event.set()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._num_bytes += len(data)
            super().data_received(data)
            if self._is_head and self._num_bytes > settings.max_header_bytes:
                self._refuse_headers()
            # Blank lines between requests end uvicorn's timeout of idle connections.
            elif self._reading is self.timeout_keep_alive_task is None and not self._is_answering:
                self._await_headers()

        def on_message_begin(self) -> None:
            self._num_bytes = self._num_header_bytes = 0
            if self._reading is None:
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
            self._stop_reading()
            self._is_head = False
            if self._num_header_bytes > settings.max_header_bytes:
                self._refuse_headers()
                return
            super().on_headers_complete()
            open_cycles = (cycle for cycle in self._cycles if not cycle.response_complete)
            self._cycles = (*open_cycles, self.cycle)
            self._reading = self.loop.call_later(
                settings.read_timeout + _GRACE, self.transport.close
            )

        def on_body(self, body: bytes) -> None:
            if self.cycle is not None:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._stop_reading()
            if self.cycle is not None:
                super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._writing is None:
                self._writing = self.loop.call_later(settings.write_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop_writing()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is no valid HTTP request")

        @property
        def _is_answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_headers(self) -> None:
            self._is_head = True
            self._reading = self.loop.call_later(
                settings.read_timeout, self._refuse, 408, "the headers took too long"
            )

        def _stop_reading(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

        def _stop_writing(self) -> None:
            if self._writing is not None:
                self._writing.cancel()
                self._writing = None

        def _refuse_headers(self) -> None:
            most = settings.max_header_bytes
            self._refuse(431, f"the headers have more than {most} bytes")

        def _refuse(self, status: int, message: str) -> None:
            """Answer with an error, unless another answer has begun, and close."""
            self._stop_reading()
            if self.transport.is_closing():
                return
            cycles = (cycle for cycle in self._cycles if not cycle.response_complete)
            if not any(cycle.response_started for cycle in cycles):
                body = compact(error_body(ApiError(status, message)))
                self.transport.write(
                    f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                    "content-type: application/json\r\nconnection: close\r\n"
                    f"content-length: {len(body)}\r\n\r\n".encode()
                    + body
                )
            self.transport.close()

    return GuardedProtocol
