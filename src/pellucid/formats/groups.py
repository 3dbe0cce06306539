"""Group-wise integers: the formats of GPTQ, AWQ and compressed-tensors checkpoints.

Each group of 32, 64 or 128 neighbouring inputs of a row has one float32 scale, and with a zero
point also that:

    INT4_G128    value = scale · (code - 8)      symmetric
    UINT4_G128   value = scale · (code - zero)   asymmetric

Codes are unsigned and packed as one stream of bits, the lowest first (`packing.py`). Scales are
float32, so those of every checkpoint, float16, bfloat16 or float32, are kept as they are. A product
scale · (code - zero) is rounded once. A file whose groups are longer repeats the scale.

INT8_ROW is int8 with one scale per row of at most MAX_ROW_INPUTS. Its activations are meant to be
quantized with one scale per token (W8A8).

GGUF files cannot hold these formats. Their numbers begin at 1000, which ggml does not use.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import BlockFormat, Blocks, Values, block_fields
from .packing import unpack_stream

__all__ = [
    "GROUP_FORMATS",
    "GROUP_SIZES",
    "INT8_ROW",
    "MAX_ROW_INPUTS",
    "group_blocks",
    "group_format",
    "row_blocks",
]

GROUP_SIZES = (32, 64, 128)
INT8_ROW = "INT8_ROW"
MAX_ROW_INPUTS = 65536  # of INT8_ROW: a sum of so many products fits into 32 bits
# (bits, whether there is a zero point); 2 and 3 bits always have one
KINDS = ((4, False), (4, True), (8, False), (8, True), (3, True), (2, True))


def group_format(bits: int, group_size: int, *, zeros: bool) -> str:
    """The name of the format with codes of `bits` in groups of `group_size`, with or without zero
    points.
    """
    return f"{'UINT' if zeros else 'INT'}{bits}_G{group_size}"


def group_blocks(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8] | None,
    format: BlockFormat,
) -> Blocks:
    """Rows of bytes [out, ·] of a group-wise format. `codes` are packed as a stream of bits, [out,
    in · bits / 8]; `scales` and `zeros` are [out, groups].
    """
    layout = _layouts[format.name]
    rows, groups = scales.shape
    blocks = np.empty((rows, groups), layout)
    blocks["scale"] = scales
    if zeros is not None:
        blocks["zero"] = zeros
    blocks["codes"] = codes.reshape(rows, groups, -1)
    return blocks.view(np.uint8).reshape(rows, -1)


def row_blocks(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Blocks:
    """Rows of bytes of INT8_ROW: int8 codes [out, in] and scales [out]."""
    heads = np.ascontiguousarray(scales[:, None], "<f4").view(np.uint8)
    return np.concatenate([heads, codes.view(np.uint8)], axis=1)


def _layout(bits: int, group_size: int, zeros: bool) -> np.dtype[np.void]:
    """A block: scale, zero point if any, codes."""
    zero: list[tuple[str, str]] = [("zero", "u1")] if zeros else []
    fields: list[Any] = [("scale", "<f4"), *zero, ("codes", "u1", group_size * bits // 8)]
    return np.dtype(fields)


def _decoder(layout: np.dtype[np.void], bits: int) -> Callable[[Blocks], Values]:
    """The function from blocks of this layout to values."""

    def dequantize_blocks(blocks: Blocks) -> Values:
        block = block_fields(blocks, layout)
        codes = unpack_stream(np.ascontiguousarray(block["codes"]), bits).astype(np.float32)
        names = layout.names or ()
        codes -= block["zero"][:, None] if "zero" in names else np.float32(1 << (bits - 1))
        values: Values = block["scale"][:, None] * codes
        return values

    return dequantize_blocks


def _decode_row_codes(blocks: Blocks) -> Values:
    """The codes of INT8_ROW, not yet times the scale of their row."""
    return blocks.view(np.int8).astype(np.float32)


_layouts = {
    group_format(bits, size, zeros=zeros): _layout(bits, size, zeros)
    for bits, zeros in KINDS
    for size in GROUP_SIZES
}
GROUP_FORMATS = (
    *(
        BlockFormat(
            group_format(bits, size, zeros=zeros),
            1000 + 10 * kind + place,
            size,
            _layout(bits, size, zeros).itemsize,
            _decoder(_layout(bits, size, zeros), bits),
        )
        for kind, (bits, zeros) in enumerate(KINDS)
        for place, size in enumerate(GROUP_SIZES)
    ),
    BlockFormat(INT8_ROW, 1100, 32, 32, _decode_row_codes, row_scale=True),
)
