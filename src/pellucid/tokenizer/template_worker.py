"""The process in which chat templates run: it reads a job, renders it, writes the answer, and waits
for the next job.

`template_process.py` starts it and kills it. It has a limit on CPU time for each job and, on Linux,
a limit on memory for itself. It opens no files and starts no processes. A template that exceeds a
limit, or crashes the interpreter, ends this process and nothing else.

It uses one socket. A job is a length and JSON. An answer is a status, two lengths, a text in UTF-8
and a mark for each of its characters (`traced_text.py`). Both may hold lone surrogates.
"""

import functools
import json
import os
import resource
import signal
import struct
import sys
from enum import IntEnum
from typing import Any

from ..errors import RequestError
from .traced_text import CALLER, CONTINUED, TracedText, foreign

__all__ = ["ANSWER", "JOB", "Status", "decode", "encode", "serve"]

JOB = struct.Struct("<Q")  # bytes of the job
ANSWER = struct.Struct("<BQQ")  # status, bytes of the text, bytes of the marks
TEMPLATES = 8  # compiled templates that are kept


class Status(IntEnum):
    """The outcome of a job. Except for RENDERED, the text of the answer is a message."""

    RENDERED = 0
    REFUSED = 1  # by the template
    LIMITED = 2  # the template does too much
    FAILED = 3  # the template raised an error
    NOT_A_TEMPLATE = 4
    NOT_BUILT = 5  # a filter or a test that does not exist here
    WRONG_MESSAGES = 6


def encode(text: str) -> bytes:
    """UTF-8 that keeps lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def decode(data: bytes) -> str:
    """The inverse of `encode`."""
    return data.decode("utf-8", "surrogatepass")


def serve(fd: int, cpu_seconds: float, memory_bytes: int) -> None:
    """Answer jobs from the socket `fd` until its other end is closed."""
    # import everything now, while files can still be opened
    for source in (
        "{{ strftime_now('%Y') ~ '\\N{DIGIT ONE}' | tojson }}",
        "{{ none.x }}",
        "{% if %}",
    ):
        _answer({"source": source})
    _set_limits(memory_bytes)
    _write(fd, _answer_bytes(Status.RENDERED, ""))  # ready
    while header := _read(fd, JOB.size):
        job = json.loads(decode(_read(fd, *JOB.unpack(header))))
        # the timer's signal ends this process, wherever the interpreter is
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = _answer(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(fd, answer)


def _set_limits(memory_bytes: int) -> None:
    """No files, and at most `memory_bytes` of address space on Linux. macOS takes that limit and
    does not enforce it, so there only the sandbox's own bounds limit memory.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 0}
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = memory_bytes
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _answer(job: dict[str, Any]) -> bytes:
    from jinja2 import TemplateAssertionError

    from .template_sandbox import LimitError, RefusedError

    # compile the template
    source = job.pop("source")
    try:
        _compiled(source)
    except TemplateAssertionError as error:  # valid Jinja, but there is no such filter or test
        return _answer_bytes(Status.NOT_BUILT, str(error.message))
    except MemoryError:
        return _answer_bytes(Status.LIMITED, "it needs too much memory")
    except Exception as error:
        return _answer_bytes(Status.NOT_A_TEMPLATE, _shown(error))
    # render it
    try:
        return _render(source, job)
    except RequestError as error:
        return _answer_bytes(Status.WRONG_MESSAGES, str(error))
    except RefusedError as error:
        return _answer_bytes(Status.REFUSED, str(error))
    except LimitError as error:
        return _answer_bytes(Status.LIMITED, str(error))
    except MemoryError:
        return _answer_bytes(Status.LIMITED, "it needs too much memory")
    except Exception as error:  # a template is a program and may raise anything
        return _answer_bytes(Status.FAILED, _shown(error))


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


@functools.lru_cache(TEMPLATES)
def _compiled(source: str) -> Any:
    """(code, reading)."""
    from .template_reading import find_reading
    from .template_sandbox import compile_template, parse_template

    tree = parse_template(source)
    reading = find_reading(tree)
    return compile_template(tree), reading


def _render(source: str, job: dict[str, Any]) -> bytes:
    """`job`: "messages", "tools" and "variables" of the caller, "own" variables of the model, and
    "continue_final".
    """
    from .template_reading import may_be_null
    from .template_sandbox import LimitError, RefusedError

    code, reading = _compiled(source)
    if reading.asks_for_null and any(map(may_be_null, job["messages"])):
        try:
            return _render_form(code, reading, job, with_null=True)
        except (LimitError, RefusedError, RequestError, MemoryError):
            raise
        except Exception:  # it tests for null in one place and needs a text in another
            pass
    return _render_form(code, reading, job, with_null=False)


def _render_form(code: Any, reading: Any, job: dict[str, Any], *, with_null: bool) -> bytes:
    from .template_reading import adapt_messages
    from .template_sandbox import render_template

    # the variables, each text with its mark
    messages, continued = job["messages"], job["continue_final"]
    adapt_messages(messages, reading, with_null=with_null, continue_final=continued)
    variables = {
        **{name: foreign(value) for name, value in job["variables"].items()},
        **job["own"],
        "messages": foreign(messages),
        "tools": foreign(job["tools"]),
    }
    text = render_template(code, variables)
    marks = text.foreign if isinstance(text, TracedText) else bytes(len(text))
    # the end of the text to continue
    if continued:
        end = 1 + marks.rfind(bytes((CONTINUED,)))
        if not end:
            raise RequestError(
                "the chat template does not write the text of the last message, or writes it in "
                "another form, so it cannot be continued"
            )
        text, marks = text[:end], marks[:end].replace(bytes((CONTINUED,)), bytes((CALLER,)))
    return _answer_bytes(Status.RENDERED, text, marks)


# ---- the socket


def _answer_bytes(status: Status, text: str, marks: bytes = b"") -> bytes:
    data = encode(str.__str__(text))
    return ANSWER.pack(status, len(data), len(marks)) + data + marks


def _read(fd: int, size: int) -> bytes:
    """Exactly `size` bytes; none if the other end is closed."""
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return bytes(data)


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
