"""Every error that Pellucid raises on purpose, as one small tree.

    PellucidError
    ├── ConfigError        an option or parameter has a value it cannot have     (a ValueError)
    ├── RequestError       a request cannot be served as it was asked            (a ValueError)
    │   └── PromptTooLongError its prompt leaves no room for a token
    ├── FormatError        a file is truncated, corrupt, inconsistent or hostile (a ValueError)
    ├── UnsupportedError   a sound file asks for a feature that does not exist   (a ValueError)
    ├── CapacityError      it does not fit in memory                             (a MemoryError)
    ├── DownloadError      a model could not be fetched                          (an OSError)
    ├── QueueFullError     the engine has as many requests as it takes           (a RuntimeError)
    └── EngineError        a step crashed, and its requests are lost             (a RuntimeError)
        └── EngineDeadError    the engine was closed or cannot be trusted any more

A message is one sentence that names the field, its value and what is allowed. The command line
prints only that sentence; `--debug` adds the traceback. An exception that is not a `PellucidError`
is a bug.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = [
    "CapacityError",
    "ConfigError",
    "DownloadError",
    "EngineDeadError",
    "EngineError",
    "FormatError",
    "PellucidError",
    "PromptTooLongError",
    "QueueFullError",
    "RequestError",
    "UnsupportedError",
    "named_errors",
]


class PellucidError(Exception):
    """The root: catch this to catch every error that Pellucid raises on purpose."""


class ConfigError(PellucidError, ValueError):
    """An option or parameter has a value it cannot have."""


class RequestError(PellucidError, ValueError):
    """A request cannot be served as it was asked: its prompt is too long, its messages do not fit
    the chat template.
    """


class PromptTooLongError(RequestError):
    """The prompt of a request leaves no room for a token in the context."""


class FormatError(PellucidError, ValueError):
    """A file is truncated, corrupt, inconsistent or hostile."""


class UnsupportedError(PellucidError, ValueError):
    """A sound file asks for a feature that Pellucid does not have: an unknown architecture,
    tokenizer or block format.
    """


class CapacityError(PellucidError, MemoryError):
    """Weights, KV cache or activations do not fit in the available memory; the message shows the
    arithmetic.
    """


class DownloadError(PellucidError, OSError):
    """A model could not be fetched: no network, no such name, a wrong checksum."""


class QueueFullError(PellucidError, RuntimeError):
    """The engine has as many requests as it takes. The request may be sound: try again later."""


class EngineError(PellucidError, RuntimeError):
    """A step crashed, and the requests that it computed are lost; `__cause__` is what happened. The
    engine serves the others.
    """

    def __init__(self, message: str, request_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.request_ids = list(request_ids)  # those that are lost


class EngineDeadError(EngineError):
    """The engine has ended, because it was closed or because a crash left a state that cannot be
    trusted.
    """


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Begin the message of a refusal with `name`, the one of several things that is wrong. An
    empty name changes nothing.
    """
    try:
        yield
    except (ConfigError, RequestError, CapacityError) as error:
        raise type(error)(f"{name}: {error}") if name else error from None
