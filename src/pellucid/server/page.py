"""The page at `/`: a chat with the model, and what the engine does meanwhile.

The page is plain files in `static/`, read once at the start. It loads nothing from another host:
its Content-Security-Policy forbids that, inline scripts and HTML made from strings as well. The
files hold no secrets, so they need no API key. GET /debug/stats, which feeds the page, does.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ..engine.stats import EngineStats
from .service import Service

__all__ = ["PAGE_PATHS", "add_page"]

_FOLDER = Path(__file__).parent / "static"
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again by its etag: a new version shows
}
_MAX_REASONS = 4  # that the page shows
_COUNTS = (  # fields of EngineStats that the page is told
    *("num_running", "num_waiting", "num_preempted"),
    *("num_kv_blocks", "num_free_blocks", "num_cached_blocks", "num_held_blocks"),
    *("num_prompt_tokens", "num_cached_tokens", "num_computed_tokens", "num_output_tokens"),
    *("num_preemptions", "num_steps"),
)


def _find_files() -> dict[str, Path]:
    """The page's files by their URL path."""
    files = {f"/static/{path.name}": path for path in sorted(_FOLDER.iterdir())}
    return {"/": files.pop("/static/index.html")} | files


_FILES = _find_files()
PAGE_PATHS = tuple(_FILES)  # they need no API key


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page's files, and GET /debug/stats."""
    for path, file in _FILES.items():
        app.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)

    @app.get("/debug/stats")
    async def stats(request: Request, after: int = 0) -> dict[str, Any]:
        """What the engine does: requests, what they wait for, KV blocks, counts since the start,
        and its last steps with a number above `after`.
        """
        # A page asks twice a second; the access log would hold little else.
        request.state.is_logged = False
        found = service.engine.stats()
        # Only the core knows why requests wait; it is asked between two of its steps.
        requests = await service.engine.requests() if found.num_waiting else []
        # "…; 3 wait before it" differs for each, and does not count here
        reasons = Counter(r.waits_for.partition(";")[0] for r in requests if r.waits_for)
        return {
            "time": time.monotonic(),  # seconds; a rate is the difference of two answers
            "model": service.name,
            "max_model_len": service.engine.max_model_len,
            "is_draining": service.is_draining,
            "waits_for": dict(reasons.most_common(_MAX_REASONS)),
        } | _stats(found, after)


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """A route that sends one file."""
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _HEADERS | {"etag": etag, "content-type": _CONTENT_TYPES[file.suffix]}

    async def send(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return send


def _stats(stats: EngineStats, after: int) -> dict[str, Any]:
    """The snapshot as plain data."""
    counts = {name: getattr(stats, name) for name in _COUNTS}
    steps = [record._asdict() for record in stats.recent_steps if record.step > after]
    return counts | {"recent_steps": steps}
