"""Refuses NaN and infinity in weights. A file that holds one is damaged, or a quantizer failed. The
error names the tensor and is raised when the tensor is loaded.

Weights that are finite and huge make activations that are not; quantizers refuse these too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FormatError

__all__ = ["check_activation", "check_finite", "naming"]


def check_finite(name: str, is_finite: bool) -> None:
    """Raise FormatError for the tensor `name` unless all of its numbers, or all scales and minima
    of its blocks, are finite.
    """
    if not is_finite:
        raise FormatError(
            f"tensor {name!r} holds NaN or infinity; the file is damaged, or was quantized wrongly"
        )


def check_activation(what: str, is_finite: bool) -> None:
    """Raise FormatError unless all numbers of an activation are finite. `what` begins the message,
    as in "the input of layers.0.mlp_input".
    """
    if not is_finite:
        raise FormatError(f"{what} is NaN or infinite; the model is damaged")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put the name of a tensor, and what becomes of it, before the message of a FormatError."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from error
