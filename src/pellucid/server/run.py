"""Runs the app under uvicorn: one process, one event loop, the engine in its thread."""

import asyncio
import contextlib
import logging
import resource
import ssl
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..errors import ConfigError
from .app import create_app
from .connection import guarded_protocol
from .settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine.async_engine import AsyncEngine
    from .service import Service

__all__ = ["check_settings", "run_server"]

_KEEP_ALIVE = 30  # seconds that an idle connection stays open
_OTHER_FILES = 64  # that are open beside connections
_STOP = 2  # seconds for what is left after the drain


def run_server(
    engine: "AsyncEngine",
    name: str,
    settings: ServerSettings,
    on_ready: "Callable[[int], None]" = lambda port: None,
) -> None:
    """Serve until SIGTERM or SIGINT. `on_ready` is called with the port once requests are taken.

    The first signal drains: /ready says 503, new requests are refused, and those that run have
    `drain_timeout`. The second ends at once. `settings` were checked by `check_settings`. Raises
    ConfigError where the port cannot be had.
    """
    app = create_app(engine, name, settings)
    max_connections = _raise_file_limit(settings.max_connections)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=guarded_protocol(settings, max_connections),
        loop="uvloop",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="critical",  # routes log their own faults, and a lost connection is none
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_STOP,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        backlog=2048,
    )
    server = _Server(config, app.state.service, on_ready)
    try:
        server.run()
    except SystemExit:  # uvicorn could not listen
        raise ConfigError(
            f"host {settings.host} and port {settings.port} cannot be listened on: the port is in "
            "use, or the address is not this machine's"
        ) from None
    finally:
        tracing = app.state.service.tracing
        if tracing is not None and not server.force_exit:
            tracing.close()


def check_settings(settings: ServerSettings) -> None:
    """Raise ConfigError for a certificate that cannot be used, or an extra that is not installed.
    It takes no time beside loading a model, so call it before.
    """
    _check_certificate(settings)
    if settings.otlp_traces_endpoint is not None:
        try:
            from . import tracing as tracing
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint needs {error.name}: pip install 'pellucid[otel]'"
            ) from None


class _Server(uvicorn.Server):
    """uvicorn's server with a drain before its shutdown."""

    def __init__(
        self, config: uvicorn.Config, service: "Service", on_ready: "Callable[[int], None]"
    ) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready
        self._draining: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: "list[object] | None" = None) -> None:  # type: ignore[override]
        await super().startup()
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])
            self._preparing = asyncio.create_task(self._service.engine.prepare_explanations())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, the second ends at once."""
        if self._service.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._service.is_draining = True
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        timeout = self._service.settings.drain_timeout
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._service.num_requests:
                    await asyncio.sleep(0.02)
        if self._service.num_requests:
            logging.getLogger(__name__).warning(
                "%d requests are given up after %g s", self._service.num_requests, timeout
            )
            # Each is told so, and its blocks are freed.
            self._service.giving_up.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP):
                    while self._service.num_requests:
                        await asyncio.sleep(0.02)
        self.should_exit = True


def _check_certificate(settings: ServerSettings) -> None:
    """Raise ConfigError for files that are no certificate and key."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise ConfigError("ssl_keyfile is set without ssl_certfile; HTTPS needs a certificate")
        return
    try:
        ssl.create_default_context().load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:
        is_format = isinstance(error, ssl.SSLError)
        reason = "no PEM certificate with its key" if is_format else error.strerror
        raise ConfigError(
            f"ssl_certfile {settings.ssl_certfile} and ssl_keyfile {settings.ssl_keyfile} cannot "
            f"be used: {reason}"
        ) from None


def _raise_file_limit(connections: int) -> int:
    """Allow as many open files as connections need, as far as the system does. Returns how many
    connections that leaves room for.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, soft - _OTHER_FILES))
