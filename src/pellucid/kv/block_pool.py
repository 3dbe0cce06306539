"""Fixed-size blocks of KV memory, as integers: which are free, and how many holders each of the
others has.

A block is an index into every layer's storage. Its reference count is the number of its holders:
requests, and the prefix tree as one. A block with count 0 is free. A block that only the tree holds
is `idle`: requests may hit it, and it is evicted when memory is needed. All operations take O(1).
The pool stores only integers: no requests, and no memory of the blocks.
"""

__all__ = ["BlockPool"]


class BlockPool:
    """Each block is either in the free list once, or has as many holders as its count says."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_count = [0] * num_blocks
        self.num_idle = 0  # blocks that only the tree holds
        self._cached = bytearray(num_blocks)  # blocks that the tree holds
        # a stack: the block freed last is given out next, while its memory is warm
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: free, or held by the tree alone."""
        return len(self._free) + self.num_idle

    def is_cached(self, block: int) -> bool:
        """True where the tree holds the block."""
        return bool(self._cached[block])

    def is_idle(self, block: int) -> bool:
        """True where only the tree holds the block."""
        return self.ref_count[block] == 1 and bool(self._cached[block])

    def take(self) -> int:
        """Allocate a free block, with one holder. The caller has checked that there is one."""
        block = self._free.pop()
        self.ref_count[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a request to the block's holders."""
        if self.ref_count[block] == 0:
            raise AssertionError(f"block {block} is shared, but nobody holds it")
        if self.is_idle(block):
            self.num_idle -= 1
        self.ref_count[block] += 1

    def release(self, block: int) -> None:
        """Remove a request from the block's holders."""
        if self.ref_count[block] <= self._cached[block]:
            raise AssertionError(f"block {block} is released, but no request holds it")
        self._drop(block)
        if self.is_idle(block):
            self.num_idle += 1

    def cache(self, block: int) -> None:
        """Add the tree to the block's holders."""
        if self._cached[block] or self.ref_count[block] == 0:
            raise AssertionError(f"block {block} is published twice, or after it was freed")
        self._cached[block] = 1
        self.ref_count[block] += 1

    def uncache(self, block: int) -> None:
        """Remove the tree from the block's holders."""
        if not self._cached[block]:
            raise AssertionError(f"block {block} is evicted, but the tree does not hold it")
        if self.is_idle(block):
            self.num_idle -= 1
        self._cached[block] = 0
        self._drop(block)

    def _drop(self, block: int) -> None:
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self._free.append(block)

    def check_integrity(self) -> None:
        """Raise AssertionError where a block is lost, free twice, or both free and held."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is in the free list twice")
        for block, count in enumerate(self.ref_count):
            if (count == 0) != (block in free):
                raise AssertionError(
                    f"block {block} has {count} holders and is "
                    f"{'' if block in free else 'not '}in the free list"
                )
        if self.num_idle != (idle := sum(self.is_idle(block) for block in range(self.num_blocks))):
            raise AssertionError(f"{self.num_idle} idle blocks are counted, and {idle} are idle")
