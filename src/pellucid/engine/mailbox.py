"""A mailbox: what one reader has not yet seen of its requests.

The core's thread puts outputs in, one reader takes them out: a thread (`LLM`) or an asyncio task
(`AsyncEngine`, whose mailboxes are in `task_mailbox.py`). An output shows the whole answer so far,
so a new one replaces the one before it. A slow reader sees fewer outputs and always the last; a
mailbox holds at most one output per request.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

from ..outputs import RequestOutput
from .admission import Submission

__all__ = ["Mailbox", "ThreadMailbox"]


class Mailbox(ABC):
    """The newest output of each request of one reader, or the error that ends them. The lock of the
    core's thread guards it.
    """

    is_always_wanted = False  # True: its reader wants outputs from submission to the last one

    def __init__(self, submissions: Sequence[Submission]) -> None:
        self.submissions = submissions
        self.open = {s.request_id for s in submissions}  # requests that have not ended
        self._news: dict[str, RequestOutput] = {}
        self._error: BaseException | None = None

    @staticmethod
    @abstractmethod
    def ring(boxes: "Sequence[Any]") -> None:
        """Notify the readers of mailboxes of this class of new outputs."""

    @property
    def is_abandoned(self) -> bool:
        """True if its reader can no longer read it."""
        return False

    @property
    def has_news(self) -> bool:
        return bool(self._news) or self._error is not None

    def put(self, output: RequestOutput) -> None:
        """Store an output; it replaces an older one of the same request."""
        if output.finished:
            self.open.discard(output.request_id)
        self._news[output.request_id] = output

    def fail(self, error: BaseException) -> None:
        """Store the error that ends every request of this reader."""
        self.open.clear()
        self._error = error

    def take(self) -> list[RequestOutput]:
        """All new outputs; raises the error if there is one."""
        news, self._news = self._news, {}
        if self._error is not None:
            raise self._error
        return list(news.values())


class ThreadMailbox(Mailbox):
    """The mailbox of a reader that waits in a thread."""

    def __init__(self, submissions: Sequence[Submission]) -> None:
        super().__init__(submissions)
        # holds an entry when there is news; no threading.Event, see CoreThread's `_wake`
        self.bell: SimpleQueue[None] = SimpleQueue()

    @staticmethod
    def ring(boxes: "Sequence[ThreadMailbox]") -> None:
        for box in boxes:
            box.bell.put(None)

    def take(self) -> list[RequestOutput]:
        while not self.bell.empty():
            self.bell.get()
        return super().take()
