"""What a block format is, and small functions that all formats use.

A quantized row is a run of equal blocks, and a block is a C struct. So a format is a NumPy
structured dtype, a function from n blocks to n · block_size float32 values, and the inverse
function. Both work on all n blocks at once.

Shapes: n blocks, B bytes per block, S values per block; blocks are uint8 [n, B], values float32 [n,
S]. Everything is little-endian. This module has no particular format. `formats/__init__.py` decides
how much is decoded at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from .importance import Weigh

__all__ = [
    "BlockFormat",
    "Blocks",
    "Values",
    "as_bytes",
    "bit_planes",
    "block_fields",
    "block_scale",
    "check_values",
    "pack_planes",
    "stored_scale",
]

Blocks: TypeAlias = NDArray[np.uint8]  # [n, B]
Values: TypeAlias = NDArray[np.float32]  # [n, S]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One way to store numbers. `ggml_type` is its number in GGUF files; the formats that those
    cannot hold have numbers from 1000.
    """

    name: str
    ggml_type: int
    block_size: int  # S: values per quant_block
    block_bytes: int  # B
    dequantize_blocks: Callable[[Blocks], Values]
    # (values, weights of values or None) -> blocks; None: the format can only be read
    quantize_blocks: Callable[[Values, Values | None], Blocks] | None = None
    weigh: Weigh | None = None  # None: the format makes no use of the importance of columns
    # whether each row begins with a float32, which all of its values are to be multiplied by
    row_scale: bool = False

    @property
    def row_header(self) -> int:
        """Bytes before the blocks of each row."""
        return 4 if self.row_scale else 0


def block_fields(blocks: Blocks, layout: np.dtype[np.void]) -> NDArray[Any]:
    """The blocks [n, B] seen as n structs of `layout`, without a copy: `block_fields(blocks,
    Q4_0_LAYOUT)["qs"]` is uint8 [n, 16].
    """
    return blocks.view(layout)[:, 0]


def block_scale(field: NDArray[Any]) -> Values:
    """A float16 field [n] as float32 [n, 1], ready to multiply the values of its block."""
    return field.astype(np.float32)[:, None]


def bit_planes(packed: NDArray[np.uint8], bits: int, span: int) -> NDArray[np.uint8]:
    """Split bytes into codes of `bits` bits each, uint8 [n, m] -> [n, m · 8/bits].

    Neighbouring codes do not share a byte. In each `span` bytes the lowest bits hold the first
    `span` codes, the next higher bits the next `span` codes, and so on. So a vector unit unpacks
    many codes with one shift and one mask. For 4 bits and a span of 16:

        byte    0       1     …   15
        high  c[16]   c[17]   …  c[31]
        low   c[0]    c[1]    …  c[15]
    """
    n, m = packed.shape
    spans = np.ascontiguousarray(packed).reshape(n, m // span, span)
    codes = np.empty((n, m // span, 8 // bits, span), np.uint8)
    for plane in range(8 // bits):
        np.right_shift(spans, np.uint8(plane * bits), out=codes[:, :, plane])
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(n, -1)


def pack_planes(codes: NDArray[np.uint8], bits: int, span: int) -> NDArray[np.uint8]:
    """The inverse of `bit_planes`: codes uint8 [n, m · 8/bits] of `bits` bits each -> bytes
    [n, m].
    """
    planes = codes.reshape(len(codes), -1, 8 // bits, span)
    packed = planes[:, :, 0].copy()
    for plane in range(1, 8 // bits):
        packed |= planes[:, :, plane] << np.uint8(plane * bits)
    return packed.reshape(len(codes), -1)


def as_bytes(blocks: NDArray[np.void]) -> Blocks:
    """Structs [n] as bytes [n, B]."""
    return blocks.view(np.uint8).reshape(len(blocks), blocks.dtype.itemsize)


def check_values(values: Values, name: str) -> None:
    """Raise FormatError unless all values can be stored in the format called `name`."""
    if not np.isfinite(values).all():
        raise FormatError(f"{name} cannot hold values that are infinite or not numbers")


def stored_scale(x: Values, name: str) -> NDArray[np.float16]:
    """Scales or minima as they are stored, in float16. Raises FormatError where one is beyond its
    range.
    """
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    if not np.isfinite(halves).all():
        raise FormatError(
            f"{name} cannot hold a block whose scale or minimum is {np.abs(x).max():g}; they are "
            "stored in F16, up to 65504"
        )
    return halves
