"""The prefix tree by itself: what it knows of a sequence, whose blocks it keeps, and what goes
first when room is made.
"""

import pytest

from pellucid.batch import BlockOp
from pellucid.kv.node import HOLE

from .radix_cache import A, C, Cache

# ---- match


def test_an_empty_tree_knows_nothing() -> None:
    assert Cache().known(A) == 0


@pytest.mark.parametrize(
    ("query", "known"),
    [
        (A + C, 8),
        (A + C + [1, 1, 1, 1], 8),
        (A, 4),
        ([*A, 2, 2, 2, 1], 7),  # parts inside a block
        ([*A, 1, 2, 2, 2], 4),
        ([0, 1, 2], 3),
        ([1], 0),
        (C, 0),  # known only behind A
    ],
)
def test_a_match_is_the_longest_common_prefix_to_the_token(query: list[int], known: int) -> None:
    cache = Cache()
    cache.leave(A + C)
    assert cache.known(query) == known


@pytest.mark.parametrize("limit", range(9))
def test_a_match_ends_at_its_limit(limit: int) -> None:
    cache = Cache()
    cache.leave(A + C)
    assert cache.known(A + C, limit=limit) == limit


def test_the_continuation_that_is_alike_longest_is_the_one_to_copy_from() -> None:
    cache = Cache()
    for last in ([2, 1, 1, 1], [2, 2, 2, 0], [2, 2, 0, 0]):
        cache.leave(A + last)
    match = cache.tree.match("", [*A, 2, 2, 2, 1], 8)
    assert match.partial is not None and match.partial_tokens == 3
    assert match.partial[0].tokens == [2, 2, 2, 0]


def test_matching_changes_neither_counts_nor_what_goes_next() -> None:
    cache = Cache()
    cache.leave(A)
    cache.leave(C)
    counts = list(cache.pool.ref_count)
    assert cache.known(A) == 4
    assert cache.pool.ref_count == counts
    cache.evict(1)
    assert (cache.known(A), cache.known(C)) == (0, 4)


def test_prefixes_are_met_only_under_their_own_salt() -> None:
    cache = Cache()
    cache.leave(A + C, salt="a")
    assert cache.known(A + C, salt="a") == 8
    assert cache.known(A + C) == cache.known(A + C, salt="b") == 0


def test_a_salt_is_forgotten_with_its_last_prefix() -> None:
    cache = Cache()
    cache.leave(A, salt="a")
    root = cache.tree.root("a")
    cache.evict(1)
    assert cache.tree.root("a") is not root
    cache.leave(C, salt="b")
    cache.tree.drop("b")
    assert (cache.known(C, salt="b"), cache.pool.num_free) == (0, 16)


# ---- insert and split


def test_who_computed_what_is_there_goes_on_with_the_blocks_that_are_there() -> None:
    cache = Cache()
    first, second = cache.publish(A + C), cache.publish([*A, 1, 1, 1, 1])
    assert second.own[0][0] != first.table[0][0] == second.table[0][0]
    assert second.table[0][1] == second.own[0][1]
    assert cache.pool.ref_count[second.own[0][0]] == 0  # given up
    assert cache.pool.ref_count[first.table[0][0]] == 3  # two requests and the tree
    cache.check()


def test_an_edge_is_split_at_the_block_where_prefixes_part() -> None:
    cache = Cache()
    whole = cache.publish(A + C + [1, 1, 1, 1])
    other = cache.publish([*A, 2, 2, 2, 0])
    assert whole.node.tokens == [*C, 1, 1, 1, 1]  # who ended there still ends there
    assert whole.node.parent is other.node.parent
    assert whole.node.parent is not None and whole.node.parent.tokens == A
    assert cache.blocks(A + C + [1, 1, 1, 1]) == whole.table[0]
    assert cache.blocks([*A, 2, 2, 2, 0]) == other.table[0]
    cache.check()


def test_a_split_at_the_end_is_none_and_one_before_it_leaves_locks_and_children_below() -> None:
    cache = Cache()
    held = cache.publish(A + C)
    cache.leave(A + C + [1, 1, 1, 1])
    assert cache.tree.split(held.node, 2) is held.node
    upper = cache.tree.split(held.node, 1)
    assert (upper.tokens, upper.locks, held.node.tokens, held.node.locks) == (A, 0, C, 1)
    assert [node.tokens for node in upper.descendants()] == [C, [1, 1, 1, 1]]
    cache.check()


def test_an_end_grows_in_place_where_nobody_else_ends_and_else_by_a_child() -> None:
    cache = Cache()
    first = cache.publish(A)
    grown = cache.publish(C, after=first)
    assert grown.node is first.node and grown.node.tokens == A + C
    second = cache.publish(A + C)  # ends at the same node
    child = cache.publish([1, 1, 1, 1], after=grown)
    assert child.node is not grown.node and child.node.parent is second.node
    assert second.node.tokens == A + C
    cache.check()


# ---- tails


def test_a_block_that_is_not_full_is_known_to_its_last_token_and_not_beyond() -> None:
    cache = Cache()
    held = cache.publish([*A, 2, 2])
    assert cache.known(A + C) == 6
    match = cache.tree.match("", A + C, 8)
    assert match.partial == (held.tail, 0) and len(match.columns) == 1


def test_a_tail_gives_way_to_a_longer_block_and_is_not_kept_twice() -> None:
    cache = Cache()
    tail = cache.publish([*A, 2, 2]).tail
    again = cache.publish([*A, 2])
    assert tail is not None and again.tail is None
    longer = cache.publish(A + C)
    assert tail.parent is None and longer.node.tokens == C
    assert cache.publish([*A, 2, 2, 2]).tail is None
    assert cache.known(A + C) == 8
    cache.check()


def test_a_tail_is_not_kept_twice_behind_more_siblings_than_a_search_compares() -> None:
    cache = Cache(num_blocks=200)
    tails = [[2, *divmod(i, 10)] for i in range(100)]
    first = [cache.leave(A + tail).tail for tail in tails]
    cache.check()
    for tail, kept in zip(tails, first, strict=True):
        assert kept is not None and cache.leave(A + tail).tail is None
        assert cache.tree.match("", A + tail, 7).partial is not None
    cache.check()
    cache.evict(cache.pool.num_idle)
    assert cache.known(A) == 0


def test_a_tail_whose_owner_went_on_is_forgotten_and_one_that_is_gone_stays_so() -> None:
    cache = Cache()
    held = cache.publish([*A, 2, 2])
    assert held.tail is not None
    cache.tree.remove_tail(held.tail)
    cache.tree.remove_tail(held.tail)
    assert cache.known([*A, 2, 2]) == 4
    cache.check()


# ---- eviction


def test_the_least_recently_used_leaf_goes_first_and_from_its_end() -> None:
    cache = Cache()
    cache.leave(A + A)
    cache.leave(C + C)
    cache.evict(1)
    assert (cache.known(A + A), cache.known(C + C)) == (4, 8)
    cache.evict(2)
    assert (cache.known(A + A), cache.known(C + C)) == (0, 4)


def test_what_is_used_again_goes_later() -> None:
    cache = Cache()
    first = cache.leave(A)
    cache.leave(C)
    cache.tree.touch(first.node)
    cache.evict(1)
    assert (cache.known(A), cache.known(C)) == (4, 0)


def test_the_use_of_a_prefix_is_use_of_all_of_its_path_and_no_node_goes_before_its_children() -> (
    None
):
    cache = Cache()
    cache.leave(A)
    cache.leave(C)
    cache.leave(A + C)  # the path of A is now the newest
    cache.evict(1)
    assert (cache.known(A + C), cache.known(C)) == (8, 0)
    cache.evict(1)
    assert cache.known(A + C) == 4


def test_what_a_request_holds_stays_with_all_that_comes_before_it() -> None:
    cache = Cache()
    held = cache.publish(A + C)
    cache.leave(A + C + C + C)
    cache.leave([1, 1, 1, 1])
    cache.evict(3)
    assert cache.pool.num_idle == 0
    assert cache.known(A + C + C) == 8
    with pytest.raises(AssertionError, match="1 blocks are to be evicted, and 0 are idle"):
        cache.tree.evict(1)
    cache.release(held)
    cache.evict(2)
    assert cache.pool.num_free == 16


def test_a_locked_node_stays_though_no_request_holds_its_blocks() -> None:
    cache = Cache()
    planned = cache.leave(A)
    cache.leave(C)
    planned.node.locks += 1
    cache.evict(1)
    assert (cache.known(A), cache.known(C)) == (4, 0)


def test_everything_is_dropped_at_once_and_holders_keep_their_blocks() -> None:
    cache = Cache()
    held = cache.publish(A)
    cache.leave(C)
    cache.tree.drop_all()
    assert (cache.known(A), cache.known(C), cache.pool.num_free) == (0, 0, 15)
    assert cache.pool.ref_count[held.table[0][0]] == 1
    cache.check()


def test_a_path_may_be_deeper_than_the_stack_of_python() -> None:
    cache = Cache(num_blocks=2400)
    tokens: list[int] = []
    for _ in range(1100):  # each begins with all of the one before, and is a node of its own
        tokens = [*tokens, *A]
        cache.publish(tokens)
    cache.check()
    cache.tree.drop_all()
    assert cache.known(tokens) == 0


def test_the_book_of_leaves_does_not_grow_with_time() -> None:
    cache = Cache()
    held = cache.leave(A)
    for _ in range(10_000):
        cache.tree.clock += 1
        cache.tree.touch(held.node)
    assert len(cache.tree._order) <= 2048
    cache.evict(1)
    assert cache.known(A) == 0


# ---- windows


def test_a_block_behind_a_window_goes_from_the_middle_and_leaves_a_hole() -> None:
    cache = Cache(windowed=[False, True])
    held = cache.publish(A + C)
    cache.pass_by(held)
    cache.evict(1)
    assert cache.blocks(A + C, group=1) == [HOLE, held.table[1][1]]
    assert cache.blocks(A + C) == held.table[0]


def test_who_computes_what_is_behind_a_hole_fills_it() -> None:
    cache = Cache(windowed=[False, True])
    held = cache.publish(A + C)
    cache.pass_by(held)
    cache.evict(1)
    other = cache.publish(A + C)
    assert other.table[0] == held.table[0]
    assert cache.blocks(A + C, group=1) == [other.own[1][0], held.table[1][1]]
    cache.check()


def test_a_block_behind_a_window_that_is_held_again_is_no_longer_free_to_go() -> None:
    cache = Cache(windowed=[False, True])
    held = cache.publish(A + C)
    cache.pool.share(cache.pass_by(held))
    cache.leave([1, 1, 1, 1])
    cache.evict(2)
    assert cache.blocks(A + C, group=1) == held.table[1]


# ---- the second tier


def test_an_edge_that_must_go_is_saved_and_still_known() -> None:
    cache = Cache(num_slots=4)
    held = cache.leave(A + C)
    (op,) = cache.evict(1)
    assert (op.kind, op.source) == ("save", held.table[0][1])
    assert cache.known(A + C) == 8
    columns = cache.tree.match("", A + C, 8).columns
    assert [node.slots for node, _ in columns] == [None, [[op.target]]]


def test_what_was_saved_is_loaded_into_blocks_of_the_callers() -> None:
    cache = Cache(num_slots=4)
    cache.leave(A + C)
    slots = [op.target for op in cache.evict(2)]
    ((node, _), _) = cache.tree.match("", A + C, 8).columns
    first, second = cache.pool.take(), cache.pool.take()
    cache.tree.promote(node, [[first, second]])
    assert cache.tree.ops == [BlockOp("load", slots[0], first), BlockOp("load", slots[1], second)]
    assert cache.blocks(A + C) == [first, second] and cache.tier.num_loaded == 2
    assert cache.pool.ref_count[first] == 2  # the caller's and the tree's
    cache.check()


def test_a_full_tier_forgets_its_oldest_leaf_that_nobody_needs() -> None:
    cache = Cache(num_slots=2)
    for tokens in (A, C, [1, 1, 1, 1]):
        cache.leave(tokens)
    cache.evict(2)
    node = cache.tree.match("", A, 4).columns[0][0]
    node.locks += 1
    cache.evict(1)
    assert [cache.known(tokens) for tokens in (A, C, [1, 1, 1, 1])] == [4, 0, 4]


@pytest.mark.parametrize(("num_slots", "saving_pays"), [(4, False), (1, True)])
def test_nothing_is_saved_where_it_does_not_pay_or_has_no_room(
    num_slots: int, saving_pays: bool
) -> None:
    cache = Cache(num_slots=num_slots, saving_pays=saving_pays)
    cache.leave(A + C)
    assert cache.evict(2) == []
    assert cache.known(A + C) == 0


def test_who_computes_what_was_saved_brings_it_back_without_loading() -> None:
    cache = Cache(num_slots=2)
    cache.leave(A + C)
    cache.evict(2)
    again = cache.publish(A + C)
    assert cache.blocks(A + C) == again.own[0] and cache.tier.num_loaded == 0
    cache.release(again)
    assert len(cache.evict(2)) == 2  # both slots were free again
    cache.check()


def test_a_tier_costs_what_is_used_of_it() -> None:
    cache = Cache(num_slots=1 << 60)
    cache.leave(A + C)
    assert [op.target for op in cache.evict(2)] == [0, 1]
    cache.check()


def test_a_hole_is_neither_saved_nor_loaded() -> None:
    cache = Cache(windowed=[False, True], num_slots=8)
    held = cache.publish(A + C)
    cache.pass_by(held)
    del held.table[1][0]
    assert cache.evict(1) == []
    cache.release(held)
    saved = cache.evict(3)
    assert sorted(op.source for op in saved) == sorted([*held.table[0], *held.table[1]])
    first = cache.tree.match("", A, 4).columns[0][0]
    assert first.slots is not None and first.slots[1][0] == HOLE
