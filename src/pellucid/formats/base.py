"""What a block format is, and three small functions that all formats use.

One idea: a quantized row is a run of equal blocks, and a block is a C struct. So a format is a
NumPy structured dtype, a function from n blocks to n · block_size float32 values, and (if it can be
written) the inverse function. Both work on all n blocks at once.

Shapes: n blocks, B bytes per block, S values per block; blocks are uint8 [n, B], values float32 [n,
S]. Everything is little-endian. This module has no particular format. `formats/__init__.py` decides
how much is decoded at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["BlockFormat", "Blocks", "Values", "bit_planes", "block_fields", "block_scale"]

Blocks: TypeAlias = NDArray[np.uint8]  # [n, B]
Values: TypeAlias = NDArray[np.float32]  # [n, S]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One way to store numbers. `ggml_type` is its number in GGUF files."""

    name: str
    ggml_type: int
    block_size: int  # S: values per quant_block
    block_bytes: int  # B
    dequantize_blocks: Callable[[Blocks], Values]
    quantize_blocks: Callable[[Values], Blocks] | None = None  # None: the format can only be read


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
