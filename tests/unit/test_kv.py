"""The KV cache's bookkeeping: arithmetic, layer groups and the block pool. The tree and the
manager: test_radix_tree.py, and under the scheduler test_scheduler_stateful.py."""

from collections.abc import Sequence

import pytest

from pellucid.kv.block_pool import BlockPool
from pellucid.kv.layout import KVLayout, LayerGroup, build_layout
from pellucid.kv_spec import KVSpec

LAYOUT = build_layout([KVSpec(3, 64, 64, "f32", "f32")] * 30, [2 * 3 * 64 * 4] * 30, 16)


def _layout(windows: Sequence[int | None], block_size: int) -> KVLayout:
    specs = [KVSpec(1, 8, 8, "f32", "f32", window) for window in windows]
    return build_layout(specs, [64] * len(specs), block_size)


def test_bytes_per_token_count_keys_and_values_of_every_layer() -> None:
    assert LAYOUT.bytes_per_token == 2 * 30 * 3 * 64 * 4
    assert LAYOUT.bytes_per_block == 16 * LAYOUT.bytes_per_token


def test_blocks_round_up_for_tokens() -> None:
    assert [LAYOUT.blocks_for(n, 8) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert LAYOUT.tokens_in(2, 8, 100) == 32


def test_layers_of_one_window_form_groups_as_large_as_the_rarest_kind() -> None:
    layout = _layout((4, 4, None, 4, 4, None, 4), 2)
    assert layout.groups == (
        LayerGroup((0, 1), 4),
        LayerGroup((3, 4), 4),
        LayerGroup((6,), 4),
        LayerGroup((2, 5), None),
    )
    assert (len(layout.stores), layout.bytes_per_token) == (2, 7 * 64)
    assert layout.bytes_per_block == 2 * 2 * 64


def test_layers_of_different_shapes_have_one_table_and_a_store_each() -> None:
    specs = [
        KVSpec(2, 8, 8, "f32", "f32", 4),
        KVSpec(1, 16, 4, "f32", "f32"),
        KVSpec(2, 8, 8, "f32", "f32", 6),
    ]
    layout = build_layout(specs, [128, 80, 128], 2)
    assert layout.groups == (LayerGroup((0, 1, 2), None),) and layout.stores == tuple(specs)
    assert (layout.bytes_per_token, layout.bytes_per_block) == (336, 672)
    # where all have a window, what lies behind the longest is given back
    assert build_layout(
        [*specs[::2], KVSpec(1, 8, 8, "f32", "f32", 2)], [128, 128, 64], 2
    ).groups == (LayerGroup((0, 1, 2), 6),)


@pytest.mark.parametrize(
    ("window", "chunk", "block_size"), [(1, 1, 4), (4, 3, 4), (5, 1, 4), (16, 8, 4), (7, 20, 2)]
)
def test_a_window_holds_no_more_blocks_than_it_is_said_to(
    window: int, chunk: int, block_size: int
) -> None:
    layout = _layout((window,), block_size)
    (group,) = layout.groups
    for start in range(0, 200):
        held = layout.columns_for(start + chunk) - group.first_needed(start, block_size)
        assert held <= layout.group_blocks_for(group, start + chunk, chunk)


def test_the_pool_counts_who_holds_a_block() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.share(block)
    pool.release(block)
    assert (pool.num_free, pool.ref_count[block]) == (1, 1)
    pool.cache(block)
    pool.release(block)
    assert (pool.num_free, pool.num_idle, pool.num_available) == (1, 1, 2)
    pool.share(block)
    assert pool.num_idle == 0
    pool.uncache(block)
    pool.release(block)
    assert pool.num_free == 2
    pool.check_integrity()


def test_freeing_a_block_twice_is_found() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(AssertionError, match="no request holds it"):
        pool.release(block)


def test_check_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="0 holders and is not in the free list"):
        pool.check_integrity()
