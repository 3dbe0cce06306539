"""The KV cache's bookkeeping: arithmetic, block pool and block tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.kv.block_pool import BlockPool
from pellucid.kv.layout import KVLayout
from pellucid.kv.manager import KVCacheManager
from pellucid.request import Request, SamplingParams

LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, element_bytes=4)


def _request(request_id: str) -> Request:
    return Request(request_id=request_id, prompt_token_ids=[1], params=SamplingParams(), seed=0)


def test_bytes_per_token_count_keys_and_values_of_every_layer() -> None:
    assert LAYOUT.bytes_per_token == 2 * 30 * 3 * 64 * 4
    assert LAYOUT.bytes_per_block == 16 * LAYOUT.bytes_per_token


def test_blocks_round_up_for_tokens_and_down_for_memory() -> None:
    assert [LAYOUT.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert LAYOUT.blocks_in(2 * LAYOUT.bytes_per_block - 1) == 1


def test_the_pool_gives_all_or_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_freeing_a_block_twice_is_found() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1) or []
    pool.free(blocks)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.free(blocks)


def test_check_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="are not 2"):
        pool.check_integrity()


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=40))
def test_tables_never_share_a_block_and_nothing_leaks(num_blocks: int, operations: list[tuple[int, int]]) -> None:
    """Requests grow (n > 0) or end (n = 0) in any order; refused growth changes nothing."""
    kv = KVCacheManager(LAYOUT, num_blocks)
    requests = [_request(str(i)) for i in range(4)]
    for who, count in operations:
        request = requests[who]
        if count == 0:
            kv.free(request)
            request.num_computed_tokens = 0
        else:
            free = kv.num_free_blocks
            if kv.allocate_slots(request, count):
                request.num_computed_tokens += count
                assert len(kv.block_table(request)) == LAYOUT.blocks_for(request.num_computed_tokens)
            else:
                assert kv.num_free_blocks == free
        kv.check_integrity()
    for request in requests:
        kv.free(request)
    assert kv.num_free_blocks == num_blocks
