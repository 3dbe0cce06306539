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
from pellucid.kv_spec import KVSpec
from pellucid.ops.backend import Backend
from pellucid.ops.case_inputs import build_attention_batch
from pellucid.ops.kv_dtypes import choose_kv_dtypes
from pellucid.ops.protocol import KVLayer, Ops, Tensor

BLOCK, HEADS, KV_HEADS, DIM, NUM_BLOCKS = 16, 4, 2, 32, 12
SEQ_LENS = (37, 20)
# [G, R, M]: no block is in two groups, but for padding
SHARED = np.array([[[7, 3, 0], [5, 11, 0]], [[1, 8, 10], [2, 4, 0]]], np.int32)
WINDOWS = (None, 9)

Run = Callable[[ForwardBatch], NDArray[np.float32]]


def new_store(backend: Backend) -> Any:
    return backend.new_kv_store(
        NUM_BLOCKS, BLOCK, KVSpec(KV_HEADS, DIM, DIM, *choose_kv_dtypes("auto", backend.kv_dtypes))
    )


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

    run = backend.build_forward(forward)
    return lambda batch: run(batch).to_host()


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
        assert not backend.save_blocks(store, [9]).any()
        backend.copy_blocks(store, [(7, 9), (9, 10)])
        saved = backend.save_blocks(store, [5, 7, 10])
        assert saved.dtype == np.uint8 and np.array_equal(saved[1], saved[2])
        backend.load_blocks(store, [5, 7], np.full_like(saved[:2], 0xFF))  # not numbers any more
        backend.load_blocks(store, [6], saved[:1])
    assert np.array_equal(run(step((36, 19), moved)), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_saved_blocks_are_a_copy_of_as_many_bytes_as_the_plan_says(name: str) -> None:
    backend = get_backend(name)
    spec = KVSpec(KV_HEADS, DIM, DIM, *choose_kv_dtypes("auto", backend.kv_dtypes))
    store = new_store(backend)
    saved = backend.save_blocks(store, [2, 3])
    assert saved.shape == (2, BLOCK * backend.kv_token_bytes(spec))
    backend.load_blocks(store, [2], np.ones_like(saved[:1]))
    assert not saved.any() and backend.save_blocks(store, [2]).all()


def test_a_group_that_the_batch_lacks_is_refused() -> None:
    backend = get_backend("native")
    run = layers_forward(backend, [KVLayer(new_store(backend), group) for group in range(2)], 0)
    with pytest.raises(IndexError, match="no group 1"):
        run(step((0, 0), SHARED[:1]))
    # in the second group alone, before the tokens that are written
    wrong = np.where(SHARED == 8, NUM_BLOCKS, SHARED)
    with pytest.raises(IndexError, match="block 12 is not below 12"):
        run(step((36, 19), wrong))
