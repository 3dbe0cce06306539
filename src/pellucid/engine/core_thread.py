"""The thread in which a core runs, its inbox, and the mailboxes that it fills. `LLM` and
`AsyncEngine` are its faces.

The core has one caller, this thread. Readers leave submissions and aborts in an inbox, which the
thread empties before each step; the thread leaves outputs in mailboxes. So any number of streams,
threads and tasks share one core, and an exception in a reader, Ctrl-C among them, never
interrupts a step.

A step runs while some reader wants news: a thread only while it waits, a task from its submission
to its last output. So a stream of `LLM` that nobody reads computes nothing by itself. With nothing
to do the thread sleeps.

A step that crashes takes with it the requests that it computed: each raises EngineError, what they
held is freed, and the books are checked. If they add up, the next request is served; otherwise the
engine is dead, and says so at once. A request that cannot be sampled is no crash: it ends alone,
with the finish_reason "error".

Methods may be called from any thread. The thread begins with the first request.
"""

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from ..errors import EngineDeadError, EngineError, QueueFullError, RequestError
from ..outputs import RequestOutput
from .core import EngineCore
from .mailbox import Mailbox, ThreadMailbox

__all__ = ["CoreThread"]

# mailboxes that came during one step; what the core has taken in is the scheduler's to bound
_MAX_SUBMITTED = 4096

_T = TypeVar("_T")
_E = TypeVar("_E", bound=BaseException)
_Answer: TypeAlias = SimpleQueue[tuple[Any, BaseException | None]]
_log = logging.getLogger(__name__)


class CoreThread:
    """Runs a core. Whoever makes one calls `stop`."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core  # the thread's alone
        self._owner = os.getpid()
        self.stats = core.stats()  # as of the last step
        # The main thread may be interrupted by Ctrl-C between any two instructions of Python. So
        # it waits and wakes with what is written in C: a Condition or an Event, interrupted in its
        # own code, would leave its lock taken or lose a call.
        self._wake: SimpleQueue[None] = SimpleQueue()  # an entry: look for work
        self._lock = threading.RLock()  # guards all that follows
        self._thread: threading.Thread | None = None
        self._ids = itertools.count()
        self._boxes: dict[str, Mailbox] = {}  # by request, of all that have not ended
        self._wanted: dict[Mailbox, None] = {}  # those whose reader waits for news
        self._submitted: dict[Mailbox, None] = {}  # inbox: for the core to take in
        self._left: dict[str, None] = {}  # inbox: requests for the core to drop without a word
        self._aborted: dict[str, Mailbox] = {}  # inbox: requests for the core to end
        self._calls: list[tuple[_Answer, Callable[[EngineCore], Any]]] = []  # inbox
        self._end: str | None = None  # why nothing is served any more
        self._cause: BaseException | None = None  # the crash that ended it

    # ---- called from anywhere

    def new_id(self) -> str:
        """A request_id that is not in use."""
        self._check_owner()
        with self._lock:
            return next(i for i in map(str, self._ids) if i not in self._boxes)

    def submit(self, box: Mailbox) -> None:
        """Let the core take in the requests of a mailbox: all of them, or none."""
        self._check_owner()
        with self._lock:
            self._begin()
            for name in box.open:
                if name in self._boxes:
                    raise RequestError(f"request_id {name!r} is in use")
            if len(self._submitted) >= _MAX_SUBMITTED:
                raise QueueFullError(
                    f"{_MAX_SUBMITTED} requests wait for the next step; it takes no more"
                )
            self._submitted[box] = None
            self._boxes.update(dict.fromkeys(box.open, box))
            if box.is_always_wanted:
                self._wanted[box] = None
            self._wake.put(None)

    def wait(self, box: ThreadMailbox) -> list[RequestOutput]:
        """Run steps until something is new in a thread's mailbox, and take it."""
        with self._lock:
            is_empty = not box.has_news
            if is_empty:
                self._wanted[box] = None
                self._wake.put(None)
        try:
            if is_empty:
                box.bell.get()
        finally:
            with self._lock:
                self._wanted.pop(box, None)
        return self.take(box)

    def take(self, box: Mailbox) -> list[RequestOutput]:
        """All that is new in a mailbox; an error is raised."""
        with self._lock:
            return box.take()

    def leave(self, box: Mailbox) -> None:
        """The reader has gone; what has not ended is aborted."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._wanted.pop(box, None)
            names = [name for name in box.open if self._boxes.get(name) is box]
            box.open.clear()
            for name in names:
                del self._boxes[name]
            if box in self._submitted:
                del self._submitted[box]
            else:
                self._left.update(dict.fromkeys(names))
                self._wake.put(None)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its reader gets what it has."""
        with self._lock:
            if request_id in self._boxes:
                self._aborted[request_id] = self._boxes[request_id]
                self._wake.put(None)

    def call(self, function: Callable[[EngineCore], _T]) -> _T:
        """Run a function of the core between two steps, after all that is in the inbox; wait for
        what it gives.
        """
        self._check_owner()
        answer: _Answer = SimpleQueue()
        with self._lock:
            self._begin()
            self._calls.append((answer, function))
            self._wake.put(None)
        value, error = answer.get()
        if error is not None:
            raise error
        result: _T = value
        return result

    def stop(self) -> None:
        """End the thread, wait until it has ended, and let go of the core."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._end = self._end or "the engine is closed"
            thread = self._thread
            self._wake.put(None)
        if thread is None:
            self._forget_core()
        elif thread is not threading.current_thread():
            thread.join()

    def _check_owner(self) -> None:
        """Raise in a fork of the process that loaded the model. The lock may be taken there for
        ever, so this comes before it.
        """
        if self._owner != os.getpid():
            raise EngineError(
                "the model was loaded before this process was forked, and its threads stayed with "
                "the parent: load the model in this process"
            )

    def _begin(self) -> None:
        """Start the thread, or raise where it has ended."""
        if self._end is not None:
            raise self._dead()
        if self._thread is None or self._thread.ident is None:  # or Ctrl-C came before its start
            # one that is no daemon would hold up the exit
            self._thread = threading.Thread(target=self._run, name="pellucid-engine", daemon=True)
            self._thread.start()

    # ---- called in the thread

    def _run(self) -> None:
        while True:
            self._wait_for_work()
            with self._lock:
                if self._end is not None:
                    break
                submitted, self._submitted = self._submitted, {}
                left, self._left = self._left, {}
                aborted, self._aborted = self._aborted, {}
            try:
                self._empty_inbox(left, submitted, aborted)
                if self._wanted:
                    self._deliver(self._core.step())
                self.stats = self._core.stats()
            except BaseException as error:  # whatever it is, somebody waits for an answer
                self._crashed(error)
        self._fail_all()
        self._forget_core()

    def _wait_for_work(self) -> None:
        while True:
            while not self._wake.empty():  # what they announce is seen now
                self._wake.get()
            with self._lock:
                inbox = self._submitted or self._left or self._aborted or self._calls
                if self._end or inbox or (self._wanted and self._core.has_unfinished):
                    return
            self._wake.get()

    def _empty_inbox(
        self, left: Iterable[str], submitted: Iterable[Mailbox], aborted: Mapping[str, Mailbox]
    ) -> None:
        """Give the core all that readers left for it since the last step."""
        for request_id in left:
            self._core.abort(request_id)
        for box in submitted:
            self._take_in(box)
        # an id may have been given anew since it was aborted
        same = [name for name, box in aborted.items() if self._boxes.get(name) is box]
        self._deliver(filter(None, map(self._core.abort, same)))
        while self._calls:
            answer, function = self._calls.pop(0)
            try:
                answer.put((function(self._core), None))
            except Exception as error:
                answer.put((None, error))

    def _take_in(self, box: Mailbox) -> None:
        """Give the core what a reader asks. A refusal is the reader's to handle, whatever it is."""
        try:
            self._core.add_requests(box.submissions)
        except Exception as error:
            refusal = error
            self._fail([box], lambda: refusal)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Leave outputs in their mailboxes, and tell each reader once."""
        with self._lock:
            fresh: dict[Mailbox, None] = {}  # those that had no news, so nobody was told
            for output in outputs:
                box = self._boxes.get(output.request_id)
                if box is None:
                    self._left[output.request_id] = None  # nobody reads it
                elif box.is_abandoned:
                    self.leave(box)
                else:
                    if not box.has_news:
                        fresh[box] = None
                    box.put(output)
                    if output.finished:
                        del self._boxes[output.request_id]
                        if not box.open:
                            self._wanted.pop(box, None)
            self._ring(box for box in fresh if box.has_news)

    def _fail(self, boxes: Iterable[Mailbox], error: Callable[[], BaseException]) -> None:
        """End all requests of mailboxes with an error, one of its own for each."""
        with self._lock:
            boxes = list(boxes)
            for box in boxes:
                self.leave(box)
                box.fail(error())
            self._ring(boxes)

    def _ring(self, boxes: Iterable[Mailbox]) -> None:
        """Tell the readers of mailboxes that there is news."""
        kinds: dict[type[Mailbox], list[Mailbox]] = {}
        for box in boxes:
            kinds.setdefault(type(box), []).append(box)
            if not box.is_always_wanted:
                self._wanted.pop(box, None)
        for kind, members in kinds.items():
            kind.ring(members)

    def _crashed(self, error: BaseException) -> None:
        """Fail what the step computed, or all that the core holds where the core could not say; go
        on if that leaves it whole.
        """
        with self._lock:
            names = error.request_ids if isinstance(error, EngineError) else list(self._boxes)
            lost = {self._boxes[name]: None for name in names if name in self._boxes}
            lost = {box: None for box in lost if box not in self._submitted}
        cause = error.__cause__ if isinstance(error, EngineError) else error
        _log.error("a step of the engine crashed; %d requests are lost", len(names), exc_info=cause)
        try:
            for name in names:
                self._core.abort(name)
            self._core.scheduler.check_integrity()
        except Exception as distrust:
            with self._lock:
                self._end = (
                    f"the engine has ended: a step crashed ({_shown(cause)}) and left a state not "
                    f"to be trusted ({_shown(distrust)})"
                )
                self._cause = cause
            _log.error("%s", self._end, exc_info=distrust)
        else:
            message = (
                f"a step of the engine crashed ({_shown(cause)}); the requests that it computed "
                "are lost"
            )
            self._fail(lost, lambda: _caused(EngineError(message), cause))

    def _fail_all(self) -> None:
        """Tell all who wait that the engine has ended."""
        with self._lock:
            self._fail(dict.fromkeys(self._boxes.values()), self._dead)
            for answer, _ in self._calls:
                answer.put((None, self._dead()))

    def _forget_core(self) -> None:
        """Free weights and cache, as far as nobody else holds them."""
        vars(self).pop("_core", None)

    def _dead(self) -> EngineDeadError:
        return _caused(EngineDeadError(self._end or ""), self._cause)


def _caused(error: _E, cause: BaseException | None) -> _E:
    error.__cause__ = cause
    return error


def _shown(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
