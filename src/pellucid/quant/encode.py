"""Encodes matrices with the compiled searches (csrc/encode.h), on several threads.

The bytes are those of `formats.quantize`, which is the readable definition, several times slower.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..formats import HostTensor, get_format, host_tensor, packed_bytes, quantize
from ..formats.tensor import TensorSpec

__all__ = ["Encoder"]

Floats: TypeAlias = NDArray[np.float32]
DENSE = ("F32", "F16", "BF16")  # nothing is searched


class Encoder:
    """Keeps the threads."""

    def __init__(self, threads: int, isa: str | None = None) -> None:
        """`isa`: one of `_native.encoders()`; None: the best that this CPU can run."""
        self._pool = _native.ThreadPool(threads)
        self._isa = isa or _native.encoders()[0]

    def encode(self, values: Floats, format: str, importance: Floats | None) -> HostTensor:
        """The values [rows, columns] in the format, as `formats.quantize` gives them. Raises its
        errors.
        """
        if format in DENSE:
            return quantize(values, format)
        spec = TensorSpec(format, values.shape)
        out = np.empty((len(values), packed_bytes(spec) // len(values)), np.uint8)
        values = np.ascontiguousarray(values, np.float32)
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
        number = get_format(format).ggml_type
        if not _native.encode(self._pool, self._isa, number, values, importance, out):
            return quantize(values, format, importance)  # raises an error that says what is wrong
        return host_tensor(format, values.shape, out.reshape(-1))
