"""Fixed-size blocks of KV memory, as integers: which are free, which are held.

One idea: a block is an index into every layer's storage, so giving memory out is popping a list. Both directions take O(1). The pool knows
nothing of requests, and never touches the memory itself.
"""

from collections.abc import Sequence

__all__ = ["BlockPool"]


class BlockPool:
    """Owns the invariant: each block is either in the free list, once, or held by exactly one owner."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is given out next, while its memory is warm
        self._held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None, and nothing changed, where there are not so many."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._held[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back. The last goes first, so that the next owner gets them in rising order again."""
        for block in reversed(blocks):
            if not self._held[block]:
                raise AssertionError(f"block {block} is freed, but nobody holds it")
            self._held[block] = 0
            self._free.append(block)

    def check_integrity(self) -> None:
        """Raise AssertionError where a block is lost, free twice, or both free and held."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is in the free list twice")
        if any(self._held[block] for block in free):
            raise AssertionError("a block is both free and held")
        if len(free) + sum(self._held) != self.num_blocks:
            raise AssertionError(f"{len(free)} free + {sum(self._held)} held blocks are not {self.num_blocks}")
