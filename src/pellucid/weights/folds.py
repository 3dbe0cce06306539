"""Folds: changes to weights that are made once, at load, so that the forward pass has one layout.
Row permutations, splits, joins, transposes, Gemma's 1 + w.

A fold is called with the tensors of a file and returns one parameter. `spec` computes the format
and shape of that parameter from those of the tensors, so that the memory plan reads no bytes. It
also refuses tensors that the fold cannot take.

A `HostTensor`'s rows are bytes, and quantized blocks never cross a row. So a fold that moves whole
rows (split, join, permute) works with any format without decoding, and a split is a view. A fold
that moves or changes single values (transpose, 1 + w) needs a dense format.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..formats import dequantize, encode_dense
from ..formats.tensor import HostTensor, TensorSpec

__all__ = ["AddOne", "Fold", "InterleavedToHalfSplit", "SliceOutputs", "Transpose"]

# the bits of one value, which are moved without decoding
_DENSE = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


class Fold(Protocol):
    """A function from one or several tensors of a file to one parameter."""

    def spec(self, *sources: TensorSpec) -> TensorSpec:
        """Format and shape of the result. Raises UnsupportedError for a source whose format cannot
        be folded.
        """
        ...

    def __call__(self, *sources: HostTensor) -> HostTensor:
        """The parameter itself."""
        ...


@dataclass(frozen=True, slots=True)
class SliceOutputs:
    """Outputs start … stop - 1 of a weight [out, in] or of a bias [out]: a view."""

    start: int
    stop: int

    def spec(self, *sources: TensorSpec) -> TensorSpec:
        (source,) = sources
        if len(source.shape) == 1:
            _check_dense(source.format)
        return replace(source, shape=(self.stop - self.start, *source.shape[1:]))

    def __call__(self, *sources: HostTensor) -> HostTensor:
        (source,) = sources
        shape = self.spec(source.spec).shape
        if len(shape) == 1:
            values = _values(source)[:, self.start : self.stop]
            return HostTensor(source.format, shape, values.view(np.uint8))
        return replace(source, shape=shape, data=source.data[self.start : self.stop])


@dataclass(frozen=True, slots=True)
class InterleavedToHalfSplit:
    """The outputs of q or k, reordered from the interleaved RoPE layout (pairs 2i, 2i + 1) to the
    half-split one (pairs i, i + D/2).
    """

    num_heads: int

    def spec(self, *sources: TensorSpec) -> TensorSpec:
        (source,) = sources
        if len(source.shape) == 1:
            _check_dense(source.format)
        return source

    def __call__(self, *sources: HostTensor) -> HostTensor:
        (source,) = sources
        rows = source.data if len(source.shape) == 2 else _values(source).reshape(-1, 1)
        pairs = rows.reshape(self.num_heads, -1, 2, rows.shape[-1])  # [H, D/2, 2, bytes of a row]
        moved = pairs.swapaxes(1, 2).reshape(rows.shape)  # [H · 2 · D/2, bytes of a row]
        data = moved.view(np.uint8).reshape(source.data.shape)
        return replace(source, data=data)


@dataclass(frozen=True, slots=True)
class Transpose:
    """Columns start … stop - 1 of a dense weight [in, out], as rows [out, in]."""

    start: int = 0
    stop: int | None = None

    def spec(self, *sources: TensorSpec) -> TensorSpec:
        (source,) = sources
        _check_dense(source.format)
        rows, columns = source.shape
        return TensorSpec(source.format, (len(range(columns)[self.start : self.stop]), rows))

    def __call__(self, *sources: HostTensor) -> HostTensor:
        (source,) = sources
        columns = np.ascontiguousarray(_values(source)[:, self.start : self.stop].T)  # [out, in]
        return HostTensor(source.format, columns.shape, columns.view(np.uint8))


@dataclass(frozen=True, slots=True)
class AddOne:
    """1 + w in float32, the factor of Gemma's norms."""

    def spec(self, *sources: TensorSpec) -> TensorSpec:
        (source,) = sources
        return TensorSpec("F32", source.shape)

    def __call__(self, *sources: HostTensor) -> HostTensor:
        (source,) = sources
        return encode_dense(dequantize(source) + np.float32(1.0))


def _check_dense(format: str) -> None:
    if format not in _DENSE:
        raise UnsupportedError(
            f"a tensor of format {format} must be split or transposed within its rows; only "
            f"{', '.join(_DENSE)} can be"
        )


def _values(tensor: HostTensor) -> NDArray[Any]:
    """The bits of a dense tensor's values [rows, row length]."""
    _check_dense(tensor.format)
    return tensor.data.view(_DENSE[tensor.format])
