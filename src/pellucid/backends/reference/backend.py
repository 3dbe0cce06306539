"""The reference backend: float32 arrays and the functions of `ops.py`, run as they are called.

Weights are decoded once, when they are loaded. So they take 4 bytes per parameter in any format,
and each step is plain BLAS.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from ... import host_memory
from ...batch import ForwardBatch
from ...config import ModelConfig
from ...formats import dequantize
from ...formats.finite import check_finite
from ...formats.tensor import HostTensor, StoredMatrix, TensorSpec
from ...kv_spec import KVSpec
from ...ops.backend import Forward
from ...ops.kv_dtypes import check_kv_dtype
from ..host_logits import HostLogits
from . import ops
from .attention import Array, PagedKV
from .kv_dtypes import KV_DTYPES
from .step_memory import step_bytes

__all__ = ["ReferenceBackend"]

ELEMENT_BYTES = 4  # float32, for weights and cache alike


class ReferenceBackend:
    """Implements `ops.backend.Backend` in NumPy."""

    name = "reference"
    device = "cpu"
    devices = ("cpu",)
    dtypes = ("float32",)
    kv_dtypes = KV_DTYPES
    is_batch_invariant = False  # BLAS chooses the order of its sums by the shape of the product
    # Other backends are compared with this one, so by default a request gets the same bits every
    # time. Batches and shared prefixes are off, because they change the shapes that BLAS sees.
    default_max_num_seqs = 1
    default_prefix_caching = False
    block_multiple = 1

    def available_memory(self) -> int:
        return host_memory.available_memory()

    def check_model(self, config: ModelConfig) -> None:
        pass  # NumPy arrays have no limit but memory

    def weight_bytes(self, spec: TensorSpec) -> int:
        return prod(spec.shape) * ELEMENT_BYTES

    def step_bytes(
        self, forward: Forward, num_tokens: int, num_logits: int, context: int
    ) -> dict[str, int]:
        return step_bytes(forward, num_tokens, num_logits)

    def load_weight(self, tensor: HostTensor, name: str = "a parameter") -> Array:
        weight = dequantize(tensor)  # a new array, not a view
        # min and max are NaN if any number is
        check_finite(name, bool(np.isfinite([weight.min(), weight.max()]).all()))
        weight.flags.writeable = False  # no op may change a weight
        return weight

    def load_stored(self, matrices: Mapping[str, StoredMatrix]) -> dict[str, Array]:
        return {}  # weights are decoded whole

    def kv_token_bytes(self, spec: KVSpec) -> int:
        check_kv_dtype(spec.k_dtype, KV_DTYPES, spec.k_dim)
        check_kv_dtype(spec.v_dtype, KV_DTYPES, spec.v_dim)
        # rounded to the dtype, but stored as float32
        return spec.num_kv_heads * (spec.k_dim + spec.v_dim) * ELEMENT_BYTES

    def new_kv_store(self, num_blocks: int, block_size: int, spec: KVSpec) -> PagedKV:
        self.kv_token_bytes(spec)  # raises ConfigError if it cannot be stored
        k, v = (
            np.zeros((num_blocks * block_size, spec.num_kv_heads, dim), np.float32)
            for dim in (spec.k_dim, spec.v_dim)
        )
        return PagedKV(k, v, block_size, spec.k_dtype, spec.v_dtype)

    def copy_blocks(self, store: PagedKV, pairs: Sequence[tuple[int, int]]) -> None:
        for view in _blocks(store):
            for source, target in pairs:
                view[target] = view[source]

    def save_blocks(self, store: PagedKV, blocks: Sequence[int]) -> NDArray[np.uint8]:
        k, v = _blocks(store)
        width = k.shape[1]
        saved = np.empty((len(blocks), width + v.shape[1]), np.uint8)
        for row, block in zip(saved, blocks, strict=True):
            row[:width], row[width:] = k[block], v[block]
        return saved

    def load_blocks(self, store: PagedKV, blocks: Sequence[int], saved: NDArray[np.uint8]) -> None:
        k, v = _blocks(store)
        width = k.shape[1]
        for row, block in zip(saved, blocks, strict=True):
            k[block], v[block] = row[:width], row[width:]

    def build_forward(self, forward: Forward) -> Callable[[ForwardBatch], HostLogits]:
        def run(batch: ForwardBatch) -> HostLogits:
            # Infinity and NaN end their own request with an error. NumPy's warnings about them,
            # which a caller may have turned into exceptions, would end the others too.
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                found = forward(ops, batch)
            logits, hidden = found if isinstance(found, tuple) else (found, None)
            result = np.ascontiguousarray(logits, np.float32)
            # a conformance case may return heads [L, H, D]: flatten them
            return HostLogits(result.reshape(len(result), prod(result.shape[1:])), hidden)

        return run


def _blocks(store: PagedKV) -> list[NDArray[np.uint8]]:
    """Views of a store's keys and values as bytes: [blocks, bytes of a block] each."""
    num_blocks = len(store.k) // store.block_size
    return [x.reshape(num_blocks, -1).view(np.uint8) for x in (store.k, store.v)]
