"""Which cached blocks are evicted next: the least recently used first.

An entry is pushed when a leaf or a block becomes evictable. Entries are never searched for or
updated: one that has become wrong is stale, and is skipped when it reaches the top of the heap. So
each operation takes O(log n).
"""

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from .block_pool import BlockPool
from .node import Node

__all__ = ["EvictionOrder", "Leaf", "LeafOrder", "PassedBlock"]

_FEW = 1024  # entries up to which the heap is not cleared of stale ones


class Leaf(NamedTuple):
    """An edge that may be evicted from its end, unless a request holds it."""

    stamp: int  # of the node when it was offered: a later use makes the entry stale
    order: int  # among equal stamps, the entry that was offered first is evicted first
    node: Node


class PassedBlock(NamedTuple):
    """A block behind a window: it may be evicted before the rest of its edge."""

    stamp: int
    order: int
    block: int


_Entry = TypeVar("_Entry", Leaf, PassedBlock)


class _LazyHeap(Generic[_Entry]):
    """Entries by stamp. `is_current` is False for stale ones."""

    def __init__(self, is_current: Callable[[_Entry], bool]) -> None:
        self._is_current: Callable[[_Entry], bool] = is_current
        self._entries: list[_Entry] = []
        self._most = _FEW

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, entry: _Entry) -> None:
        heapq.heappush(self._entries, entry)
        if len(self._entries) > self._most:
            # drop stale entries, so that the heap's size is bounded by the cache, not by time
            self._entries = [entry for entry in self._entries if self._is_current(entry)]
            heapq.heapify(self._entries)
            self._most = 2 * len(self._entries) + _FEW

    def first(self) -> _Entry | None:
        """The next entry; stale ones before it are dropped."""
        while self._entries and not self._is_current(self._entries[0]):
            heapq.heappop(self._entries)
        return self._entries[0] if self._entries else None

    def pop(self) -> _Entry | None:
        return None if self.first() is None else heapq.heappop(self._entries)

    def clear(self) -> None:
        self._entries.clear()


class LeafOrder:
    """Leaves of one memory, the least recently used first."""

    def __init__(self, is_saved: bool) -> None:
        """`is_saved`: edges of the second tier, not of the cache."""
        self._order = itertools.count()
        self._heap: _LazyHeap[Leaf] = _LazyHeap(
            lambda entry: (
                entry.stamp == entry.node.stamp
                and entry.node.parent is not None
                and (entry.node.slots is not None) is is_saved
            )
        )

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, node: Node) -> None:
        self._heap.push(Leaf(node.stamp, next(self._order), node))

    def first(self) -> Leaf | None:
        return self._heap.first()

    def pop(self) -> Leaf | None:
        return self._heap.pop()

    def clear(self) -> None:
        self._heap.clear()


class EvictionOrder:
    """What may be evicted from the cache: leaves, and blocks behind windows."""

    def __init__(self, pool: BlockPool) -> None:
        self.leaves = LeafOrder(is_saved=False)
        self._order = itertools.count()
        self._passed: _LazyHeap[PassedBlock] = _LazyHeap(lambda entry: pool.is_idle(entry.block))

    def __len__(self) -> int:
        return len(self.leaves) + len(self._passed)

    def offer_block(self, block: int, stamp: int) -> None:
        """A block behind a window may be evicted from now on."""
        self._passed.push(PassedBlock(stamp, next(self._order), block))

    def pop(self) -> Leaf | PassedBlock | None:
        """What is evicted next; a leaf comes before a block with the same stamp."""
        leaf, passed = self.leaves.first(), self._passed.first()
        if passed is None or (leaf is not None and leaf.stamp <= passed.stamp):
            return self.leaves.pop()
        return self._passed.pop()

    def clear(self) -> None:
        self.leaves.clear()
        self._passed.clear()
