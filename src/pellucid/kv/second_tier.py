"""The second, larger memory behind the cache, as integers: which of its slots are free, and which
saved edges are forgotten when it is full.

A slot holds one block. An evicted edge may be saved here. It stays in the tree, so it can still be
hit, at the price of loading it. `storage` moves the bytes, as the returned `BlockOp`s say.
"""

from collections.abc import Callable, Iterable

from ..batch import BlockOp
from .draft_coverage import DraftCoverage
from .eviction import LeafOrder
from .node import HOLE, Node

__all__ = ["SecondTier"]


class SecondTier:
    """Owns the slots: each is free, or holds one block of one saved edge."""

    def __init__(
        self, num_slots: int, saving_pays: Callable[[], bool], coverage: DraftCoverage | None = None
    ) -> None:
        """`num_slots` is 0 if there is no second tier; `saving_pays` is called before each edge is
        saved. `coverage` follows the blocks, if there is one.
        """
        self.num_slots = num_slots
        self.num_loaded = 0  # blocks that were loaded, so far
        self.leaves = LeafOrder(is_saved=True)
        self._saving_pays = saving_pays
        self._coverage = coverage
        # slots that were given back, and the number ever used: a list of all would be too long
        self._free: list[int] = []
        self._num_used = 0

    @property
    def num_free(self) -> int:
        return self.num_slots - self._num_used + len(self._free)

    def takes(self, num_blocks: int) -> bool:
        """Whether an edge of this many blocks should be saved."""
        return num_blocks <= self.num_slots and self._saving_pays()

    def save(self, block: int) -> BlockOp:
        """Save a block in a free slot."""
        if not self._free:
            self._free.append(self._num_used)
            self._num_used += 1
        slot = self._free.pop()
        if self._coverage is not None:
            self._coverage.save(block, slot)
        return BlockOp("save", block, slot)

    def load(self, slot: int, block: int) -> BlockOp:
        """Copy a slot into a block; the slot stays taken."""
        self.num_loaded += 1
        if self._coverage is not None:
            self._coverage.load(slot, block)
        return BlockOp("load", slot, block)

    def free(self, rows: Iterable[Iterable[int]]) -> None:
        """Give back the slots of an edge, group by group."""
        self._free += [slot for row in rows for slot in row if slot != HOLE]

    def oldest_leaf(self) -> Node | None:
        """The saved edge that is dropped next: a leaf that no request needs; or None."""
        locked, found = [], None
        while found is None and (entry := self.leaves.pop()) is not None:
            if entry.node.children:
                continue  # it is offered again when its last child is removed
            if entry.node.locks:
                locked.append(entry.node)
            else:
                found = entry.node
        for node in locked:
            self.leaves.offer(node)
        return found

    def check_integrity(self, used: Iterable[int]) -> None:
        """Raise AssertionError unless each slot that was ever used is either given back or owned by
        one saved edge.
        """
        if sorted([*self._free, *used]) != list(range(self._num_used)):
            raise AssertionError("a slot of the tier is lost, or used twice")
