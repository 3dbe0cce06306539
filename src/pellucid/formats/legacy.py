"""The plain formats: dense floats, and ggml's first five formats, which have one scale per 32
values (some also a minimum).

One idea: 32 neighbours in a row have similar magnitudes, so they share one float16 scale d, and
each value becomes a small integer q. The formats whose name ends in _0 are symmetric, value = d · q
with a signed q; those in _1 have an offset as well, value = d · q + m. Layouts and rounding are
ggml's, bit for bit. Blocks are uint8 [n, B], values float32 [n, 32].

Without weights, a scale is fitted to the extreme values of its block, and values are divided by it
before it is rounded to float16. With weights, the best scale is searched (`search.py`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from .base import (
    BlockFormat,
    Blocks,
    Values,
    as_bytes,
    bit_planes,
    block_fields,
    block_scale,
    check_values,
    stored_scale,
)
from .importance import by_row
from .search import WEIGHTED_TRIALS, first_extreme, search_min, search_symmetric, value_range

__all__ = ["LEGACY_FORMATS"]

Q4_0_LAYOUT = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q4_1_LAYOUT = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q5_0_LAYOUT = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q5_1_LAYOUT = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q8_0_LAYOUT = np.dtype([("d", "<f2"), ("qs", "i1", 32)])


# Dense floats: a block is one value.


def _dequantize_f32(blocks: Blocks) -> Values:
    """float32, as it is."""
    return blocks.view("<f4").astype(np.float32, copy=False)


def _quantize_f32(values: Values, _weights: Values | None) -> Blocks:
    """float32, as it is."""
    return values.astype("<f4").view(np.uint8)


def _dequantize_f16(blocks: Blocks) -> Values:
    """IEEE half: 1 sign, 5 exponent and 10 mantissa bits; up to 65504."""
    return blocks.view("<f2").astype(np.float32)


def _quantize_f16(values: Values, _weights: Values | None) -> Blocks:
    """To the nearest half, ties to even. Raises FormatError for a finite value beyond its range."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.array_equal(np.isfinite(halves), np.isfinite(values)):
        raise FormatError(
            f"F16 cannot hold the value {np.abs(values[np.isfinite(values)]).max():g}; the "
            "largest it can is 65504"
        )
    return halves.view(np.uint8)


def _dequantize_bf16(blocks: Blocks) -> Values:
    """bfloat16 is the upper half of a float32:

    31 30      23 22     16 15              0
    +-+----------+---------+-----------------+
    |s| exponent |mantissa | dropped: zeros  |
    +-+----------+---------+-----------------+
    """
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _quantize_bf16(values: Values, _weights: Values | None) -> Blocks:
    """To the nearest, ties to even: add half of the last kept bit, minus one if that bit is 0, and
    truncate. A NaN stays a (quiet) NaN.
    """
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = bits.astype(np.uint64) + np.uint64(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    upper = (rounded >> np.uint64(16)).astype("<u2")
    quiet_nan = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype("<u2")
    return np.where(np.isnan(values), quiet_nan, upper).view(np.uint8)


# Blocks of 32.


def _dequantize_q4_0(blocks: Blocks) -> Values:
    """Four bits, symmetric: value = d · (q - 8), q in 0 … 15. 18 bytes, 4.5 bits per value.

    byte  0    2                              17
         +----+--------------------------------+
         | d  | qs[16]: low nibbles q[0 … 15], |
         | f16|         high nibbles q[16 … 31]|
         +----+--------------------------------+
    """
    block = block_fields(blocks, Q4_0_LAYOUT)
    q = bit_planes(block["qs"], 4, 16).view(np.int8)
    q -= np.int8(8)
    return block_scale(block["d"]) * q


def _quantize_q4_0(values: Values, weights: Values | None) -> Blocks:
    """The value of largest magnitude becomes q = 0, that is -8, the longer end of the range; d gets
    its sign. With weights, d is searched.
    """
    d, q = _symmetric(values, weights, 8, "Q4_0")
    blocks = np.empty(len(values), Q4_0_LAYOUT)
    blocks["d"] = _halves(d, "Q4_0")
    blocks["qs"] = _nibbles(q)
    return as_bytes(blocks)


def _dequantize_q4_1(blocks: Blocks) -> Values:
    """Four bits with a minimum: value = d · q + m, q in 0 … 15. 20 bytes, 5 bits per value.

    byte  0    2    4                              19
         +----+----+--------------------------------+
         | d  | m  | qs[16], as in Q4_0             |
         +----+----+--------------------------------+
    """
    block = block_fields(blocks, Q4_1_LAYOUT)
    values = block_scale(block["d"]) * bit_planes(block["qs"], 4, 16)
    values += block_scale(block["m"])
    return values


def _quantize_q4_1(values: Values, weights: Values | None) -> Blocks:
    """The smallest value becomes q = 0, the largest q = 15. With weights, d and m are searched."""
    d, m, q = _with_minimum(values, weights, 15, "Q4_1")
    blocks = np.empty(len(values), Q4_1_LAYOUT)
    blocks["d"], blocks["m"] = _halves(d, "Q4_1"), _halves(m, "Q4_1")
    blocks["qs"] = _nibbles(q)
    return as_bytes(blocks)


def _dequantize_q5_0(blocks: Blocks) -> Values:
    """Five bits, symmetric: value = d · (q - 16), q in 0 … 31. 22 bytes, 5.5 bits per value.

        byte  0    2         6                              21
             +----+---------+--------------------------------+
             | d  | qh[4]   | qs[16]: the lower four bits,   |
             | f16| fifths  |         as in Q4_0             |
             +----+---------+--------------------------------+

    Bit j of qh, read as a little-endian 32-bit word, is the fifth bit of q[j].
    """
    block = block_fields(blocks, Q5_0_LAYOUT)
    q = _five_bits(block).view(np.int8)
    q -= np.int8(16)
    return block_scale(block["d"]) * q


def _quantize_q5_0(values: Values, weights: Values | None) -> Blocks:
    """As Q4_0, with -16 in place of -8."""
    d, q = _symmetric(values, weights, 16, "Q5_0")
    blocks = np.empty(len(values), Q5_0_LAYOUT)
    blocks["d"] = _halves(d, "Q5_0")
    blocks["qh"], blocks["qs"] = _fifths(q), _nibbles(q)
    return as_bytes(blocks)


def _dequantize_q5_1(blocks: Blocks) -> Values:
    """Five bits with a minimum: value = d · q + m, q in 0 … 31. 24 bytes, 6 bits per value.

    byte  0    2    4         8                        23
         +----+----+---------+---------------------------+
         | d  | m  | qh[4]   | qs[16], both as in Q5_0   |
         +----+----+---------+---------------------------+
    """
    block = block_fields(blocks, Q5_1_LAYOUT)
    values = block_scale(block["d"]) * _five_bits(block)
    values += block_scale(block["m"])
    return values


def _quantize_q5_1(values: Values, weights: Values | None) -> Blocks:
    """As Q4_1, with 31 in place of 15."""
    d, m, q = _with_minimum(values, weights, 31, "Q5_1")
    blocks = np.empty(len(values), Q5_1_LAYOUT)
    blocks["d"], blocks["m"] = _halves(d, "Q5_1"), _halves(m, "Q5_1")
    blocks["qh"], blocks["qs"] = _fifths(q), _nibbles(q)
    return as_bytes(blocks)


def _dequantize_q8_0(blocks: Blocks) -> Values:
    """Eight bits, symmetric: value = d · q, q in -127 … 127. 34 bytes, 8.5 bits per value.

    byte  0    2                              33
         +----+--------------------------------+
         | d  | qs[32]: int8, in order         |
         +----+--------------------------------+
    """
    block = block_fields(blocks, Q8_0_LAYOUT)
    values: Values = block_scale(block["d"]) * block["qs"]
    return values


def _quantize_q8_0(values: Values, _weights: Values | None) -> Blocks:
    """The largest magnitude becomes 127; halves are rounded away from zero."""
    d = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = _reciprocal(d, "Q8_0") * values
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    whole += np.floor(np.float32(2) * (magnitude - whole))  # + 1 if the rest is a half or more
    blocks = np.empty(len(values), Q8_0_LAYOUT)
    blocks["d"] = _halves(d, "Q8_0")
    blocks["qs"] = np.sign(scaled) * whole
    return as_bytes(blocks)


# Functions that these formats share.


def _five_bits(block: NDArray[Any]) -> NDArray[np.uint8]:
    """q in 0 … 31, [n, 32], from the fields qs and qh."""
    fifth = np.unpackbits(block["qh"], axis=1, bitorder="little")  # [n, 32]
    fifth <<= np.uint8(4)
    fifth |= bit_planes(block["qs"], 4, 16)
    return fifth


def _symmetric(
    values: Values, weights: Values | None, half: int, name: str
) -> tuple[Values, NDArray[np.uint8]]:
    """(d [n, 1], q [n, 32] in 0 … 2 half - 1) with value = d · (q - half)."""
    if weights is not None:
        check_values(values, name)
        scale, codes = search_symmetric(values, weights, half)
        return scale[:, None], codes.astype(np.uint8)
    d = first_extreme(values)[:, None] / np.float32(-half)
    q = _reciprocal(d, name) * values + np.float32(half + 0.5)
    return d, _truncate(q, 2 * half - 1)


def _with_minimum(
    values: Values, weights: Values | None, steps: int, name: str
) -> tuple[Values, Values, NDArray[np.uint8]]:
    """(d [n, 1], m [n, 1], q [n, 32] in 0 … steps) with value = d · q + m."""
    if weights is not None:
        check_values(values, name)
        scale, minimum, codes = search_min(values, weights, steps, WEIGHTED_TRIALS)
        return scale[:, None], -minimum[:, None], codes.astype(np.uint8)
    d, m = _range(values, steps)
    return d, m, _truncate(_reciprocal(d, name) * (values - m) + np.float32(0.5), steps)


def _range(values: Values, steps: int) -> tuple[Values, Values]:
    """(size of a step, minimum) of each block whose range is cut into `steps`. [n, 1] each"""
    low, high = value_range(values)
    # a range of infinite length is refused by _reciprocal
    with np.errstate(over="ignore", invalid="ignore"):
        return ((high - low) / np.float32(steps))[:, None], low[:, None]


def _reciprocal(d: Values, name: str) -> Values:
    """1/d, or 0 if d is 0 or so small that 1/d is infinite; such a block is stored as zeros. [n,
    1]
    """
    check_values(d, name)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isinf(inverse), np.float32(0), inverse)


def _truncate(x: Values, largest: int) -> NDArray[np.uint8]:
    """x >= 0 without its fraction, at most `largest`. Callers add a half before, so that it rounds
    to the nearest.
    """
    return np.minimum(x, np.float32(largest)).astype(np.uint8)


def _halves(x: Values, name: str) -> NDArray[np.float16]:
    """Scales or minima [n, 1] as they are stored, float16 [n]."""
    return stored_scale(x[:, 0], name)


def _nibbles(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The lower four bits of q [n, 32]: those of q[j] and q[j + 16] share byte j. [n, 16]"""
    return (q[:, :16] & np.uint8(15)) | (q[:, 16:] << np.uint8(4))


def _fifths(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The fifth bits of q [n, 32], one after another. [n, 4]"""
    return np.packbits(q >> np.uint8(4), axis=1, bitorder="little")


LEGACY_FORMATS = (
    BlockFormat("F32", 0, 1, 4, _dequantize_f32, _quantize_f32),
    BlockFormat("F16", 1, 1, 2, _dequantize_f16, _quantize_f16),
    BlockFormat("BF16", 30, 1, 2, _dequantize_bf16, _quantize_bf16),
    BlockFormat(
        *("Q4_0", 2, 32, Q4_0_LAYOUT.itemsize), *(_dequantize_q4_0, _quantize_q4_0, by_row)
    ),
    BlockFormat(
        *("Q4_1", 3, 32, Q4_1_LAYOUT.itemsize), *(_dequantize_q4_1, _quantize_q4_1, by_row)
    ),
    BlockFormat(
        *("Q5_0", 6, 32, Q5_0_LAYOUT.itemsize), *(_dequantize_q5_0, _quantize_q5_0, by_row)
    ),
    BlockFormat(
        *("Q5_1", 7, 32, Q5_1_LAYOUT.itemsize), *(_dequantize_q5_1, _quantize_q5_1, by_row)
    ),
    BlockFormat("Q8_0", 8, 32, Q8_0_LAYOUT.itemsize, _dequantize_q8_0, _quantize_q8_0),
)
