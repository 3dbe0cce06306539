"""Logits in host memory: the handle that CPU backends return from a forward pass. Hidden states may
come with them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import PellucidError
from ..sampling import SamplingRow, sample

__all__ = ["HostLogits"]


class HostLogits:
    """Implements `ops.backend.Logits` over float32 arrays [L, V] and [E, C]."""

    def __init__(
        self, array: NDArray[np.float32], hidden: NDArray[np.float32] | None = None
    ) -> None:
        self._array = array
        self.hidden = hidden

    @property
    def num_rows(self) -> int:
        return len(self._array)

    def to_host(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        if rows is None:
            return self._array
        # consecutive rows are a view: a copy would be large, because a row has V numbers
        first, count = (rows[0] if rows else 0), len(rows)
        if list(rows) == list(range(first, first + count)):
            return self._array[first : first + count]
        return self._array[list(rows)]

    def sample(
        self, rows: Sequence[int], sampling: Sequence[SamplingRow]
    ) -> Sequence[int | PellucidError]:
        return sample(self.to_host(rows), sampling)
