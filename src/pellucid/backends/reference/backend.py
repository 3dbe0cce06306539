"""The reference backend: float32 arrays and the functions of `ops.py`, run as they are called.

Weights are decoded once, when they are loaded: memory is 4 bytes per parameter whatever the file's
format, and each step is plain BLAS.
"""

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from ...batch import ForwardBatch
from ...formats import dequantize
from ...formats.tensor import HostTensor
from ...ops.kv_dtypes import check_kv_dtype
from ...ops.protocol import Forward
from . import ops
from .attention import Array, PagedKV
from .kv_dtypes import KV_DTYPES

__all__ = ["ReferenceBackend"]

ELEMENT_BYTES = 4  # float32, for weights and cache alike


class ReferenceBackend:
    """Implements `ops.protocol.Backend` in NumPy."""

    name = "reference"
    is_batch_invariant = False  # BLAS chooses the order of its sums by the shape of the product
    kv_dtypes = KV_DTYPES

    def weight_bytes(self, tensor: HostTensor) -> int:
        return prod(tensor.shape) * ELEMENT_BYTES

    def load_weight(self, tensor: HostTensor) -> Array:
        weight = dequantize(tensor)  # a new array, of its own memory
        weight.flags.writeable = False  # no op changes what it is given
        return weight

    def kv_token_bytes(
        self,
        num_kv_heads: int,
        head_dim: int,
        k_dtype: str | None = None,
        v_dtype: str | None = None,
    ) -> int:
        for dtype in (k_dtype, v_dtype):
            check_kv_dtype(dtype or KV_DTYPES[0], KV_DTYPES, head_dim)
        # rounded as the dtype says, and kept as float32
        return 2 * num_kv_heads * head_dim * ELEMENT_BYTES

    def new_kv_store(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        k_dtype: str | None = None,
        v_dtype: str | None = None,
    ) -> PagedKV:
        for dtype in (k_dtype, v_dtype):
            check_kv_dtype(dtype or KV_DTYPES[0], KV_DTYPES, head_dim)
        shape = (num_blocks * block_size, num_kv_heads, head_dim)
        k, v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        return PagedKV(k, v, block_size, k_dtype or KV_DTYPES[0], v_dtype or KV_DTYPES[0])

    def kv_block_bytes(self, store: PagedKV) -> list[NDArray[np.uint8]]:
        num_blocks = len(store.k) // store.block_size
        return [x.reshape(num_blocks, -1).view(np.uint8) for x in (store.k, store.v)]

    def build_forward(self, forward: Forward) -> Callable[[ForwardBatch], Array]:
        return lambda batch: np.ascontiguousarray(forward(ops, batch), np.float32)
