"""Processes that render chat templates, so that a template cannot harm the engine's process.

A template is an untrusted program. One of its calls into C (a search, a sort, a hash of nested
values) can take minutes, gigabytes or the whole C stack, and no check in Python can interrupt it.
So templates run in processes of their own (`template_worker.py`), with limits on CPU time, memory
and wall-clock time. The caller waits at a socket, so other threads run and signals are handled.

The first chat starts a process, unless `start` has done so. It then serves one rendering after
another. It is replaced after a crash, an exceeded limit or an interrupted wait. Up to MAX_PROCESSES
render at the same time. A fork of the engine's process starts its own. They end when the engine's
process ends.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CapacityError
from .template_worker import ANSWER, JOB, Status, decode, encode

__all__ = ["Answer", "TemplateProcesses"]

CPU_SECONDS = 2.0  # of one rendering; a chat of 1000 messages takes 0.1
WALL_SECONDS = 20.0  # waited for one rendering, for machines that are busy
START_SECONDS = 60.0  # waited for a new process
MEMORY_BYTES = 1 << 29  # of a process, its 25 MB of Python included
MAX_ANSWER_BYTES = 48 << 20  # the sandbox lets a prompt have 8 million characters
MAX_PROCESSES = 4

# Imports modules from the folders of the two packages without running their __init__, which would
# import the tokenizers and NumPy.
_START = """
import importlib, json, sys, types
folders, sys.path[:], limits = json.loads(sys.argv[1])
for name, folder in folders.items():
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [folder]
importlib.import_module("pellucid.tokenizer.template_worker").serve(*limits)
"""


class Answer(NamedTuple):
    """The result of a job."""

    status: Status
    text: str
    marks: bytes  # one for each character of a text that was rendered


class TemplateProcesses:
    """A few processes, each with one job at a time. Any thread may call `ask`."""

    def __init__(
        self,
        *,
        cpu_seconds: float = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        max_processes: int = MAX_PROCESSES,
    ) -> None:
        self._limits = (cpu_seconds, memory_bytes)
        self._wall_seconds = wall_seconds
        self._max_processes = max_processes
        self._forget()

    def _forget(self) -> None:
        """Start without any process."""
        self._owner = os.getpid()
        self._places = [_Place(threading.Lock()) for _ in range(self._max_processes)]

    def start(self) -> None:
        """Start a process for the first job, and wait for nothing."""
        place = self._places[0]
        # a failure is told to the first job, which tries again; there may be none
        with place.lock, contextlib.suppress(CapacityError):
            if place.process is None:
                place.process = _Process(*self._limits)

    def ask(self, job: dict[str, Any]) -> Answer:
        """Render a job (`template_worker.py`). Raises CapacityError if no process starts."""
        if self._owner != os.getpid():  # after a fork: the sockets belong to the parent
            self._forget()
        data = encode(json.dumps(job, ensure_ascii=False))
        # take the first free place; if all are busy, wait for any
        free = (place for place in self._places if not place.lock.locked())
        any_place = self._places[threading.get_ident() % len(self._places)]
        place = next(free, any_place)
        # render; keep the process if it can serve another job
        with place.lock:
            process, place.process = place.process, None
            if process is None or not process.is_running:
                process = _Process(*self._limits)
            try:
                process.wait_until_ready()
                answer = process.ask(data, self._wall_seconds)
            except BaseException:
                process.kill()
                raise
            if process.is_usable:
                place.process = process
            else:
                process.kill()
        return answer


@dataclass(slots=True)
class _Place:
    """Room for one process, and the lock of its user.

    Each place has a plain lock instead of a shared semaphore: Ctrl-C within a semaphore's Python
    code could lose a place for good.
    """

    lock: threading.Lock
    process: "_Process | None" = None


class _Process:
    """One process and the socket to it."""

    def __init__(self, cpu_seconds: float, memory_bytes: int) -> None:
        self._cpu_seconds = cpu_seconds
        self.is_usable = True
        # start it, with one end of a pair of sockets
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            with theirs:
                fd = theirs.fileno()
                setup = json.dumps([_folders(), _paths(), [fd, cpu_seconds, memory_bytes]])
                command = [sys.executable or "", "-I", "-S", "-c", _START, setup]
                nothing = subprocess.DEVNULL
                try:
                    process = subprocess.Popen(
                        command,
                        stdin=nothing,
                        stdout=nothing,
                        stderr=nothing,
                        pass_fds=(fd,),
                        start_new_session=True,  # so that Ctrl-C in a terminal does not reach it
                    )
                except OSError as error:
                    raise CapacityError(
                        f"no process could be started to render the chat template: {error.strerror}"
                    ) from error
            undo.pop_all()
        self._process, self._socket = process, ours
        self._is_ready = False
        self.kill = weakref.finalize(self, _kill, process, ours, os.getpid())

    def wait_until_ready(self) -> None:
        """Wait for the end of its start. Raises CapacityError where it fails."""
        if self._is_ready:
            return
        try:
            self._wait(_Patience(START_SECONDS))
        except TimeoutError:
            self.kill()
            raise CapacityError(
                "the process that renders chat templates did not start within "
                f"{START_SECONDS:g} seconds"
            ) from None
        except (OSError, EOFError):
            self.kill()
            raise CapacityError(
                "the process that renders chat templates did not start: it ended with code "
                f"{self._process.returncode}"
            ) from None
        self._is_ready = True

    @property
    def is_running(self) -> bool:
        """Whether it is alive: it may have been killed while idle."""
        return self._process.poll() is None

    def ask(self, job: bytes, seconds: float) -> Answer:
        """The answer to a job. If the process ends or is late, the answer is LIMITED and the
        process is no longer usable.
        """
        self.is_usable = False
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(JOB.pack(len(job)) + job)
            answer = self._wait(_Patience(seconds))
        except TimeoutError:
            return Answer(Status.LIMITED, f"it runs for more than {seconds:g} seconds", b"")
        except (OSError, EOFError):
            return Answer(Status.LIMITED, self._end(), b"")
        self.is_usable = answer.status != Status.LIMITED
        return answer

    def _wait(self, patience: "_Patience") -> Answer:
        status, text_size, num_marks = ANSWER.unpack(self._read(ANSWER.size, patience))
        if text_size + num_marks > MAX_ANSWER_BYTES:
            return Answer(Status.LIMITED, f"it makes more than {MAX_ANSWER_BYTES} bytes", b"")
        text = decode(self._read(text_size, patience))
        return Answer(Status(status), text, self._read(num_marks, patience))

    def _read(self, size: int, patience: "_Patience") -> bytes:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            with patience.wait() as seconds:
                self._socket.settimeout(seconds)
                if not (received := self._socket.recv_into(rest)):
                    raise EOFError
                rest = rest[received:]
        return bytes(data)

    def _end(self) -> str:
        """Why the process ended, as a clause about the template."""
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "it cut itself off from the process that runs it"
        if code == -signal.SIGPROF:
            return f"it computes for more than {self._cpu_seconds:g} seconds"
        if code == -signal.SIGKILL:
            return "the system killed the process that runs it, probably for its memory"
        return f"it crashed the process that runs it (exit code {code})"


class _Patience:
    """Seconds to wait, spent in short waits. A program and the process that it waits for may both
    be stopped for any time (a paused container, a laptop that sleeps). That costs one short wait;
    a deadline would pass.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    @contextlib.contextmanager
    def wait(self) -> Iterator[float]:
        """One wait, of as many seconds as it gives. If it was too short, the caller waits again.
        Raises TimeoutError if no time is left.
        """
        if self._left <= 0:
            raise TimeoutError
        seconds, start = min(self._left, 0.5), time.monotonic()
        try:
            yield seconds
        except TimeoutError:  # look again: the answer may have come while all was stopped
            self._left -= seconds
        else:
            self._left -= min(seconds, time.monotonic() - start)


def _kill(process: "subprocess.Popen[bytes]", ours: socket.socket, owner: int) -> None:
    """End a process. In a fork of its owner, only close the socket."""
    ours.close()
    if os.getpid() != owner:
        process.returncode = 0  # so that the fork does not wait for it
        return
    if process.poll() is None:
        process.kill()
    process.wait()


def _folders() -> dict[str, str]:
    here = Path(__file__).parent
    return {"pellucid": str(here.parent), "pellucid.tokenizer": str(here)}


def _paths() -> list[str]:
    """Our own path, and the folders of Jinja in case a hook imported it from elsewhere."""
    found = [find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = [str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin]
    return [*filter(None, sys.path), *folders]
