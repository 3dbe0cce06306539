"""The searches of ggml's quantizers: the best scale (and minimum) and the codes of each group.

A search tries some scales, rounds the group with each, and keeps the one with the smallest weighted
squared error. Weights w say how much each value matters. All functions work on n groups at once:
values x and weights w are float32 [n, S], results are float32 [n] and codes [n, S].

The results equal ggml's bit for bit, so every sum runs in the order of the values, in float32, and
no product is fused with a sum. The order of the factors matters too: w · l · x is (w · l) · x.
Reference: make_qx_quants, make_q3_quants, make_qp_quants, make_qkx2_quants and make_qkx3_quants in
ggml/src/ggml-quants.c of llama.cpp. This module knows no layout.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ALL_ZERO",
    "WEIGHTED_TRIALS",
    "Codes",
    "Floats",
    "first_extreme",
    "nearest",
    "search_min",
    "search_positive",
    "search_symmetric",
    "search_symmetric_descent",
    "sum_in_order",
    "value_range",
]

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]

ALL_ZERO = np.float32(1e-15)  # a group whose values are all smaller is stored as zeros
# the trials of `search_min` for all formats, where the importance of columns is known
WEIGHTED_TRIALS = (-0.9, 0.05, 36)
_MAX_SWEEPS = 5  # of coordinate descent
# adding 1.5 · 2^23 to a float32 leaves its nearest integer, ties to even, in the low mantissa bits
_MAGIC = np.float32(12582912)


def nearest(x: Floats) -> Codes:
    """The nearest integers, ties to even, for |x| < 2^22. Beyond that, and for NaN, what ggml's
    nearest_int gives.
    """
    bits = (x + _MAGIC).view(np.int32)
    bits &= np.int32(0x007FFFFF)
    bits -= np.int32(0x00400000)
    return bits


def sum_in_order(x: Floats) -> Floats:
    """The sums over the last axis, added one after another from 0. [n, S] -> [n]"""
    total: Floats = np.add.accumulate(x, axis=-1, dtype=np.float32)[..., -1]
    return total + np.float32(0)  # the sum of -0 alone is 0


def first_extreme(x: Floats) -> Floats:
    """The value of largest magnitude of each group, with its sign; the first of equals. [n]"""
    found: Floats = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    return found + np.float32(0)  # of zeros alone: 0, not -0


def value_range(x: Floats) -> tuple[Floats, Floats]:
    """The smallest and the largest value of each group; of 0 and -0 the first. [n] each"""
    low: Floats = np.take_along_axis(x, x.argmin(axis=1)[:, None], axis=1)[:, 0]
    high: Floats = np.take_along_axis(x, x.argmax(axis=1)[:, None], axis=1)[:, 0]
    return low, high


def search_min(
    x: Floats, w: Floats, largest: int, trials: tuple[float, float, int], *, absolute: bool = False
) -> tuple[Floats, Floats, Codes]:
    """x ≈ scale · code - minimum, codes in 0 … largest, minimum >= 0: (scale, minimum, codes).

    Trial i of `trials` (first, step, last) rounds with a scale for a range of largest + first +
    step · i steps, then fits scale and minimum to these codes by least squares. The fit with the
    smallest error wins. `absolute`: the error is the sum of magnitudes instead of squares.
    """
    first, step, last = np.float32(trials[0]), np.float32(trials[1]), trials[2]
    low, high = value_range(x)
    low = np.where(low > 0, np.float32(0), low)
    sum_w, sum_x = sum_in_order(w), sum_in_order(w * x)
    flat = high <= low
    # the whole range, as it is
    inverse: Floats = np.float32(largest) / (high - low)
    scale: Floats = np.float32(1) / inverse
    codes = _codes(inverse, x, low, largest)
    best = _error(x, w, scale, low, codes, absolute)
    for trial in range(last + 1):
        # round
        inverse = (first + step * np.float32(trial) + np.float32(largest)) / (high - low)
        tried = _codes(inverse, x, low, largest)
        # fit
        l = tried.astype(np.float32)
        wl = w * l
        sum_l, sum_l2, sum_xl = sum_in_order(wl), sum_in_order(wl * l), sum_in_order(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale: Floats = np.divide(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_low: Floats = np.divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        above = new_low > 0
        new_scale = np.where(above, sum_xl / sum_l2, new_scale)
        new_low = np.where(above, np.float32(0), new_low)
        # keep it where it is better; the next trials start from its minimum
        error = _error(x, w, new_scale, new_low, tried, absolute)
        better = (determinant > 0) & (error < best)
        best = np.where(better, error, best)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
        codes = np.where(better[:, None], tried, codes)
    codes[flat] = 0
    return np.where(flat, np.float32(0), scale), -low, codes


def search_symmetric(x: Floats, w: Floats, half: int) -> tuple[Floats, Codes]:
    """x ≈ scale · (code - half), codes in 0 … 2 half - 1: (scale, codes). Nineteen scales near the
    one that maps the extreme value to code 0 are tried.
    """
    extreme = first_extreme(x)
    zero = np.abs(extreme) < ALL_ZERO
    wx = w * x
    scale = np.zeros(len(x), np.float32)
    best, codes = scale, np.zeros(x.shape, np.int32)
    for trial in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(half) + np.float32(0.1) * np.float32(trial)) / extreme
        tried = np.clip(nearest(inverse[:, None] * x), -half, half - 1)
        l = tried.astype(np.float32)
        sum_lx, sum_l2 = sum_in_order(wx * l), sum_in_order(w * l * l)
        if trial == 0:
            better = np.ones(len(x), bool)
            fitted = np.where(sum_l2 != 0, sum_lx / sum_l2, np.float32(0))
        else:
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
            fitted = sum_lx / sum_l2
        scale = np.where(better, fitted, scale)
        best = np.where(better, fitted * sum_lx, best)
        codes = np.where(better[:, None], tried, codes)
    codes += np.int32(half)
    codes[zero] = 0
    return np.where(zero, np.float32(0), scale), codes


def search_symmetric_descent(x: Floats, half: int) -> tuple[Floats, Codes]:
    """x ≈ scale · (code - half), weighted by x²: (scale, codes). Rounds once, then changes single
    codes while that lowers the error.
    """
    extreme = first_extreme(x)
    zero = np.abs(extreme) < ALL_ZERO
    w = x * x
    inverse = np.float32(-half) / extreme
    codes = np.clip(nearest(inverse[:, None] * x), -half, half - 1)
    scale = _descend(x, w, codes, -half, half - 1, needs_both=False)
    codes += np.int32(half)
    codes[zero] = 0
    return np.where(zero, np.float32(0), scale), codes


def search_positive(x: Floats, w: Floats, largest: int) -> tuple[Floats, Codes]:
    """x ≈ scale · code for x >= 0, codes in 0 … largest: (scale, codes). Nine scales are tried,
    then single codes are changed while that lowers the error.
    """
    extreme = np.maximum(x.max(axis=1), np.float32(0))
    zero = extreme < ALL_ZERO
    inverse: Floats = np.float32(largest) / extreme
    best_inverse = inverse
    best = np.zeros(len(x), np.float32)
    for trial in (0, *range(-4, 0), *range(1, 5)):
        if trial:
            inverse = (np.float32(0.1) * np.float32(trial) + np.float32(largest)) / extreme
        tried = np.minimum(nearest(inverse[:, None] * x), largest)
        diff = x - (np.float32(1) / inverse)[:, None] * tried.astype(np.float32)
        error = sum_in_order(w * diff * diff)
        better = error < best if trial else np.ones(len(x), bool)
        best = np.where(better, error, best)
        best_inverse = np.where(better, inverse, best_inverse)
    codes = np.minimum(nearest(best_inverse[:, None] * x), largest)
    scale = _descend(x, w, codes, None, largest, needs_both=True)
    codes[zero] = 0
    return np.where(zero, np.float32(0), scale), codes


def _descend(
    x: Floats, w: Floats, codes: Codes, smallest: int | None, largest: int, *, needs_both: bool
) -> Floats:
    """Coordinate descent on `codes`, which it changes: the scale that fits them best. A sweep takes
    each value out of the fit, and gives it the best code for the scale of the others.
    """
    wx = w * x
    l = codes.astype(np.float32)
    sum_lx, sum_l2 = sum_in_order(wx * l), sum_in_order(w * l * l)
    for _ in range(_MAX_SWEEPS):
        changed = False
        for i in range(x.shape[1]):
            xi, wi, wxi, old = x[:, i], w[:, i], wx[:, i], codes[:, i]
            l = old.astype(np.float32)
            lx, l2 = sum_lx - wxi * l, sum_l2 - wi * l * l
            new = np.minimum(nearest(np.divide(xi * l2, lx)), largest)
            if smallest is not None:
                new = np.maximum(new, smallest)
            l = new.astype(np.float32)
            new_lx, new_l2 = lx + wxi * l, l2 + wi * l * l
            better = (lx > 0) & ((l2 if needs_both else new_l2) > 0) & (new != old)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            codes[:, i] = np.where(better, new, old)
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
            changed = changed or bool(better.any())
        if not changed:
            break
    return np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))


def _codes(inverse: Floats, x: Floats, low: Floats, largest: int) -> Codes:
    return np.clip(nearest(inverse[:, None] * (x - low[:, None])), 0, largest)


def _error(
    x: Floats, w: Floats, scale: Floats, low: Floats, codes: Codes, absolute: bool
) -> Floats:
    """The weighted error of each group. [n]"""
    diff = scale[:, None] * codes.astype(np.float32) + low[:, None] - x
    measured: NDArray[Any] = np.abs(diff) if absolute else diff * diff
    return sum_in_order(w * measured)
