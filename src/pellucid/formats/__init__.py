"""The table of formats in which Pellucid stores numbers, and encoding and decoding of whole
tensors.

A tensor is decoded slice by slice. The scratch arrays of a slice stay in the processor's cache, so
this is several times faster than decoding everything at once, and it needs only a few megabytes
beside the result.

A decoded value depends only on the bytes of its own block, bit for bit as ggml defines it. To add a
format, add its `BlockFormat` to the tables of `legacy.py`, `kquants.py`, `iq4.py` or `groups.py`;
this module treats all formats alike. `FORMATS` are those that GGUF files can hold.
"""

import math
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, UnsupportedError
from .base import BlockFormat
from .groups import GROUP_FORMATS
from .iq4 import IQ4_FORMATS
from .kquants import K_QUANT_FORMATS
from .legacy import LEGACY_FORMATS
from .tensor import HostTensor, TensorSpec

__all__ = [
    "ALL_FORMATS",
    "FORMATS",
    "BlockFormat",
    "HostTensor",
    "dequantize",
    "encode_dense",
    "format_of_ggml_type",
    "format_of_number",
    "get_format",
    "host_tensor",
    "packed_bytes",
    "quantize",
    "row_bytes",
]

FORMATS = MappingProxyType(
    {format.name: format for format in LEGACY_FORMATS + K_QUANT_FORMATS + IQ4_FORMATS}
)
ALL_FORMATS = MappingProxyType({**FORMATS, **{format.name: format for format in GROUP_FORMATS}})
_BY_NUMBER = MappingProxyType({format.ggml_type: format for format in ALL_FORMATS.values()})

# values decoded at a time: 2 MiB of float32, and as much again in scratch arrays
SLICE_VALUES = 1 << 19

# ggml's other types, for the names in errors
_OTHER_GGML_TYPES = MappingProxyType(
    {
        9: "Q8_1",
        15: "Q8_K",
        16: "IQ2_XXS",
        17: "IQ2_XS",
        18: "IQ3_XXS",
        19: "IQ1_S",
        21: "IQ3_S",
        22: "IQ2_S",
        24: "I8",
        25: "I16",
    }
    | {
        26: "I32",
        27: "I64",
        28: "F64",
        29: "IQ1_M",
        34: "TQ1_0",
        35: "TQ2_0",
        39: "MXFP4",
        40: "NVFP4",
        41: "Q1_0",
    }
)


def get_format(name: str) -> BlockFormat:
    """The format called `name`."""
    if name not in ALL_FORMATS:
        raise UnsupportedError(
            f"the block format {name!r} is not known; there are {', '.join(ALL_FORMATS)}"
        )
    return ALL_FORMATS[name]


def format_of_number(number: int) -> BlockFormat:
    """The format with this `ggml_type`, which must exist, in GGUF files or not."""
    return _BY_NUMBER[number]


def format_of_ggml_type(ggml_type: int) -> BlockFormat:
    """The format with this number in GGUF files."""
    for format in FORMATS.values():
        if format.ggml_type == ggml_type:
            return format
    name = f" ({_OTHER_GGML_TYPES[ggml_type]})" if ggml_type in _OTHER_GGML_TYPES else ""
    raise UnsupportedError(
        f"ggml type {ggml_type}{name} cannot be read; the types that can are {', '.join(FORMATS)}"
    )


def row_bytes(format: str, num_values: int) -> int:
    """Bytes of a row of `num_values` values, which must fill whole blocks."""
    block = get_format(format)
    if num_values % block.block_size:
        raise FormatError(
            f"a row of {num_values} values cannot be stored as {format}: its blocks hold "
            f"{block.block_size} values"
        )
    return block.row_header + num_values // block.block_size * block.block_bytes


def packed_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor in its format."""
    return math.prod(spec.shape[:-1]) * row_bytes(spec.format, spec.shape[-1])


def host_tensor(format: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> HostTensor:
    """A tensor over raw bytes, uint8 [n], without a copy. n must match the shape."""
    if not shape or min(shape) < 1:
        raise FormatError(
            f"a tensor of shape {shape} cannot be stored; it needs at least one axis, and no axis "
            "may be empty"
        )
    rows, nbytes = math.prod(shape[:-1]), row_bytes(format, shape[-1])
    if data.size != rows * nbytes:
        raise FormatError(
            f"a {format} tensor of shape {shape} takes {rows * nbytes} bytes, not {data.size}"
        )
    return HostTensor(format, shape, data.reshape(rows, nbytes))


def encode_dense(array: NDArray[Any]) -> HostTensor:
    """An array without rounding: float32 becomes F32, float16 F16, and uint16 BF16 (as bits,
    because NumPy has no such type).
    """
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
    if array.dtype.name not in names:
        raise UnsupportedError(
            f"an array of {array.dtype} cannot be kept as it is; float32, float16 and uint16 "
            "(bfloat16 bits) can"
        )
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return host_tensor(names[array.dtype.name], array.shape, little.reshape(-1).view(np.uint8))


def quantize(
    array: NDArray[Any], format: str, importance: NDArray[np.float32] | None = None
) -> HostTensor:
    """An array of numbers, rounded to `format` as ggml does. Raises FormatError for values that the
    format cannot hold.

    `importance` [columns]: how much each column matters, from an importance matrix. Formats without
    a search (F16, Q8_0 and so on) make no use of it.
    """
    block = get_format(format)
    if block.quantize_blocks is None:
        raise UnsupportedError(
            f"{format} can be read but not written; the formats that can be written are "
            f"{', '.join(FORMATS)}"
        )
    size = row_bytes(format, array.shape[-1]) * math.prod(array.shape[:-1]) if array.ndim else 0
    tensor = host_tensor(format, array.shape, np.empty(size, np.uint8))
    rows = array.reshape(-1, array.shape[-1])
    if importance is not None and importance.shape != rows.shape[1:]:
        raise FormatError(
            f"the importance of {importance.shape} columns does not fit an array of shape "
            f"{array.shape}"
        )
    step = max(1, SLICE_VALUES // rows.shape[1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for start in range(0, len(rows), step):
            values = np.ascontiguousarray(rows[start : start + step], np.float32)
            weights = None
            if importance is not None and block.weigh is not None:
                weights = block.weigh(values, importance).reshape(-1, block.block_size)
            blocks = block.quantize_blocks(values.reshape(-1, block.block_size), weights)
            tensor.data[start : start + step] = blocks.reshape(len(values), -1)
    return tensor


def dequantize(tensor: HostTensor) -> NDArray[np.float32]:
    """The values of a tensor as a new float32 array of its shape. An infinite or NaN scale in a
    damaged file gives infinities and NaNs.
    """
    block = get_format(tensor.format)
    rows = host_tensor(tensor.format, tensor.shape, tensor.data).data
    blocks = np.ascontiguousarray(rows[:, block.row_header :]).reshape(-1, block.block_bytes)
    values = np.empty((len(blocks), block.block_size), np.float32)
    step = SLICE_VALUES // block.block_size
    with np.errstate(invalid="ignore"):
        for start in range(0, len(blocks), step):
            values[start : start + step] = block.dequantize_blocks(blocks[start : start + step])
        if block.row_scale:
            scales = np.ascontiguousarray(rows[:, :4]).view("<f4")
            values.reshape(len(rows), -1)[:] *= scales
    values = values.reshape(tensor.shape)
    if tensor.input_order is not None:
        values[..., tensor.input_order] = values.copy()
    return values
