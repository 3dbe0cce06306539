"""GPTQ: rounds a weight column by column, and lets the columns that follow make up for each error.

The loss of a linear layer's weight W is the squared error of its output over the calibration text,

    tr((W - Ŵ) H (W - Ŵ)ᵀ)        H = X Xᵀ / T, X its input [in, T]

When column i is rounded with the error e, the best change of the columns not yet rounded is
-e · U[i, i+1:] / U[i, i], where H⁻¹ = Uᵀ U and U is upper triangular (Frantar et al.,
arXiv:2210.17323). The work is done in blocks of columns, so that most of it is matrix products (the
paper's lazy batches). With `act_order`, columns with large inputs are rounded first.

Shapes: R rows (outputs), n columns (inputs). Weights are worked on transposed, [n, R], so that a
column is contiguous. This module has no model, no file and no block format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, FormatError

__all__ = [
    "Factor",
    "GroupedCodes",
    "factorize",
    "feed_back",
    "float16_scales",
    "gptq",
    "round_to_nearest",
]

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.uint8]
# (place in the order, values [R] of that column) -> the numbers that they become
RoundColumn: TypeAlias = Callable[[int, Floats], Floats]

BLOCK = 128  # columns between two matrix products
_FIRST_DAMPING = 1e-4  # times the mean of the diagonal, where less was not enough
_LARGEST_DAMPING = 10.0  # with that, H is far from singular
_SMALLEST_SCALE = 1e-8
_SMALL = 64  # a matrix that is not cut further


@dataclass(frozen=True, slots=True)
class Factor:
    """A Hessian that is ready for `feed_back`."""

    order: NDArray[np.int64]  # [n]: the column that is rounded first, second, …
    upper: Floats  # U [n, n], rows and columns in this order


def factorize(hessian: Doubles, *, act_order: bool, damping: float = 0.01) -> Factor:
    """Order the columns, add `damping` times the mean of the diagonal to it, and factorize. If the
    Hessian is not positive definite, more is added.

    A column whose input was always 0 gets the mean as its diagonal: any value is as good there.
    """
    if not 0 <= damping <= _LARGEST_DAMPING:
        raise ConfigError(f"damping is {damping}; it must be from 0 to {_LARGEST_DAMPING:g}")
    damaged = ConfigError("a Hessian is not positive definite; the calibration text is damaged")
    if not np.isfinite(hessian).all():
        raise damaged
    diagonal = np.diag(hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    ordered = hessian[np.ix_(order, order)]
    mean = float(diagonal.mean()) or 1.0
    dead = np.flatnonzero(np.diag(ordered) == 0)
    ordered[dead, dead] = mean
    while True:
        damped = ordered.copy()
        damped[np.diag_indices(len(damped))] += damping * mean
        try:
            # H = V Vᵀ with V upper triangular: the Cholesky factor of H in reversed order. Then
            # H⁻¹ = V⁻ᵀ V⁻¹, so U = V⁻¹
            upper = _inverse_factor(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            if damping >= _LARGEST_DAMPING:
                raise damaged from None
            damping = min(max(10 * damping, _FIRST_DAMPING), _LARGEST_DAMPING)
            continue
        return Factor(order, upper.astype(np.float32))


def _inverse_factor(matrix: Doubles) -> Doubles:
    """The inverse of the Cholesky factor of a symmetric matrix, by halves:

    (A Bᵀ)   (K  ) (K  )ᵀ          (K  )⁻¹   (K⁻¹             )
    (B C ) = (X M) (X M)    and    (X M)   = (-M⁻¹ X K⁻¹   M⁻¹)

    where X = B K⁻ᵀ, and M is the factor of C - X Xᵀ. Raises LinAlgError if the matrix is not
    positive definite.

    Nearly all work is matrix products. LAPACK's factor of a large matrix differs in the last bits
    with the number of threads, and a quantized file must not.
    """
    n = len(matrix)
    if n <= _SMALL:
        return np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
    half = n // 2
    inverse = np.zeros((n, n))
    inverse[:half, :half] = first = _inverse_factor(matrix[:half, :half])
    below = matrix[half:, :half] @ first.T
    inverse[half:, half:] = second = _inverse_factor(matrix[half:, half:] - below @ below.T)
    inverse[half:, :half] = -second @ (below @ first)
    return inverse


def feed_back(
    columns: Floats, upper: Floats, round_column: RoundColumn, block: int = BLOCK
) -> None:
    """Round all columns [n, R] in place, in the order in which they stand, each with the errors of
    the earlier ones fed back into it. When the first column of a `block` is rounded, all of its
    columns have the errors of the blocks before.
    """
    n, rows = columns.shape
    errors = np.empty((block, rows), np.float32)
    for start in range(0, n, block):
        stop = min(start + block, n)
        for i in range(start, stop):
            # what the columns of this block have left for column i
            if i > start:
                columns[i] -= upper[start:i, i] @ errors[: i - start]
            rounded = round_column(i, columns[i])
            np.subtract(columns[i], rounded, out=errors[i - start])
            errors[i - start] /= upper[i, i]
            columns[i] = rounded
        # and what the block leaves for all later columns
        columns[stop:] -= upper[start:stop, stop:].T @ errors[: stop - start]


@dataclass(frozen=True, slots=True)
class GroupedCodes:
    """A weight as group-wise integers: value = scales[r, g] · (codes[r, j] - zeros[r, g]), where g
    is `group_of[j]`.
    """

    codes: Codes  # [R, n]
    scales: Floats  # [R, groups], each a float16
    zeros: Codes  # [R, groups]
    group_of: NDArray[np.int32]  # [n]
    bits: int

    def values(self) -> Floats:
        """The weight [R, n]."""
        zeros = self.zeros[:, self.group_of].astype(np.float32)
        return self.scales[:, self.group_of] * (self.codes - zeros)


def gptq(
    weight: Floats,
    hessian: Doubles,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
) -> GroupedCodes:
    """Quantize a weight [R, n] with the Hessian [n, n] of its input.

    Scales and zero points of a group of `group_size` neighbouring columns (None: the whole row) are
    chosen before its first column is rounded, from the columns as they are then. With `act_order`
    they are chosen at the beginning, from the weight itself: groups are those of the stored order,
    so kernels need no permutation (static groups).
    """
    rows, n = weight.shape
    size = n if group_size is None else group_size
    _check(bits, size, n)
    factor = factorize(hessian, act_order=act_order, damping=damping)
    group_of = (np.arange(n) // size).astype(np.int32)
    scales, zeros = _group_grids(weight, size, bits, symmetric)
    columns = np.ascontiguousarray(weight[:, factor.order].T)  # [n, R]
    columns[np.diag(hessian)[factor.order] == 0] = 0
    codes = np.empty((n, rows), np.uint8)
    largest = np.float32((1 << bits) - 1)

    def round_column(i: int, x: Floats) -> Floats:
        j = factor.order[i]
        group = group_of[j]
        if not act_order and j % size == 0:
            now = np.ascontiguousarray(columns[i : i + size].T)
            scales[:, group], zeros[:, group] = _grids(now, bits, symmetric)
        scale, zero = scales[:, group], zeros[:, group].astype(np.float32)
        code = np.clip(np.rint(x / scale) + zero, 0, largest)
        codes[j] = code
        rounded: Floats = scale * (code - zero)
        return rounded

    # groups begin where blocks do, so that their grids see all errors so far
    block = max(width for width in range(1, BLOCK + 1) if size % width == 0)
    feed_back(columns, factor.upper, round_column, block)
    return GroupedCodes(np.ascontiguousarray(codes.T), scales, zeros, group_of, bits)


def round_to_nearest(
    weight: Floats, *, bits: int, group_size: int | None, symmetric: bool = True
) -> GroupedCodes:
    """The same without calibration: each value becomes the nearest number of its group's grid."""
    n = weight.shape[1]
    size = n if group_size is None else group_size
    _check(bits, size, n)
    group_of = (np.arange(n) // size).astype(np.int32)
    scales, zeros = _group_grids(weight, size, bits, symmetric)
    codes = np.rint(weight / scales[:, group_of]) + zeros[:, group_of]
    codes = np.clip(codes, 0, (1 << bits) - 1).astype(np.uint8)
    return GroupedCodes(codes, scales, zeros, group_of, bits)


def _group_grids(weight: Floats, size: int, bits: int, symmetric: bool) -> tuple[Floats, Codes]:
    """Scales and zero points [R, groups] of all groups."""
    rows, n = weight.shape
    scales, zeros = _grids(weight.reshape(-1, size), bits, symmetric)
    return scales.reshape(rows, n // size), zeros.reshape(rows, n // size)


def _grids(values: Floats, bits: int, symmetric: bool) -> tuple[Floats, Codes]:
    """The scale and zero point of each row of values [m, size], as GPTQ's `Quantizer` chooses them:
    0 is always a number of the grid.
    """
    largest = (1 << bits) - 1
    low = np.minimum(values.min(axis=1), 0)
    high = np.maximum(values.max(axis=1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    with np.errstate(over="ignore"):  # refused as a scale
        scale = np.maximum((high - low) / np.float32(largest), np.float32(_SMALLEST_SCALE))
    scale = float16_scales(scale)
    if symmetric:
        return scale, np.full(len(values), 1 << (bits - 1), np.uint8)
    return scale, np.clip(np.rint(-low / scale), 0, largest).astype(np.uint8)


def float16_scales(scales: Floats) -> Floats:
    """Scales as a file will hold them: float16, and never 0. Raises FormatError for one that is
    larger than any float16.
    """
    largest = float(scales.max())
    if largest > 65504:
        raise FormatError(
            f"weights are so large that their scale is {largest:.3g}, and float16 holds 65504 at "
            "most; the file is damaged"
        )
    return np.maximum(scales.astype(np.float16), np.float16(6e-8)).astype(np.float32)


def _check(bits: int, size: int, n: int) -> None:
    if bits not in (2, 3, 4, 8):
        raise ConfigError(f"bits is {bits}; it must be 2, 3, 4 or 8")
    if size < 1 or n % size:
        raise ConfigError(f"group_size is {size}; it must divide the {n} inputs of a weight")
