"""Defines how a KV cache of each dtype rounds keys and values: a function from the numbers written
to the numbers read back.

A cache dtype is a rounding. `f32` does not round, `f16` rounds to the nearest half. The others
scale by the largest number of a group and round to integers: x ≈ scale · code, with the scale
itself in float16.

    int8    one group per token and head: scale = max |x| / 127, code in -127 … 127
    int4    groups of 32 dimensions: scale = (the x of the largest |x|) / -8, code in -8 … 7

So the number of largest magnitude in an int4 group is exactly -8 · scale, up to the scale's own
rounding.

Keys have a few dimensions with much larger numbers than the others, which would round to 0 in 4
bits. So int4 first rotates keys by a Hadamard matrix, which spreads the large numbers over all
dimensions (QuaRot, Ashkboos et al., arXiv:2404.00456). The matrix is its own inverse, and q·k does
not change if both are rotated. Values have no such dimensions, and are not rotated. Every step is
one float32 operation, so that kernels can do the same.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ...ops.kv_dtypes import KV_GROUP

__all__ = ["KV_DTYPES", "rotate", "round_trip"]

KV_DTYPES = ("f32", "f16", "int8", "int4")

Array = NDArray[np.float32]


def round_trip(x: Array, dtype: str, *, keys: bool) -> Array:
    """Keys or values [..., D] as they are read back from a cache."""
    if dtype == "f32":
        return x
    # NaN stays NaN, and numbers too large for float16 become infinite
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if dtype == "f16":
            return x.astype(np.float16).astype(np.float32)
        if dtype == "int8":
            return _quantize(x, np.abs(x).max(axis=-1, keepdims=True) / np.float32(127), -127, 127)
        groups = (rotate(x) if keys else x).reshape(*x.shape[:-1], -1, KV_GROUP)
        at = np.abs(groups).argmax(axis=-1, keepdims=True)
        largest = np.take_along_axis(groups, at, axis=-1)
        kept = _quantize(groups, largest / np.float32(-8), -8, 7).reshape(x.shape)
    return rotate(kept) if keys else kept


def _quantize(x: Array, scale: Array, least: int, most: int) -> Array:
    kept: Array = scale.astype(np.float16).astype(np.float32)
    codes = np.where(kept == 0, np.float32(0), np.rint(x / kept))
    return np.clip(codes, least, most).astype(np.float32) * kept


def rotate(x: Array) -> Array:
    """x · H / sqrt(n) over the last axis, H the Hadamard matrix of the largest power of two n that
    divides it: its own inverse.
    """
    n = x.shape[-1] & -x.shape[-1]
    half, turned = 1, x
    while half < n:
        pairs = turned.reshape(*x.shape[:-1], -1, 2, half)
        turned = np.stack(
            (pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), axis=-2
        ).reshape(x.shape)
        half *= 2
    scaled: Array = turned * np.float32(1 / math.sqrt(n))
    return scaled
