"""The prefix tree beside a list: every prefix that was published, with the time of its last use."""

from collections.abc import Sequence
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.kv import radix_tree

from .radix_cache import B, Cache, Held

pytestmark = pytest.mark.slow  # thousands of random steps

SALTS = st.sampled_from(["", "a"])
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class Oracle:
    """A cache of one group, and beside it: every prefix that was published, ending at a block or
    with its sequence; when it was used.
    """

    def __init__(self, num_slots: int) -> None:
        self.cache = Cache(num_blocks=40, num_slots=num_slots)
        self.used: dict[tuple[str, tuple[int, ...]], int] = {}
        # or later: when somebody published a few tokens that it begins with
        self.hinted: dict[tuple[str, tuple[int, ...]], int] = {}
        self.held: list[tuple[str, tuple[int, ...], Held]] = []
        # what a block's publisher computed
        self.in_block: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.in_slot: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.clock = 0

    def prefixes(self, salt: str, tokens: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return [(salt, tokens[: min(i + B, len(tokens))]) for i in range(0, len(tokens), B)]

    def publish(self, salt: str, tokens: list[int]) -> None:
        needed = -(-len(tokens) // B)
        if needed > self.cache.pool.num_available:
            return
        if needed > self.cache.pool.num_free:
            self.evict(needed - self.cache.pool.num_free)
        held = self.cache.publish(tokens, salt)
        whole = tuple(tokens)
        for block, prefix in zip(
            [*held.own[0], *held.table[0][len(held.own[0]) :]],
            self.prefixes(salt, whole),
            strict=True,
        ):
            self.in_block[block] = prefix
        self.held.append((salt, whole, held))
        self.use(salt, whole)

    def use(self, salt: str, tokens: tuple[int, ...]) -> None:
        for prefix in self.prefixes(salt, tokens):
            self.used[prefix] = self.clock
        self.hinted |= {
            longer: self.clock
            for longer in self.used
            if len(tokens) % B and self.covers(longer, (salt, tokens))
        }
        for other in list(self.used):  # a block that is not full, where a longer one begins like it
            if len(other[1]) % B and any(self.covers(longer, other) for longer in self.used):
                del self.used[other]

    @staticmethod
    def covers(longer: tuple[str, tuple[int, ...]], other: tuple[str, tuple[int, ...]]) -> bool:
        return longer != other and longer[0] == other[0] and longer[1][: len(other[1])] == other[1]

    def release(self, which: int) -> None:
        if self.held:
            salt, tokens, held = self.held.pop(which % len(self.held))
            self.cache.release(held)
            self.use(salt, tokens if held.has_tail else tokens[: len(tokens) // B * B])

    def held_prefixes(self) -> set[tuple[str, tuple[int, ...]]]:
        """Those whose block a request holds: of a tail that the tree had already, the publisher's
        own block is another.
        """
        return {
            p
            for salt, tokens, held in self.held
            for p in self.prefixes(salt, tokens)
            if len(p[1]) % B == 0 or held.has_tail
        }

    def evict(self, count: int) -> list[tuple[str, tuple[int, ...]]]:
        """What is known no longer."""
        count = min(count, self.cache.pool.num_idle)
        free = self.cache.pool.num_free
        for op in self.cache.evict(count):
            assert op.kind == "save"
            self.in_slot[op.target] = self.in_block[op.source]
        assert self.cache.pool.num_free == free + count
        return [
            prefix
            for prefix in self.used
            if self.cache.known(list(prefix[1]), prefix[0]) < len(prefix[1])
        ]

    def check_match(self, salt: str, tokens: list[int], *, compares_all: bool = True) -> None:
        match = self.cache.tree.match(salt, tokens, len(tokens))
        found = len(match.columns) * B + match.partial_tokens
        expected = max((_common(tokens, known) for s, known in self.used if s == salt), default=0)
        assert found == expected if compares_all else found <= expected
        columns = [*match.columns, match.partial] if match.partial else match.columns
        for i, (node, column) in enumerate(columns):
            where, row = (
                (self.in_block, node.blocks) if node.slots is None else (self.in_slot, node.slots)
            )
            stop = min((i + 1) * B, found)
            of, content = where[row[0][column]]
            assert (of, content[:stop]) == (salt, tuple(tokens[:stop]))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def actions_with(tokens: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[tuple[str, ...]]]:
    return st.lists(
        st.one_of(
            st.tuples(st.just("publish"), SALTS, tokens),
            st.tuples(st.just("publish"), SALTS, tokens),
            st.tuples(st.just("release"), st.integers(0, 9)),
            st.tuples(st.just("release"), st.integers(0, 9)),
            st.tuples(st.just("evict"), st.integers(1, 6)),
        ),
        min_size=5,
        max_size=40,
    )


ACTIONS = actions_with(TOKENS)
TAILS = st.lists(st.integers(0, 1), min_size=1, max_size=B - 1)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.lists(st.tuples(SALTS, TOKENS), min_size=3, max_size=8))
def test_the_tree_knows_what_the_list_knows_and_forgets_the_least_recently_used(
    actions: list[tuple[str, ...]], queries: list[tuple[str, list[int]]]
) -> None:
    oracle = Oracle(num_slots=0)
    evict = oracle.evict

    def checked(count: int) -> list[tuple[str, tuple[int, ...]]]:
        gone = evict(count)
        held = oracle.held_prefixes()
        stays = [p for p in oracle.used if p not in gone]
        leaves = [
            p
            for p in stays
            if p not in held and not any(oracle.covers(longer, p) for longer in stays)
        ]
        assert not held.intersection(gone)
        assert all(not oracle.covers(left, p) for p in gone for left in stays)
        for p in gone:
            assert all(
                oracle.used[p] <= max(oracle.used[leaf], oracle.hinted.get(leaf, 0))
                for leaf in leaves
            )
            del oracle.used[p]
        return gone

    oracle.evict = checked  # type: ignore[method-assign]
    for name, *arguments in actions:
        oracle.clock += 1
        oracle.cache.tree.clock += 1
        getattr(oracle, name)(*arguments)
        oracle.cache.check()
        for salt, tokens in queries:
            oracle.check_match(salt, tokens)


@settings(max_examples=100, deadline=None)
@given(ACTIONS, st.integers(1, 12), st.lists(st.tuples(SALTS, TOKENS), min_size=3, max_size=8))
def test_with_a_second_tier_too_every_column_holds_what_its_prefix_says(
    actions: list[tuple[str, ...]], num_slots: int, queries: list[tuple[str, list[int]]]
) -> None:
    oracle = Oracle(num_slots)
    evict = oracle.evict

    def checked(count: int) -> list[tuple[str, tuple[int, ...]]]:
        gone = evict(count)
        for p in gone:
            del oracle.used[p]
        return gone

    oracle.evict = checked  # type: ignore[method-assign]
    for name, *arguments in actions:
        getattr(oracle, name)(*arguments)
        oracle.cache.check()
        for salt, tokens in queries:
            oracle.check_match(salt, tokens)


@settings(max_examples=100, deadline=None)
@given(actions_with(TAILS), st.lists(st.tuples(SALTS, TOKENS), min_size=3, max_size=8))
def test_a_match_that_compares_one_sibling_misses_tokens_and_loses_no_block(
    actions: list[tuple[str, ...]], queries: list[tuple[str, list[int]]]
) -> None:
    oracle = Oracle(num_slots=0)
    with mock.patch.object(radix_tree, "_MOST_SIBLINGS", 1):
        for name, *arguments in actions:
            getattr(oracle, name)(*arguments)
            oracle.cache.check()
            for salt, tokens in queries:
                oracle.check_match(salt, tokens, compares_all=False)
