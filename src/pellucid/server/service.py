"""`Service`: what all routes share. The engine, the settings, who is being served, and the load.

It admits requests within the limits of the settings, and knows when the server drains.
"""

import asyncio
import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..engine.async_engine import AsyncEngine
from ..errors import QueueFullError
from .errors import ApiError
from .metrics import Metrics
from .settings import ServerSettings

if TYPE_CHECKING:
    from .tracing import Tracing

__all__ = ["Service", "tenant_of"]

_LONGEST_RETRY = 300  # seconds


class Service:
    """Used from the event loop alone."""

    def __init__(self, engine: AsyncEngine, name: str, settings: ServerSettings) -> None:
        """`name` is the model's in the API."""
        self.engine = engine
        self.name = name
        self.settings = settings
        self.created = int(time.time())
        self.is_draining = False
        self.giving_up = asyncio.Event()  # set once the drain has taken too long
        self.num_requests = 0  # that are served or wait
        aliases = () if settings.metrics_aliases == "none" else (f"{settings.metrics_aliases}:",)
        self.metrics = Metrics(self, aliases)
        self.tracing = _tracing(settings.otlp_traces_endpoint, name)
        self._by_key: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=128)  # when the last requests ended

    @contextmanager
    def admitted(self, key: str) -> Iterator[None]:
        """Count a request while it is served. Raises ApiError 429 or 503 where it is one too many.
        `key` is the client's API key, or empty.
        """
        most = self.settings.max_requests_per_key
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=10)
        if most and self._by_key[key] >= most:
            raise ApiError(
                429,
                f"this API key has {most} requests, and may have no more at a time",
                code="rate_limit_exceeded",
                retry_after=self.seconds_until_free(1),
            )
        if self.num_requests >= self.settings.max_requests:
            raise self.overloaded(f"the server has {self.num_requests} requests and takes no more")
        self.num_requests += 1
        self._by_key[key] += 1
        try:
            yield
        except QueueFullError as error:
            raise self.overloaded(str(error)) from None
        finally:
            self.num_requests -= 1
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]
            self._ends.append(time.monotonic())

    def overloaded(self, message: str) -> ApiError:
        """503, with the time after which a place should be free."""
        waiting = max(1, self.num_requests - self.engine.stats().num_running)
        retry_after = self.seconds_until_free(waiting)
        return ApiError(503, message, code="overloaded", retry_after=retry_after)

    def seconds_until_free(self, count: int) -> int:
        """How long it takes to serve `count` requests, by the rate of those that ended last."""
        if len(self._ends) < 2 or self._ends[-1] <= self._ends[0]:
            return 1
        # time since the last end counts too, or a stopped server would promise its old rate
        rate = len(self._ends) / (time.monotonic() - self._ends[0])
        return min(_LONGEST_RETRY, max(1, math.ceil(count / rate)))

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for another model's name. No name means this one."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; {self.name!r} is",
                param="model",
                code="model_not_found",
            )


def _tracing(endpoint: str | None, model: str) -> "Tracing | None":
    """What sends traces, where they are asked for: the extra may not be installed."""
    if endpoint is None:
        return None
    from .tracing import Tracing

    return Tracing(endpoint, model)


def tenant_of(key: str) -> str:
    """The tenant of an API key, for fairness and for the prefix cache: a digest, so that no log or
    error holds a key.
    """
    return hashlib.sha256(key.encode()).hexdigest()[:32] if key else ""
