"""Where a request's blocks lie, and what lies in the others, never shows in its attention: bit for
bit.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pellucid.backends.reference import ops
from pellucid.backends.reference.attention import Array, PagedKV
from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.kv_spec import KVSpec
from pellucid.ops.case_inputs import build_attention_batch
from pellucid.ops.cases import AttentionCase
from pellucid.ops.protocol import KVLayer

from .oracle import attention

CASES = (
    AttentionCase(
        q_lens=(5, 1, 20),
        seq_lens=(37, 64, 20),
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        block_size=8,
    ),
    AttentionCase(
        q_lens=(1, 1), seq_lens=(33, 7), num_heads=4, num_kv_heads=4, head_dim=24, block_size=1
    ),
    AttentionCase(
        q_lens=(3, 1),
        seq_lens=(40, 90),
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        block_size=16,
        window=11,
    ),
)


def block_tables(case: AttentionCase, order: Any) -> Any:
    """Give the requests of a case their blocks out of `order`, one request after another."""
    lengths = [-(-s // case.block_size) for s in case.seq_lens]
    tables = np.zeros((len(lengths), max(lengths)), np.int32)
    for table, length, end in zip(tables, lengths, np.cumsum(lengths), strict=True):
        table[:length] = order[end - length : end]
    return tables


def new_kv(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, filler: float = 0.0
) -> KVLayer:
    store = ReferenceBackend().new_kv_store(
        num_blocks, block_size, KVSpec(num_kv_heads, head_dim, head_dim, "f32", "f32")
    )
    store.k[:], store.v[:] = filler, filler
    return KVLayer(store)


def run(case: AttentionCase, tables: Any, num_blocks: int, filler: float) -> Array:
    """Write all keys and values of all requests into a cache full of `filler`, then attend."""
    rng = np.random.default_rng(7)
    total, tokens = sum(case.seq_lens), sum(case.q_lens)
    kv = new_kv(num_blocks, case.block_size, case.num_kv_heads, case.head_dim, filler)
    k, v = (
        rng.normal(size=(total, case.num_kv_heads, case.head_dim)).astype(np.float32)
        for _ in range(2)
    )
    whole = build_attention_batch(case.seq_lens, case.seq_lens, tables, case.block_size).attention
    ops.kv_write(kv, k, v, whole.slot_mapping)
    q = rng.normal(size=(tokens, case.num_heads, case.head_dim)).astype(np.float32)
    metadata = build_attention_batch(case.q_lens, case.seq_lens, tables, case.block_size).attention
    return ops.attention(q, kv, metadata, scale=0.25, window=case.window)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_is_bit_equal_under_any_placement_of_blocks(case: AttentionCase) -> None:
    num_blocks = 60 if case.block_size > 1 else 120
    in_a_row = run(case, block_tables(case, np.arange(num_blocks)), num_blocks, 0.0)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(num_blocks)
        assert np.array_equal(run(case, block_tables(case, order), num_blocks, 0.0), in_a_row)
    assert np.array_equal(
        run(case, block_tables(case, np.arange(num_blocks)[::-1]), num_blocks, 0.0), in_a_row
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("in_a_row", [True, False])
def test_attention_reads_no_slot_of_another_request_or_of_nobody(
    case: AttentionCase, in_a_row: bool
) -> None:
    num_blocks = 120
    order = np.arange(num_blocks) if in_a_row else np.random.default_rng(3).permutation(num_blocks)
    tables = block_tables(case, order)
    clean = run(case, tables, num_blocks, 0.0)
    # unwritten slots, the rest of last blocks among them
    assert np.array_equal(run(case, tables, num_blocks, np.nan), clean)
    assert np.isfinite(clean).all()


def test_each_request_sees_its_own_keys_only() -> None:
    case = CASES[0]
    rng = np.random.default_rng(1)
    tables = block_tables(case, rng.permutation(40))
    inputs = [
        [rng.normal(size=(s, n, 16)).astype(np.float32) for n in (6, 2, 2)] for s in case.seq_lens
    ]
    whole = build_attention_batch(case.seq_lens, case.seq_lens, tables, case.block_size).attention
    metadata = build_attention_batch(case.q_lens, case.seq_lens, tables, case.block_size).attention
    borders = np.cumsum([0, *case.q_lens])
    q = np.concatenate([request[0][-n:] for request, n in zip(inputs, case.q_lens, strict=True)])
    for r, (own_q, own_k, own_v) in enumerate(inputs):
        kv = new_kv(40, case.block_size, 2, 16)
        poisoned = [[np.full_like(x, np.nan) for x in request] for request in inputs]
        poisoned[r] = inputs[r]
        k, v = (np.concatenate([request[i] for request in poisoned]) for i in (1, 2))
        ops.kv_write(kv, k, v, whole.slot_mapping)
        with np.errstate(invalid="ignore"):
            own = ops.attention(q, kv, metadata, scale=0.25)[borders[r] : borders[r + 1]]
        expected, _ = attention(own_q[-case.q_lens[r] :], own_k, own_v, scale=0.25)
        np.testing.assert_allclose(own, expected.reshape(own.shape), rtol=0, atol=1e-5)


def test_with_a_window_older_slots_are_not_read_even_where_the_request_once_owned_them() -> None:
    case = CASES[2]
    tables = block_tables(case, np.random.default_rng(2).permutation(20))
    clean = run(case, tables, 20, 0.0)
    forgotten = tables.copy()
    for table, q_len, seq_len in zip(forgotten, case.q_lens, case.seq_lens, strict=True):
        oldest = seq_len - q_len - 11 + 1
        # blocks wholly before the window have been given away
        table[: oldest // case.block_size] = -1
    rng = np.random.default_rng(7)
    kv = new_kv(20, case.block_size, case.num_kv_heads, case.head_dim)
    k, v = (
        rng.normal(size=(sum(case.seq_lens), case.num_kv_heads, case.head_dim)).astype(np.float32)
        for _ in range(2)
    )
    ops.kv_write(
        kv,
        k,
        v,
        build_attention_batch(
            case.seq_lens, case.seq_lens, tables, case.block_size
        ).attention.slot_mapping,
    )
    q = rng.normal(size=(sum(case.q_lens), case.num_heads, case.head_dim)).astype(np.float32)
    metadata = build_attention_batch(case.q_lens, case.seq_lens, tables, case.block_size).attention
    assert np.array_equal(
        ops.attention(
            q, kv, replace(metadata, block_tables=forgotten[None]), scale=0.25, window=11
        ),
        clean,
    )


def test_a_write_touches_its_own_slots_only() -> None:
    kv = new_kv(4, 4, 2, 3)
    store: PagedKV = kv.store
    store.k[:], store.v[:] = 7.0, 8.0
    slots = np.array([13, 2, 3], np.int32)
    k, v = (
        np.arange(18, dtype=np.float32).reshape(3, 2, 3),
        -np.arange(18, dtype=np.float32).reshape(3, 2, 3),
    )
    ops.kv_write(kv, k, v, slots[None])
    assert np.array_equal(store.k[slots], k) and np.array_equal(store.v[slots], v)
    others = np.setdiff1d(np.arange(16), slots)
    assert (store.k[others] == 7.0).all() and (store.v[others] == 8.0).all()
