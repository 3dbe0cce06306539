"""How the importance of columns becomes weights of values.

An importance matrix (imatrix) says for each column of a weight how large the square of its input
is on average. ggml's quantizers weigh a value x of that column by

    importance · sqrt(s + x²)

where s is the mean square of x's neighbours: of its row, or of its block. So large values count
more, and none counts nothing. Q6_K takes the importance as it is.

Values are float32 [rows, columns], importance float32 [columns]. The order of operations is ggml's.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .search import sum_in_order

__all__ = ["Weigh", "as_given", "by_blocks", "by_row"]

Floats: TypeAlias = NDArray[np.float32]
Weigh: TypeAlias = Callable[[Floats, Floats], Floats]  # (values, importance) -> weights of values


def as_given(values: Floats, importance: Floats) -> Floats:
    """The importance of the column."""
    return np.broadcast_to(importance, values.shape)


def by_row(values: Floats, importance: Floats) -> Floats:
    """s is the mean square of the row."""
    mean = sum_in_order(values * values) / np.float32(values.shape[-1])
    return importance * np.sqrt(mean[:, None] + values * values)


def by_blocks(span: int, factor: float) -> Weigh:
    """s is `factor` times the mean square of the block of `span` values."""

    def weigh(values: Floats, importance: Floats) -> Floats:
        blocks = values.reshape(len(values), -1, span)
        squares = blocks * blocks
        mean = np.float32(factor) * sum_in_order(squares) / np.float32(span)
        weights = importance.reshape(-1, span) * np.sqrt(mean[:, :, None] + squares)
        return weights.reshape(values.shape)

    return weigh
