"""Every error that Pellucid raises on purpose, as one small tree.

    PellucidError
    ├── ConfigError        an option or parameter has a value it cannot have        (also a ValueError)
    ├── RequestError       a request cannot be served as it was asked              (also a ValueError)
    ├── FormatError        a file is not what it says it is                        (also a ValueError)
    ├── UnsupportedError   the file is sound, but asks for something not built     (also a ValueError)
    ├── CapacityError      it does not fit in the memory that there is             (also a MemoryError)
    ├── DownloadError      a model could not be brought here                       (also an OSError)
    ├── QueueFullError     there are as many requests as the engine takes: later   (also a RuntimeError)
    └── EngineError        a step crashed, and its requests are lost               (also a RuntimeError)
        └── EngineDeadError    the engine has ended: closed, or past trusting

The rule for a message: one sentence that names the field, the value it had and what is allowed. The
command line prints that sentence and nothing else; a traceback is shown only with `--debug`.
Anything that is not a `PellucidError` is a bug.
"""

from collections.abc import Sequence

__all__ = [
    "CapacityError",
    "ConfigError",
    "DownloadError",
    "EngineDeadError",
    "EngineError",
    "FormatError",
    "PellucidError",
    "QueueFullError",
    "RequestError",
    "UnsupportedError",
]


class PellucidError(Exception):
    """The root: catch this to catch every error that Pellucid raises on purpose."""


class ConfigError(PellucidError, ValueError):
    """An option or parameter has a value it cannot have."""


class RequestError(PellucidError, ValueError):
    """A request cannot be served as it was asked: its prompt is too long, its messages do not fit
    the chat template.
    """


class FormatError(PellucidError, ValueError):
    """A file is not what it says it is: truncated, corrupt, inconsistent or hostile."""


class UnsupportedError(PellucidError, ValueError):
    """A sound file asks for something that Pellucid does not do: an unknown architecture, tokenizer
    or block format.
    """


class CapacityError(PellucidError, MemoryError):
    """Weights or KV cache do not fit in the memory that there is; the message carries the
    arithmetic.
    """


class DownloadError(PellucidError, OSError):
    """A model could not be brought here: no network, no such name, a wrong checksum."""


class QueueFullError(PellucidError, RuntimeError):
    """There are as many requests as the engine takes. The request may be sound: try again later."""


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
