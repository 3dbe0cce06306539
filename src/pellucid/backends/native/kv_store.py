"""The paged keys and values of a layer, and their bytes per token, known before allocation.

Bytes per token are those of csrc/kv_format.h.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ... import _native
from ...kv_spec import KVSpec

__all__ = ["KVStore", "token_bytes"]


def token_bytes(spec: KVSpec) -> int:
    """Bytes of one token's keys and values."""
    k, v = (
        _native.kv_head_bytes(dtype, dim)
        for dtype, dim in ((spec.k_dtype, spec.k_dim), (spec.v_dtype, spec.v_dim))
    )
    return spec.num_kv_heads * (k + v)


@dataclass(frozen=True, eq=False, slots=True)
class KVStore:
    """The memory that kernels read and write, and its declaration."""

    spec: KVSpec
    native: "_native.KVStore"

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, in order: (source, target)."""
        for view in self.native.block_bytes():
            for source, target in pairs:
                view[target] = view[source]

    def save(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """The bytes of these blocks, [blocks, bytes of a block]: keys, then values."""
        at = list(blocks)
        return np.concatenate([view[at] for view in self.native.block_bytes()], axis=1)

    def load(self, blocks: Sequence[int], saved: NDArray[np.uint8]) -> None:
        """Fill these blocks with what `save` returned."""
        k, v = self.native.block_bytes()
        at = list(blocks)
        k[at], v[at] = saved[:, : k.shape[1]], saved[:, k.shape[1] :]
