"""Memory that tensors are read into, one after another.

A fresh array of some megabytes costs as much time in page faults as the read itself. So a few
slabs are kept and handed out again, each as soon as nobody holds an array in it any more. Arrays
that are larger than a slab get memory of their own, which is given back when they go.

Whether a slab is free is told by its reference count: every array in it, and every view of such an
array, holds a reference to the slab. A `Scratch` serves one thread.
"""

import sys

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scratch"]

MIN_BYTES = 64 << 10  # smaller arrays cost next to nothing, and would hold a slab
SLAB_BYTES = 16 << 20
MAX_SLABS = 4  # more arrays than this held at once get memory of their own
_FREE = 3  # references to a free slab: the list's, the loop's, and that of the question


class Scratch:
    """Hands out arrays of bytes."""

    def __init__(self) -> None:
        self._slabs: list[NDArray[np.uint8]] = []

    def array(self, num_bytes: int) -> NDArray[np.uint8]:
        """An array of `num_bytes`, of any content."""
        if num_bytes < MIN_BYTES:
            return np.empty(num_bytes, np.uint8)
        if num_bytes > SLAB_BYTES:
            self._slabs.clear()  # the peak comes with the largest: nothing lies beside it
            return np.empty(num_bytes, np.uint8)
        for slab in self._slabs:
            if sys.getrefcount(slab) == _FREE:
                return slab[:num_bytes]
        slab = np.empty(SLAB_BYTES, np.uint8)
        if len(self._slabs) < MAX_SLABS:
            self._slabs.append(slab)
        return slab[:num_bytes]
