"""Signals and standard streams, from the first moment of the program to its last.

There are two ways to react to Ctrl-C, SIGTERM and SIGHUP:

- `leave_at_once` ends the process without output. It is active while the interpreter starts and
  exits and while the commands are imported, when nothing needs cleaning up.
- `unwind` raises an exception, so that every `finally` runs: no child process, half-written line or
  temporary file is left behind. It is active while a command runs. During an import it ends the
  process at once, because modules may turn an exception that passes through them into another
  error, or lose it.

This module imports little, so that `leave_at_once` is active before the slow imports begin.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "cancel_instead", "fill_closed_streams", "leave_at_once", "unwind"]

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in dir(signal)
]
_PATIENCE_SECONDS = 1.0
_Handler = Callable[[int, FrameType | None], object]


class Stopped(SystemExit):
    """A signal asked the program to end. The exit code is 128 + the signal's number."""


def leave_at_once() -> None:
    """From now on a signal ends the process without a traceback and without cleaning up.

    An exception of `unwind` that is raised in a destructor, where Python cannot propagate it, also
    ends the process.
    """
    _set_handlers(_leave)
    sys.unraisablehook = _unraisable


@contextmanager
def unwind() -> Iterator[None]:
    """Within it Ctrl-C raises KeyboardInterrupt, and SIGTERM and SIGHUP raise `Stopped`."""
    with _handlers(_raise):
        yield


@contextmanager
def _handlers(handler: _Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _set_handlers(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def cancel_instead(cancel: Callable[[], object]) -> Iterator[None]:
    """Within it a signal calls `cancel` and raises at the end of the block.

    It is for event loops: an exception in the middle of a loop's own code loses a task that was
    about to run. A signal that comes more than a second after the first raises at once.
    """
    noted: list[tuple[float, int]] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        noted.append((now, number))
        if now - noted[0][0] > _PATIENCE_SECONDS:
            _raise(number, frame)
        cancel()

    with _handlers(note):
        try:
            yield
        finally:
            if noted:
                _raise(noted[0][1], None)


def fill_closed_streams() -> bool:
    """Open the null device in place of standard streams that are closed (`>&-`), so that no other
    file gets their numbers. False: standard output was closed.
    """
    has_output = sys.stdout is not None
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if vars(sys)[name] is not None:
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    return has_output


def _leave(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave(number, None)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(128 + number)


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
    if isinstance(what.exc_value, KeyboardInterrupt):
        os._exit(128 + signal.SIGINT)
    if isinstance(what.exc_value, Stopped):
        os._exit(int(what.exc_value.code or 1))
    sys.__unraisablehook__(what)


def _set_handlers(handler: _Handler) -> None:
    """Set handlers, except for signals that the parent process made us ignore (nohup, background
    jobs).
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
