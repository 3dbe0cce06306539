"""Four bits on an uneven grid: IQ4_NL and IQ4_XS.

Most weights lie near zero, so the sixteen levels should too. A code is not the level
itself but an index into a fixed table of sixteen integers, fine near zero and coarse far from it.
The table and the layouts are ggml's.

Blocks are uint8 [n, B], values float32 [n, S].
"""

import numpy as np

from .base import (
    BlockFormat,
    Blocks,
    Values,
    as_bytes,
    bit_planes,
    block_fields,
    block_scale,
    check_values,
    pack_planes,
    stored_scale,
)
from .importance import by_blocks
from .search import ALL_ZERO, Codes, Floats, first_extreme, nearest, sum_in_order

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
    return _LEVELS[q]


def _quantize_iq4_nl(values: Values, weights: Values | None) -> Blocks:
    """The best of fifteen scales. Codes are rounded with the scale before it becomes float16."""
    check_values(values, "IQ4_NL")
    scale = _search_scale(values, values * values if weights is None else weights)
    blocks = np.empty(len(values), IQ4_NL_LAYOUT)
    blocks["d"] = stored_scale(scale, "IQ4_NL")
    codes = _nearest_level(_inverse(scale)[:, None] * values)
    blocks["qs"] = pack_planes(codes.astype(np.uint8), 4, 16)
    return as_bytes(blocks)


def _quantize_iq4_xs(values: Values, weights: Values | None) -> Blocks:
    """The best scale of each group, quantized with one scale for all eight; then the codes."""
    check_values(values, "IQ4_XS")
    x = values.reshape(-1, 32)
    weighted = x * x if weights is None else weights.reshape(-1, 32)
    grouped = _search_scale(x, weighted).reshape(-1, 8)
    d = -first_extreme(grouped) / np.float32(
        32
    )  # not rounded to float16 before its use, as in ggml
    scales = np.clip(nearest(_inverse(d)[:, None] * grouped), -32, 31)  # [n, 8]
    inverse = _inverse(d[:, None] * scales.astype(np.float32))
    codes = _nearest_level(inverse.reshape(-1, 1) * x).reshape(-1, 256).astype(np.uint8)
    blocks = np.empty(len(values), IQ4_XS_LAYOUT)
    blocks["d"] = stored_scale(d, "IQ4_XS")
    packed = (scales + 32).astype(np.uint8)
    blocks["scales_l"] = pack_planes(packed & np.uint8(15), 4, 1)
    blocks["scales_h"] = pack_planes(packed >> np.uint8(4), 2, 1)
    blocks["qs"] = pack_planes(codes, 4, 16)
    return as_bytes(blocks)


def _search_scale(x: Floats, w: Floats) -> Floats:
    """The scale of each group of 32: [n, 32] -> [n]. Fifteen scales near those that map the extreme
    value to the first level are tried, as in quantize_row_iq4_nl_impl of ggml.
    """
    extreme = first_extreme(x)
    first = np.float32(IQ4_LEVELS[0])
    scale = best = np.zeros(len(x), np.float32)
    for trial in (None, *range(-7, 8)):
        inverse = (
            np.float32(1) / (-extreme / first)
            if trial is None
            else (np.float32(trial) + first) / extreme
        )
        q = _LEVELS[_nearest_level(inverse[:, None] * x)]
        wq = w * q
        sum_qx, sum_q2 = sum_in_order(wq * x), sum_in_order(wq * q)
        better = (sum_q2 > 0) & ((trial is None) | (sum_qx * sum_qx > best * sum_q2))
        fitted = sum_qx / sum_q2
        scale = np.where(better, fitted, scale)
        best = np.where(better, fitted * sum_qx, best)
    return np.where(np.abs(extreme) < ALL_ZERO, np.float32(0), scale)


def _nearest_level(x: Floats) -> Codes:
    """The code of the nearest level; of two that are equally near, the greater."""
    return np.searchsorted(_MIDPOINTS, x, side="right").astype(np.int32)


def _inverse(x: Floats) -> Floats:
    """1/x, and 0 where x is 0."""
    return np.where(x != 0, np.float32(1) / x, np.float32(0))


_LEVELS = np.array(IQ4_LEVELS, np.float32)
_MIDPOINTS = (_LEVELS[1:] + _LEVELS[:-1]) / np.float32(2)

IQ4_FORMATS = (
    BlockFormat(
        *("IQ4_NL", 20, 32, IQ4_NL_LAYOUT.itemsize),
        *(_dequantize_iq4_nl, _quantize_iq4_nl, by_blocks(32, 2.0)),
    ),
    BlockFormat(
        *("IQ4_XS", 23, 256, IQ4_XS_LAYOUT.itemsize),
        *(_dequantize_iq4_xs, _quantize_iq4_xs, by_blocks(256, 2.0)),
    ),
)
