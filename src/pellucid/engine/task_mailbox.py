"""The mailbox of an asyncio task. It stands apart from `mailbox.py` so that `LLM` does not import
asyncio, which takes a tenth of the time of a start.
"""

import asyncio
import contextlib
from collections.abc import Sequence

from ..outputs import RequestOutput
from .admission import Submission
from .mailbox import Mailbox

__all__ = ["TaskMailbox"]


class TaskMailbox(Mailbox):
    """The mailbox of a task of an event loop, in which alone its event is touched."""

    is_always_wanted = True

    def __init__(self, submissions: Sequence[Submission], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(submissions)
        self.loop = loop
        self.event = asyncio.Event()  # set while there is news

    @property
    def is_abandoned(self) -> bool:
        return self.loop.is_closed()

    @staticmethod
    def ring(boxes: "Sequence[TaskMailbox]") -> None:
        """Tell each event loop once."""
        told: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for box in boxes:
            told.setdefault(box.loop, []).append(box.event)
        for loop, events in told.items():
            with contextlib.suppress(RuntimeError):  # closed since
                loop.call_soon_threadsafe(_set_all, events)

    def take(self) -> list[RequestOutput]:
        self.event.clear()
        return super().take()


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
