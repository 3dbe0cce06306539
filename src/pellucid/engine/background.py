"""Work in another thread while the caller does something else.

The work is an iterator, so it can be stopped between two items. If the caller fails, or Ctrl-C
interrupts it, it waits for one item at most.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, Self, TypeVar

__all__ = ["Background"]

T = TypeVar("T")


class Background(Generic[T]):
    """Collects the items of `work()` in a thread. Use it as a context manager: leaving it stops the
    thread after the current item.
    """

    def __init__(self, work: Callable[[], Iterable[T]]) -> None:
        self._work = work
        self._items: list[T] = []
        self._error: BaseException | None = None
        self._wanted = True
        self._thread = threading.Thread(target=self._collect, name="pellucid-load")

    def _collect(self) -> None:
        try:
            for item in self._work():
                self._items.append(item)
                if not self._wanted:
                    break
        except BaseException as error:
            self._error = error

    def result(self) -> list[T]:
        """Wait for all items and return them; raises the exception that ended the work."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._items

    def __enter__(self) -> Self:
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C, perhaps after the thread has begun
            self._wanted = False
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._wanted = False
        self._thread.join()
