"""Reused memory for tensors that are read one after another.

The page faults of a new array of some megabytes take as long as the read itself. So a few slabs are
kept and used again, each as soon as no array in it is in use. Arrays that are larger than a slab
get new memory, which is freed with them.

The reference count of a slab shows whether it is free: every array in it, and every view of such an
array, holds a reference to the slab. A `Scratch` serves one thread.
"""

import sys

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scratch"]

MIN_BYTES = 64 << 10  # smaller arrays are cheap, and would occupy a slab
SLAB_BYTES = 16 << 20
MAX_SLABS = 4  # if more arrays are in use at once, they get new memory
_FREE = 3  # references to a free slab: of the list, the loop, and the call of getrefcount


class Scratch:
    """Hands out arrays of bytes."""

    def __init__(self) -> None:
        self._slabs: list[NDArray[np.uint8]] = []

    def array(self, num_bytes: int) -> NDArray[np.uint8]:
        """An array of `num_bytes`, of any content."""
        if num_bytes < MIN_BYTES:
            return np.empty(num_bytes, np.uint8)
        if num_bytes > SLAB_BYTES:
            self._slabs.clear()  # peak memory is reached here, so no slab is kept beside this array
            return np.empty(num_bytes, np.uint8)
        for slab in self._slabs:
            if sys.getrefcount(slab) == _FREE:
                return slab[:num_bytes]
        slab = np.empty(SLAB_BYTES, np.uint8)
        if len(self._slabs) < MAX_SLABS:
            self._slabs.append(slab)
        return slab[:num_bytes]
