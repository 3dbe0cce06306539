"""The mailbox of an asyncio task. It is not in `mailbox.py`, so that `LLM` does not import asyncio,
which would take a tenth of the start time.
"""

import asyncio
import contextlib
from collections.abc import Sequence

from ..outputs import RequestOutput
from .admission import Submission
from .mailbox import Mailbox

__all__ = ["TaskMailbox"]


class TaskMailbox(Mailbox):
    """The mailbox of a task of an event loop. Its event is used only in that loop."""

    is_always_wanted = True

    def __init__(self, submissions: Sequence[Submission], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(submissions)
        self.loop = loop
        self.event = asyncio.Event()  # set while there are new outputs

    @property
    def is_abandoned(self) -> bool:
        return self.loop.is_closed()

    @staticmethod
    def ring(boxes: "Sequence[TaskMailbox]") -> None:
        """Wake each event loop once."""
        told: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for box in boxes:
            told.setdefault(box.loop, []).append(box.event)
        for loop, events in told.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_set_all, events)

    def take(self) -> list[RequestOutput]:
        self.event.clear()
        return super().take()


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
