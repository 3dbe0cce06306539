"""A tensor as it lies on disk: a format's name, a shape, and bytes. What `weights` hands to a
backend, which makes of it what it likes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["HostTensor"]


@dataclass(frozen=True, slots=True)
class HostTensor:
    """`data` holds the rows one after another, uint8 [rows, bytes per row]: often a view of a
    memory-mapped file, and read-only by custom.

    `shape` is in row-major order, as NumPy and Hugging Face write it: a linear weight is [out, in].
    Quantized blocks run along the last axis and never cross a row, so rows may be permuted or split
    as bytes without decoding them.
    """

    format: str  # a key of formats.FORMATS: "F32", "Q4_K", …
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
