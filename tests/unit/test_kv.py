"""The KV cache's bookkeeping: arithmetic, layer groups and the block pool. The tree and the
manager: test_radix_tree.py, and under the scheduler test_scheduler_stateful.py."""

import pytest

from pellucid.config import ModelConfig
from pellucid.kv.block_pool import BlockPool
from pellucid.kv.layout import KVLayout, LayerGroup, build_layout

LAYOUT = KVLayout(
    (LayerGroup(tuple(range(30)), None),),
    num_kv_heads=3,
    head_dim=64,
    block_size=16,
    token_bytes=2 * 3 * 64 * 4,
)


def _config(windows: tuple[int | None, ...]) -> ModelConfig:
    return ModelConfig(
        architecture="gemma3",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=len(windows),
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        windows=windows,
    )


def test_bytes_per_token_count_keys_and_values_of_every_layer() -> None:
    assert LAYOUT.bytes_per_token == 2 * 30 * 3 * 64 * 4
    assert LAYOUT.bytes_per_block == 16 * LAYOUT.bytes_per_token


def test_blocks_round_up_for_tokens() -> None:
    assert [LAYOUT.blocks_for(n, 8) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert LAYOUT.tokens_in(2, 8, 100) == 32


def test_layers_of_one_window_form_groups_as_large_as_the_rarest_kind() -> None:
    layout = build_layout(_config((4, 4, None, 4, 4, None, 4)), 2, 64)
    assert layout.groups == (
        LayerGroup((0, 1), 4),
        LayerGroup((3, 4), 4),
        LayerGroup((6,), 4),
        LayerGroup((2, 5), None),
    )
    assert (layout.num_stores, layout.num_layers, layout.bytes_per_block) == (2, 7, 2 * 2 * 64)


@pytest.mark.parametrize(
    ("window", "chunk", "block_size"), [(1, 1, 4), (4, 3, 4), (5, 1, 4), (16, 8, 4), (7, 20, 2)]
)
def test_a_window_holds_no_more_blocks_than_it_is_said_to(
    window: int, chunk: int, block_size: int
) -> None:
    layout = build_layout(_config((window,)), block_size, 64)
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
