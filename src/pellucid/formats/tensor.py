"""A tensor as it lies on disk: the name of a format, a shape, and bytes, or where these are.
`weights` passes such tensors to a backend, which chooses its own layout.
"""

from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["HostTensor", "StoredMatrix", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its bytes.

    `shape` is in row-major order, as NumPy and Hugging Face write it: a linear weight is [out, in].
    Quantized blocks run along the last axis.
    """

    format: str  # a name that formats.get_format knows: "F32", "Q4_K", …
    shape: tuple[int, ...]
    permuted: bool = False  # whether the inputs lie in another order, which the tensor holds


@dataclass(frozen=True, slots=True)
class HostTensor:
    """`data` holds the rows one after another, uint8 [rows, bytes per row]. It must not be written
    to.

    `format` and `shape` are those of `TensorSpec`. Quantized blocks never cross a row, so rows may
    be permuted or split as bytes without decoding them.

    `input_order` int32 [in] says which input each place of a row belongs to, where a quantizer
    sorted them (GPTQ's act-order). None: place k is input k.
    """

    format: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    input_order: NDArray[np.int32] | None = None

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.format, self.shape, self.input_order is not None)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix [out, in] whose bytes have not been read: its rows lie one after another from
    `offset` in an open file.
    """

    spec: TensorSpec
    file: BinaryIO
    offset: int
    what: str  # names it in an error of reading
    # Of q and k in the interleaved RoPE layout: so many heads, whose rows 2i and 2i + 1 are to
    # become rows i and i + D/2. 0: the rows stay where they are.
    interleaved_heads: int = 0
