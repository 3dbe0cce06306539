"""Stores of keys and values, on every backend: layers of several groups in one store, and blocks
moved as bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.registry import BACKENDS, get_backend
from pellucid.batch import ForwardBatch
from pellucid.formats import encode_dense
from pellucid.ops.cases import build_attention_batch
from pellucid.ops.protocol import Backend, KVLayer, Ops, Tensor

BLOCK, HEADS, KV_HEADS, DIM, NUM_BLOCKS = 16, 4, 2, 32, 12
SEQ_LENS = (37, 20)
# [G, R, M]: no block is in two groups, but for padding
SHARED = np.array([[[7, 3, 0], [5, 11, 0]], [[1, 8, 10], [2, 4, 0]]], np.int32)
WINDOWS = (None, 9)

Run = Callable[[ForwardBatch], NDArray[np.float32]]


def new_store(backend: Backend) -> Any:
    return backend.new_kv_store(NUM_BLOCKS, BLOCK, KV_HEADS, DIM)


def layers_forward(backend: Backend, layers: Sequence[KVLayer], wanted: int) -> Run:
    """One layer after another writes and attends, each to keys and values of its own; the result is
    that of layer `wanted`.
    """
    rng = np.random.default_rng(5)
    widths = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM}
    weights = [
        {
            name: backend.load_weight(
                encode_dense(rng.normal(size=(sum(SEQ_LENS), n)).astype(np.float32))
            )
            for name, n in widths.items()
        }
        for _ in layers
    ]

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        results = []
        for kv, tables, window in zip(layers, weights, WINDOWS, strict=True):
            x = {name: ops.embedding(table, batch.input_ids) for name, table in tables.items()}
            k, v = (ops.split_heads(x[name], KV_HEADS) for name in ("k", "v"))
            ops.kv_write(kv, k, v, batch.attention.slot_mapping)
            results.append(
                ops.attention(
                    ops.split_heads(x["q"], HEADS), kv, batch.attention, scale=0.2, window=window
                )
            )
        return results[wanted]

    return backend.build_forward(forward)


def step(first: Sequence[int], tables: NDArray[np.int32]) -> ForwardBatch:
    """Tokens first[r] … of each request."""
    lengths = [s - f for s, f in zip(SEQ_LENS, first, strict=True)]
    ids = np.concatenate(
        [np.arange(f, s) + 37 * r for r, (f, s) in enumerate(zip(first, SEQ_LENS, strict=True))]
    )
    return replace(
        build_attention_batch(lengths, SEQ_LENS, tables, BLOCK), input_ids=ids.astype(np.int32)
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_groups_that_share_a_store_see_their_own_blocks_only(name: str, wanted: int) -> None:
    backend = get_backend(name)
    store = new_store(backend)
    shared = layers_forward(backend, [KVLayer(store, 0), KVLayer(store, 1)], wanted)
    apart = layers_forward(
        backend, [KVLayer(new_store(backend), group) for group in range(2)], wanted
    )
    same_tables = layers_forward(backend, [KVLayer(new_store(backend)) for _ in range(2)], wanted)
    # a prompt, then its last tokens again over what lies in the store
    for first in ((0, 0), (30, 19)):
        found = shared(step(first, SHARED))
        assert np.array_equal(found, apart(step(first, SHARED))) and np.abs(found).max() > 0
        assert np.array_equal(found, same_tables(step(first, SHARED[0])))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_block_moved_as_bytes_is_the_same_block(name: str) -> None:
    backend = get_backend(name)
    stores = [new_store(backend) for _ in range(2)]
    run = layers_forward(backend, [KVLayer(store) for store in stores], 1)
    run(step((0, 0), SHARED[0]))
    expected = run(step((36, 19), SHARED[0]))
    moved = SHARED[0].copy()
    moved[moved == 7] = 9
    moved[moved == 5] = 6
    for store in stores:
        for view in backend.kv_block_bytes(store):
            assert view.shape[0] == NUM_BLOCKS and view.dtype == np.uint8 and not view[9].any()
            view[9], saved = view[7], view[5].copy()
            view[[5, 7]] = 0xFF  # the numbers there are none any more
            view[6] = saved
    assert np.array_equal(run(step((36, 19), moved)), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_bytes_of_a_store_live_as_long_as_a_view_of_them(name: str) -> None:
    backend = get_backend(name)
    views = backend.kv_block_bytes(new_store(backend))
    for view in views:
        view[:] = 3
    assert all((view == 3).all() for view in views)


def test_a_group_that_the_batch_lacks_is_refused() -> None:
    backend = get_backend("native")
    run = layers_forward(backend, [KVLayer(new_store(backend), group) for group in range(2)], 0)
    with pytest.raises(IndexError, match="no group 1"):
        run(step((0, 0), SHARED[:1]))
    # in the second group alone, before the tokens that are written
    wrong = np.where(SHARED == 8, NUM_BLOCKS, SHARED)
    with pytest.raises(IndexError, match="block 12 is not below 12"):
        run(step((36, 19), wrong))
