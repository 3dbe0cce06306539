"""The thread in which a core runs, its inbox, and the streams that it feeds. `AsyncEngine` is its
face.

One idea: the core has one caller, the thread. Callers leave requests and aborts in an inbox that
the thread empties before each step; the thread leaves outputs at streams. An output shows the whole
answer so far, so a stream keeps the newest and forgets the one before: a slow consumer sees fewer
of them, and neither holds up the engine nor makes anything grow. With nothing to do the thread
sleeps on a condition.

A step that crashes takes with it the requests that it computed: each raises EngineError, what they
held is freed, and the books are checked. If they add up, the next request is served; otherwise the
engine is dead, and says so at once. A request that cannot be sampled is no crash: it ends alone,
with the finish_reason "error".

Methods may be called from any thread, streams belong to any event loop. The thread begins with the
first request.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from ..errors import EngineDeadError, EngineError, QueueFullError, RequestError
from ..request import RequestOutput, SamplingParams
from .core import EngineCore
from .prompts import TokenizedPrompt

__all__ = ["CoreThread", "Stream"]

# requests that came during one step; what the core has taken in is the scheduler's to bound
_MAX_SUBMITTED = 4096

_News: TypeAlias = RequestOutput | BaseException
_E = TypeVar("_E", bound=BaseException)

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Stream:
    """A request, and what its consumer has not yet seen: an output or the error that ends it."""

    request_id: str
    prompt: TokenizedPrompt
    params: SamplingParams
    loop: asyncio.AbstractEventLoop
    event: asyncio.Event = field(default_factory=asyncio.Event)  # touched in the loop alone
    newest: _News | None = None  # while there is one, the loop has been told


class CoreThread:
    """Runs a core. Whoever makes one calls `stop`."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core  # the thread's alone
        self._wake = threading.Condition()  # guards all that follows
        self._thread: threading.Thread | None = None
        self._ids = itertools.count()
        self._streams: dict[str, Stream] = {}  # all that were submitted and have not ended
        self._submitted: dict[str, Stream] = {}  # inbox: for the core to take in
        self._aborted: dict[Stream, None] = {}  # inbox: for the core to drop, in order
        self._end: str | None = None  # why nothing is served any more
        self._cause: BaseException | None = None  # the crash that ended it

    # Called from anywhere.

    def submit(
        self, prompt: TokenizedPrompt, params: SamplingParams, request_id: str | None
    ) -> Stream:
        with self._wake:
            if self._end is not None:
                raise self._dead()
            if request_id is None:
                request_id = next(i for i in map(str, self._ids) if i not in self._streams)
            if request_id in self._streams:
                raise RequestError(f"request_id {request_id!r} is in use")
            if len(self._submitted) >= _MAX_SUBMITTED:
                raise QueueFullError(
                    f"{_MAX_SUBMITTED} requests wait for the next step; it takes no more"
                )
            stream = Stream(request_id, prompt, params, asyncio.get_running_loop())
            if self._thread is None:
                # one that is not would hold up the exit
                thread = threading.Thread(target=self._run, name="pellucid-engine", daemon=True)
                thread.start()
                self._thread = thread
            self._streams[request_id] = self._submitted[request_id] = stream
            self._wake.notify()
        return stream

    def take(self, stream: Stream) -> RequestOutput:
        """What the stream's event announced; an error is raised."""
        with self._wake:
            newest, stream.newest = stream.newest, None
        stream.event.clear()
        if isinstance(newest, RequestOutput):
            return newest
        raise newest or AssertionError(f"nothing is new for request {stream.request_id!r}")

    def leave(self, stream: Stream) -> None:
        """The consumer has gone; a request that has not ended is aborted."""
        with self._wake:
            if self._streams.get(stream.request_id) is not stream:
                return
            if self._submitted.pop(stream.request_id, None) is None:
                self._aborted[stream] = None
                self._wake.notify()
            else:
                del self._streams[stream.request_id]

    def abort(self, request_id: str) -> None:
        with self._wake:
            if request_id in self._streams:
                self._aborted[self._streams[request_id]] = None
                self._wake.notify()

    def stop(self) -> None:
        """End the thread and wait until it has ended."""
        with self._wake:
            self._end = self._end or "the engine is closed"
            thread = self._thread
            self._wake.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # Called in the thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (
                    self._end or self._submitted or self._aborted or self._core.has_unfinished
                ):
                    self._wake.wait()
                if self._end is not None:
                    break
                submitted, self._submitted = self._submitted, {}
                aborted, self._aborted = self._aborted, {}
            try:
                self._deliver(self._take_in(submitted.values(), aborted))
                self._deliver({output.request_id: output for output in self._core.step()})
            except BaseException as error:  # whatever it is, somebody waits for an answer
                self._crashed(error)
        with self._wake:
            self._submitted = {}
            self._deliver({request_id: self._dead() for request_id in self._streams})

    def _take_in(self, submitted: Iterable[Stream], aborted: Iterable[Stream]) -> dict[str, _News]:
        """Give the core what the inbox held. A refusal is its caller's to handle, whatever it
        is.
        """
        news: dict[str, _News] = {}
        for stream in submitted:
            try:
                self._core.add_request(stream.request_id, stream.prompt, stream.params)
            except Exception as refusal:
                news[stream.request_id] = refusal
        for stream in aborted:
            if (
                self._streams.get(stream.request_id) is stream
                and (last := self._core.abort(stream.request_id)) is not None
            ):
                news[stream.request_id] = last
        return news

    def _deliver(self, news: Mapping[str, _News]) -> None:
        """Leave news at their streams, and tell each event loop once."""
        told: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        with self._wake:
            for request_id, item in news.items():
                stream = self._streams[request_id]
                if stream.newest is None:
                    told.setdefault(stream.loop, []).append(stream.event)
                stream.newest = item
                if not isinstance(item, RequestOutput) or item.finished:
                    del self._streams[request_id]
                elif stream.loop.is_closed():  # nobody is left to leave it
                    self._aborted[stream] = None
        for loop, events in told.items():
            with contextlib.suppress(RuntimeError):  # closed since
                loop.call_soon_threadsafe(_set_all, events)

    def _crashed(self, error: BaseException) -> None:
        """Fail what the step computed, or all that the core holds where the core could not say; go
        on if that leaves it whole.
        """
        with self._wake:
            held = [request_id for request_id in self._streams if request_id not in self._submitted]
        lost, cause = (
            (error.request_ids, error.__cause__)
            if isinstance(error, EngineError)
            else (held, error)
        )
        _log.error("a step of the engine crashed; %d requests are lost", len(lost), exc_info=cause)
        try:
            for request_id in lost:
                self._core.abort(request_id)
            self._core.scheduler.check_integrity()
        except Exception as distrust:
            with self._wake:
                self._end = f"the engine has ended: a step crashed ({_shown(cause)}) and left a state not to be trusted ({_shown(distrust)})"
                self._cause = cause
            _log.error("%s", self._end, exc_info=distrust)
        else:
            message = f"a step of the engine crashed ({_shown(cause)}); the requests that it computed are lost"
            self._deliver({request_id: _caused(EngineError(message), cause) for request_id in lost})

    def _dead(self) -> EngineDeadError:
        return _caused(EngineDeadError(self._end or ""), self._cause)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _caused(error: _E, cause: BaseException | None) -> _E:
    error.__cause__ = cause
    return error


def _shown(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
