"""Mending weights as they are loaded, so that the forward pass never does: row permutations,
splits, transposes, Gemma's 1 + w.

One idea: a `HostTensor`'s rows are bytes, and quantized blocks never cross a row. What moves whole
rows (split, permute) works on any format and decodes nothing; a split is a view. What moves or
changes single values (transpose, 1 + w) needs a dense format.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..formats import dequantize, encode_dense
from ..formats.tensor import HostTensor

__all__ = ["add_one", "interleaved_to_half_split", "slice_outputs", "transpose"]

# the bits of one value, moved without being read
_DENSE = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def slice_outputs(tensor: HostTensor, start: int, stop: int) -> HostTensor:
    """Outputs start … stop - 1 of a weight [out, in] or of a bias [out]: a view."""
    shape = (stop - start, *tensor.shape[1:])
    if len(tensor.shape) == 1:
        return HostTensor(tensor.format, shape, _values(tensor)[:, start:stop].view(np.uint8))
    return HostTensor(tensor.format, shape, tensor.data[start:stop])


def interleaved_to_half_split(tensor: HostTensor, num_heads: int) -> HostTensor:
    """Reorder the outputs of q or k from the interleaved RoPE layout (pairs 2i, 2i + 1) to the
    half-split one (pairs i, i + D/2).
    """
    rows = tensor.data if len(tensor.shape) == 2 else _values(tensor).reshape(-1, 1)
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])  # [H, D/2, 2, bytes of a row]
    moved = pairs.swapaxes(1, 2).reshape(rows.shape)  # [H · 2 · D/2, bytes of a row]
    return HostTensor(tensor.format, tensor.shape, moved.view(np.uint8).reshape(tensor.data.shape))


def transpose(tensor: HostTensor, start: int = 0, stop: int | None = None) -> HostTensor:
    """Columns start … stop - 1 of a dense [in, out] as rows [out, in]."""
    columns = np.ascontiguousarray(_values(tensor)[:, start:stop].T)  # [out, in]
    return HostTensor(tensor.format, columns.shape, columns.view(np.uint8))


def add_one(tensor: HostTensor) -> HostTensor:
    """1 + w in float32, as Gemma's norm computes its factor."""
    return encode_dense(dequantize(tensor) + np.float32(1.0))


def _values(tensor: HostTensor) -> NDArray[Any]:
    """The bits of a dense tensor's values [rows, row length]."""
    if tensor.format not in _DENSE:
        raise UnsupportedError(
            f"a tensor of format {tensor.format} must be split or transposed within its rows; "
            f"only {', '.join(_DENSE)} can be"
        )
    return tensor.data.view(_DENSE[tensor.format])
