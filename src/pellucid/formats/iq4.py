"""Four bits on an uneven grid: IQ4_NL and IQ4_XS.

One idea: most weights lie near zero, so the sixteen levels should too. A code is not the level
itself but an index into a fixed table of sixteen integers, fine near zero and coarse far from it.
The table and the layouts are ggml's.

Blocks are uint8 [n, B], values float32 [n, S]. These formats are only read: writing them needs a
search over each group.
"""

import numpy as np

from .base import BlockFormat, Blocks, Values, bit_planes, block_fields, block_scale

__all__ = ["IQ4_FORMATS", "IQ4_LEVELS"]

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

IQ4_NL_LAYOUT = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
IQ4_XS_LAYOUT = np.dtype(
    [("d", "<f2"), ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128)]
)


def _dequantize_iq4_nl(blocks: Blocks) -> Values:
    """32 values under one scale: value = d · level[q]. 18 bytes, 4.5 bits per value; laid out as
    Q4_0.

    byte  0    2                              17
         +----+--------------------------------+
         | d  | qs[16]: low nibbles q[0 … 15], |
         | f16|         high nibbles q[16 … 31]|
         +----+--------------------------------+
    """
    block = block_fields(blocks, IQ4_NL_LAYOUT)
    return block_scale(block["d"]) * _levels(bit_planes(block["qs"], 4, 16))


def _dequantize_iq4_xs(blocks: Blocks) -> Values:
    """256 values in 8 groups of 32 with 6-bit scales: value = d · (scale - 32) · level[q]. 136
    bytes, 4.25 bits per value.

    byte  0    2         4           8                           136
         +----+---------+-----------+---------------------------+
         | d  |scales_h | scales_l  | qs[128]                   |
         | f16|   [2]   |   [4]     |                           |
         +----+---------+-----------+---------------------------+
    scales_l:  the lower four bits of scale 0, 1, 2 …, each byte's low nibble first
    scales_h:  the upper two bits of scale 0, 1, 2 …, each byte's lowest bits first
    qs:        per 16 bytes one group, as in IQ4_NL
    """
    block = block_fields(blocks, IQ4_XS_LAYOUT)
    n = len(block)
    # [n, 8]
    scale = bit_planes(block["scales_l"], 4, 1) | bit_planes(block["scales_h"], 2, 1) << np.uint8(4)
    group_scale = block_scale(block["d"]) * (scale.view(np.int8) - np.int8(32))  # [n, 8]
    levels = _levels(bit_planes(block["qs"], 4, 16)).reshape(n, 8, 32)
    return (group_scale[:, :, None] * levels).reshape(n, 256)


def _levels(q: Blocks) -> Values:
    """The level of each code."""
    return np.array(IQ4_LEVELS, np.float32)[q]


IQ4_FORMATS = (
    BlockFormat("IQ4_NL", 20, 32, IQ4_NL_LAYOUT.itemsize, _dequantize_iq4_nl),
    BlockFormat("IQ4_XS", 23, 256, IQ4_XS_LAYOUT.itemsize, _dequantize_iq4_xs),
)
