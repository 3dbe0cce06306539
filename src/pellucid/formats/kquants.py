"""The k-quants: 256 values share one or two float16 scales, which scale small integer scales of 16
or 32 values each.

Scales are quantized too. A super-block has one float16 d, and each of its groups has a 4-
to 8-bit multiple of it, so a scale for a group of 16 costs half a bit per value. Where there are
minima, dmin scales them in the same way. A value is

    d · scale[group] · q  -  dmin · min[group]          Q2_K  Q4_K  Q5_K
    d · scale[group] · (q - half)                       Q3_K  Q6_K

Blocks are uint8 [n, B], values float32 [n, 256]. The layouts are ggml's; `bit_planes` in base.py
explains how codes lie in bytes. `kquants_encode.py` chooses scales and codes.
"""

import numpy as np
from numpy.typing import NDArray

from .base import BlockFormat, Blocks, Values, bit_planes, block_fields, block_scale
from .importance import as_given, by_blocks
from .kquants_encode import (
    quantize_q2_k,
    quantize_q3_k,
    quantize_q4_k,
    quantize_q5_k,
    quantize_q6_k,
)
from .kquants_layout import Q2_K_LAYOUT, Q3_K_LAYOUT, Q4_K_LAYOUT, Q5_K_LAYOUT, Q6_K_LAYOUT

__all__ = ["K_QUANT_FORMATS"]


def _dequantize_q2_k(blocks: Blocks) -> Values:
    """Two bits: 16 groups of 16, each with a 4-bit scale and a 4-bit minimum. 84 bytes, 2.625 bits
    per value.

    byte  0            16                        80   82   84
         +------------+-------------------------+----+----+
         | scales[16] | qs[64]                  | d  |dmin|
         +------------+-------------------------+----+----+
    scales[g]:  mmmm ssss     min and scale of group g
    qs:         per 32 bytes, four planes of 32 values
    """
    block = block_fields(blocks, Q2_K_LAYOUT)
    scale = block_scale(block["d"]) * (block["scales"] & np.uint8(15))  # [n, 16]
    minimum = block_scale(block["dmin"]) * (block["scales"] >> np.uint8(4))  # [n, 16]
    return _scaled(scale, bit_planes(block["qs"], 2, 32), minimum)


def _dequantize_q3_k(blocks: Blocks) -> Values:
    """Three bits, symmetric: value = d · (scale - 32) · (q - 4); 16 groups of 16 with 6-bit scales.
    110 bytes, 3.4375 bits per value.

    byte  0           32                    96           108  110
         +-----------+---------------------+------------+----+
         | hmask[32] | qs[64]              | scales[12] | d  |
         +-----------+---------------------+------------+----+
    qs:      the lower two bits of q: per 32 bytes, four planes of 32 values
    hmask:   the third bit: eight planes of 32 values
    scales:  bytes 0 … 7 hold the lower four bits of 16 scales in two planes of 8,
             bytes 8 … 11 the upper two bits in four planes of 4
    """
    block = block_fields(blocks, Q3_K_LAYOUT)
    # [n, 16] each
    low, high = bit_planes(block["scales"][:, :8], 4, 8), bit_planes(block["scales"][:, 8:], 2, 4)
    # [n, 16]
    scale = block_scale(block["d"]) * ((low | high << np.uint8(4)).view(np.int8) - np.int8(32))
    q = bit_planes(block["hmask"], 1, 32) << np.uint8(2)
    q |= bit_planes(block["qs"], 2, 32)
    return _scaled(scale, q.view(np.int8) - np.int8(4))


def _dequantize_q4_k(blocks: Blocks) -> Values:
    """Four bits: 8 groups of 32, each with a 6-bit scale and a 6-bit minimum. 144 bytes, 4.5 bits
    per value.

    byte  0    2    4            16                              144
         +----+----+------------+-------------------------------+
         | d  |dmin| scales[12] | qs[128]                       |
         +----+----+------------+-------------------------------+
    scales:  see `_scales_and_minima`
    qs:      per 32 bytes, two planes of 32 values: one group each
    """
    block = block_fields(blocks, Q4_K_LAYOUT)
    scale, minimum = _scales_and_minima(block["scales"])
    return _scaled(
        block_scale(block["d"]) * scale,
        bit_planes(block["qs"], 4, 32),
        block_scale(block["dmin"]) * minimum,
    )


def _dequantize_q5_k(blocks: Blocks) -> Values:
    """Five bits: Q4_K with a fifth bit. 176 bytes, 5.5 bits per value.

    byte  0    2    4            16         48                       176
         +----+----+------------+----------+------------------------+
         | d  |dmin| scales[12] | qh[32]   | qs[128]                |
         +----+----+------------+----------+------------------------+
    qh:  the fifth bit: eight planes of 32 values, one group each
    """
    block = block_fields(blocks, Q5_K_LAYOUT)
    scale, minimum = _scales_and_minima(block["scales"])
    q = bit_planes(block["qh"], 1, 32) << np.uint8(4)
    q |= bit_planes(block["qs"], 4, 32)
    return _scaled(block_scale(block["d"]) * scale, q, block_scale(block["dmin"]) * minimum)


def _dequantize_q6_k(blocks: Blocks) -> Values:
    """Six bits, symmetric: value = d · scale · (q - 32); 16 groups of 16 with int8 scales. 210
    bytes, 6.5625 bits per value.

    byte  0                     128           192          208  210
         +---------------------+-------------+------------+----+
         | ql[128]             | qh[64]      | scales[16] | d  |
         +---------------------+-------------+------------+----+
    ql:  the lower four bits: per 64 bytes, two planes of 64 values
    qh:  the upper two bits: per 32 bytes, four planes of 32 values
    """
    block = block_fields(blocks, Q6_K_LAYOUT)
    q = bit_planes(block["qh"], 2, 32) << np.uint8(4)
    q |= bit_planes(block["ql"], 4, 64)
    return _scaled(block_scale(block["d"]) * block["scales"], q.view(np.int8) - np.int8(32))


def _scales_and_minima(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Eight 6-bit scales s and eight 6-bit minima m from 12 bytes, [n, 12] -> [n, 8] each. The
    first four of each lie in bytes 0 … 7, whose two spare bits hold the upper bits of the last
    four:

        bytes 0 … 3    s[4+i] bits 4-5 | s[i]
        bytes 4 … 7    m[4+i] bits 4-5 | m[i]
        bytes 8 … 11   m[4+i] bits 0-3 | s[4+i] bits 0-3
    """
    s, m, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate(
        [s & np.uint8(63), (s >> np.uint8(6)) << np.uint8(4) | low & np.uint8(15)], axis=1
    )
    minima = np.concatenate(
        [m & np.uint8(63), (m >> np.uint8(6)) << np.uint8(4) | low >> np.uint8(4)], axis=1
    )
    return scales, minima


def _scaled(
    scale: Values, q: NDArray[np.uint8] | NDArray[np.int8], minimum: Values | None = None
) -> Values:
    """scale [n, G] · q [n, 256] - minimum [n, G], each of the G groups with its own -> [n, 256]."""
    n, groups = scale.shape
    values = scale[:, :, None] * q.reshape(n, groups, -1)  # [n, G, 256 / G]
    if minimum is not None:
        values -= minimum[:, :, None]
    return values.reshape(n, -1)


K_QUANT_FORMATS = (
    BlockFormat(
        *("Q2_K", 10, 256, Q2_K_LAYOUT.itemsize),
        *(_dequantize_q2_k, quantize_q2_k, by_blocks(256, 1.0)),
    ),
    BlockFormat(
        *("Q3_K", 11, 256, Q3_K_LAYOUT.itemsize),
        *(_dequantize_q3_k, quantize_q3_k, by_blocks(256, 2.0)),
    ),
    BlockFormat(
        *("Q4_K", 12, 256, Q4_K_LAYOUT.itemsize),
        *(_dequantize_q4_k, quantize_q4_k, by_blocks(256, 2.0)),
    ),
    BlockFormat(
        *("Q5_K", 13, 256, Q5_K_LAYOUT.itemsize),
        *(_dequantize_q5_k, quantize_q5_k, by_blocks(256, 2.0)),
    ),
    BlockFormat(
        *("Q6_K", 14, 256, Q6_K_LAYOUT.itemsize), *(_dequantize_q6_k, quantize_q6_k, as_given)
    ),
)
