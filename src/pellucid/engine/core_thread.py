"""The thread in which a core runs, its inbox, and the mailboxes that it fills. `LLM` and
`AsyncEngine` are its two interfaces.

The core has one caller, this thread. Readers leave submissions and aborts in an inbox, which the
thread empties before each step; the thread leaves outputs in mailboxes. So any number of streams,
threads and tasks share one core, and an exception in a reader, Ctrl-C among them, never
interrupts a step.

Steps run while some reader wants outputs. A reader in a thread wants outputs only while it waits
for one, an asyncio task from its submission to its last output. So a stream of `LLM` that is not
read causes no steps. With no steps to run the thread sleeps.

If a step crashes, the requests that it computed are lost: each raises EngineError, and its blocks
are freed. Then the core's state is checked. If it is consistent, other requests are served; if not,
the engine is dead and every call raises EngineDeadError. A request that cannot be sampled is not a
crash: it ends alone, with the finish_reason "error".

Methods may be called from any thread. The core's thread starts with the first request.
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
    """Runs a core. The code that creates one must call `stop`."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core  # only the core's thread uses it
        self._owner = os.getpid()
        self.stats = core.stats()  # as of the last step
        # Ctrl-C may interrupt the main thread between any two Python instructions. So it waits and
        # wakes by primitives written in C. A Condition or an Event is written in Python:
        # interrupted inside, it would keep its lock or lose a wake-up.
        self._wake: SimpleQueue[None] = SimpleQueue()  # an entry means: look for work
        self._lock = threading.RLock()  # guards all fields below
        self._thread: threading.Thread | None = None
        self._ids = itertools.count()
        self._boxes: dict[str, Mailbox] = {}  # by request_id, of all requests that have not ended
        self._wanted: dict[Mailbox, None] = {}  # mailboxes whose reader waits for outputs
        self._submitted: dict[Mailbox, None] = {}  # inbox: requests for the core to queue
        self._left: dict[str, None] = {}  # inbox: requests for the core to drop without an output
        self._aborted: dict[str, Mailbox] = {}  # inbox: requests for the core to end
        self._calls: list[tuple[_Answer, Callable[[EngineCore], Any]]] = []  # inbox
        self._unrung: list[Mailbox] = []  # with new outputs, whose readers are notified soon
        core.runner.before_forward = self._ring_unrung
        self._end: str | None = None  # why the thread ended
        self._cause: BaseException | None = None  # the crash that ended it

    # ---- called from any thread

    def new_id(self) -> str:
        """A request_id that is not in use."""
        self._check_owner()
        with self._lock:
            return next(i for i in map(str, self._ids) if i not in self._boxes)

    def submit(self, box: Mailbox) -> None:
        """Submit the requests of a mailbox to the core: all of them, or none."""
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
        """Let steps run until a thread's mailbox has new outputs, and take them."""
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
        """All new outputs of a mailbox; raises its error if it has one."""
        with self._lock:
            return box.take()

    def leave(self, box: Mailbox) -> None:
        """The reader has left: abort its requests that have not ended."""
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
        """End a request before the next step; its reader gets the answer so far."""
        with self._lock:
            if request_id in self._boxes:
                self._aborted[request_id] = self._boxes[request_id]
                self._wake.put(None)

    def call(self, function: Callable[[EngineCore], _T]) -> _T:
        """Run a function of the core between two steps, after the inbox is emptied; wait for its
        result.
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
        """End the thread, wait until it has ended, and release the core."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._end = self._end or "the engine is closed"
            thread = self._thread
            self._wake.put(None)
        if thread is None or thread.ident is None:  # Ctrl-C came before its start
            self._forget_core()
        elif thread is not threading.current_thread():
            thread.join()

    @property
    def is_dead(self) -> bool:
        """True once it was stopped, or ended by a crash."""
        return self._end is not None

    def _check_owner(self) -> None:
        """Raise EngineError in a fork of the process that loaded the model. There the lock may stay
        locked forever, so this check comes before it.
        """
        if self._owner != os.getpid():
            raise EngineError(
                "the model was loaded before this process was forked, and its threads stayed with "
                "the parent: load the model in this process"
            )

    def _begin(self) -> None:
        """Start the thread; raise if it has ended."""
        if self._end is not None:
            raise self._dead()
        if self._thread is None or self._thread.ident is None:  # else Ctrl-C came before its start
            # a non-daemon thread would delay the exit
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
            except BaseException as error:  # of any type: a reader waits for an answer
                self._crashed(error)
            if not self._core.has_unfinished:
                self._ring_unrung()
        self._ring_unrung()
        self._fail_all()
        self._forget_core()

    def _wait_for_work(self) -> None:
        while True:
            while not self._wake.empty():  # the inbox is read below, so older wake-ups are done
                self._wake.get()
            with self._lock:
                inbox = self._submitted or self._left or self._aborted or self._calls
                if self._end or inbox or (self._wanted and self._core.has_unfinished):
                    return
            self._ring_unrung()
            self._wake.get()

    def _empty_inbox(
        self, left: Iterable[str], submitted: Iterable[Mailbox], aborted: Mapping[str, Mailbox]
    ) -> None:
        """Give the core all submissions, aborts and calls since the last step."""
        for request_id in left:
            self._core.abort(request_id)
        for box in submitted:
            self._take_in(box)
        # a new request may have the id of an aborted one
        same = [name for name, box in aborted.items() if self._boxes.get(name) is box]
        self._deliver(filter(None, map(self._core.abort, same)))
        if self._calls:  # they may take long
            self._ring_unrung()
        while self._calls:
            answer, function = self._calls.pop(0)
            try:
                answer.put((function(self._core), None))
            except Exception as error:
                answer.put((None, error))

    def _take_in(self, box: Mailbox) -> None:
        """Give the core a submission. If the core refuses it, its reader gets the exception."""
        try:
            self._core.add_requests(box.submissions)
        except Exception as error:
            refusal = error
            self._fail([box], lambda: refusal)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Put outputs into their mailboxes, and notify each reader once.

        A reader that wants all outputs is notified when the next step is in the model. Then it does
        not compete with the plan of that step for the interpreter.
        """
        with self._lock:
            fresh: dict[Mailbox, None] = {}  # empty before: their readers must be notified
            for output in outputs:
                box = self._boxes.get(output.request_id)
                if box is None:
                    self._left[output.request_id] = None  # its reader has left
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
            self._unrung += [box for box in fresh if box.is_always_wanted]
            self._ring(box for box in fresh if not box.is_always_wanted)

    def _ring_unrung(self) -> None:
        """Notify the readers that `_deliver` left."""
        if self._unrung:
            with self._lock:
                unrung, self._unrung = self._unrung, []
                self._ring(unrung)

    def _fail(self, boxes: Iterable[Mailbox], error: Callable[[], BaseException]) -> None:
        """End all requests of mailboxes with an error; each gets its own exception object."""
        with self._lock:
            boxes = list(boxes)
            for box in boxes:
                self.leave(box)
                box.fail(error())
            self._ring(boxes)

    def _ring(self, boxes: Iterable[Mailbox]) -> None:
        """Notify the readers of mailboxes of new outputs."""
        kinds: dict[type[Mailbox], list[Mailbox]] = {}
        for box in boxes:
            kinds.setdefault(type(box), []).append(box)
            if not box.is_always_wanted:
                self._wanted.pop(box, None)
        for kind, members in kinds.items():
            kind.ring(members)

    def _crashed(self, error: BaseException) -> None:
        """Fail the crashed step's requests, or all requests if the error does not name them. Go on
        if the core's state is consistent after that.
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
        """Tell all waiting readers that the engine has ended."""
        with self._lock:
            self._fail(dict.fromkeys(self._boxes.values()), self._dead)
            for answer, _ in self._calls:
                answer.put((None, self._dead()))

    def _forget_core(self) -> None:
        """Drop the references to weights and cache; they are freed unless another engine shares
        them.
        """
        vars(self).pop("_core", None)

    def _dead(self) -> EngineDeadError:
        return _caused(EngineDeadError(self._end or ""), self._cause)


def _caused(error: _E, cause: BaseException | None) -> _E:
    error.__cause__ = cause
    return error


def _shown(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
