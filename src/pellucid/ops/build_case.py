"""A conformance case made runnable on a backend.

A case never touches a backend's arrays. Activations enter as the rows of an embedding table
(input_ids 0 … T-1), weights enter through `load_weight`, and the op runs inside `build_forward`. So
the same cases run on eager, captured and device backends.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..batch import ForwardBatch
from ..formats import encode_dense
from ..kv_spec import KVSpec
from .backend import Backend
from .case_inputs import Inputs
from .cases import AttentionCase, Case
from .kv_dtypes import choose_kv_dtypes
from .protocol import KVLayer, Ops, Tensor

__all__ = ["build_case"]

Array: TypeAlias = NDArray[np.float32]


def build_case(
    backend: Backend, case: Case, inputs: Inputs, *, repeats: int = 1
) -> Callable[[], Array]:
    """Make a case runnable on a backend. The op runs `repeats` times within one forward pass, for
    timing.
    """
    # load weights, activations and the history of the cache
    weights = {name: backend.load_weight(tensor) for name, tensor in inputs.weights.items()}
    tables = {
        name: backend.load_weight(encode_dense(rows)) for name, rows in inputs.activations.items()
    }
    kv = KVLayer(None)  # for cases without a KV cache
    if isinstance(case, AttentionCase):
        dtypes = case.kv_dtypes or choose_kv_dtypes("auto", backend.kv_dtypes)
        spec = KVSpec(case.num_kv_heads, case.head_dim, case.head_dim, *dtypes)
        kv = KVLayer(backend.new_kv_store(inputs.num_blocks, case.block_size, spec))
        if inputs.history_batch is not None:
            _write_history(backend, case, inputs, inputs.history_batch, kv)

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        x = weights | {
            name: ops.embedding(table, batch.input_ids) for name, table in tables.items()
        }
        for _ in range(repeats):
            out = case.apply(ops, x, batch, kv)
        return out

    run = backend.build_forward(forward)
    return lambda: run(inputs.batch).to_host()


def _write_history(
    backend: Backend, case: AttentionCase, inputs: Inputs, history_batch: ForwardBatch, kv: KVLayer
) -> None:
    tables = {
        name: backend.load_weight(encode_dense(rows)) for name, rows in inputs.history.items()
    }

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        rows = {name: ops.embedding(table, batch.input_ids) for name, table in tables.items()}
        k, v = (ops.split_heads(rows[name], case.num_kv_heads) for name in ("k", "v"))
        ops.kv_write(kv, k, v, batch.attention.slot_mapping)
        return rows["k"]

    backend.build_forward(forward)(history_batch)
