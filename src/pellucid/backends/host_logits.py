"""Logits in host memory: the handle that CPU backends return from a forward pass."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import PellucidError
from ..sampling import SamplingRow, sample

__all__ = ["HostLogits"]


class HostLogits:
    """Implements `ops.protocol.Logits` over a float32 array [L, V]."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self._array = array

    @property
    def num_rows(self) -> int:
        return len(self._array)

    def to_host(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        # all rows are the array itself: the vocabulary is wide, and a copy would be felt
        if rows is None or list(rows) == list(range(len(self._array))):
            return self._array
        return self._array[np.asarray(rows, np.intp)]

    def sample(
        self, rows: Sequence[int], sampling: Sequence[SamplingRow]
    ) -> Sequence[int | PellucidError]:
        return sample(self.to_host(rows), sampling)
