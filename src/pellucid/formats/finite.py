"""Refuses NaN and infinity in weights. A file that holds one is damaged, or a quantizer failed. The
error names the tensor and is raised when the tensor is loaded.
"""

from ..errors import FormatError

__all__ = ["check_finite"]


def check_finite(name: str, is_finite: bool) -> None:
    """Raise FormatError for the tensor `name` unless all of its numbers, or all scales and minima
    of its blocks, are finite.
    """
    if not is_finite:
        raise FormatError(
            f"tensor {name!r} holds NaN or infinity; the file is damaged, or was quantized wrongly"
        )
