"""How far the keys and values of a draft model are computed: a count for each KV block.

A draft model's layers lie in the stores of the same blocks as the model's own layers. The model
computes every token; the draft computes some of them later, or never. So each block has the number
of its first tokens whose draft KV is there. The count moves with the block's bytes: copied, saved
and loaded. A block of the prefix cache keeps its count, so a request that hits it knows what the
draft still has to compute. Integers only.
"""

from collections.abc import Sequence

__all__ = ["DraftCoverage"]


class DraftCoverage:
    """The counts of all blocks and of the second tier's slots."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._of_block = [0] * num_blocks
        self._of_slot: dict[int, int] = {}
        self._num_owners = [0] * num_blocks  # so far

    def count(self, table: Sequence[int], num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens of a block table are covered without a gap."""
        covered, of_block = 0, self._of_block
        for block in table:
            covered += of_block[block]
            if of_block[block] < self._block_size:
                break
        return min(covered, num_tokens)

    def extend(self, table: Sequence[int], num_tokens: int) -> None:
        """The first `num_tokens` tokens of a block table are covered now."""
        size = self._block_size
        first = self.count(table, num_tokens) // size
        for column in range(first, -(-num_tokens // size)):
            block = table[column]
            self._of_block[block] = max(
                self._of_block[block], min(size, num_tokens - column * size)
            )

    def clear(self, blocks: Sequence[int]) -> None:
        """These blocks have a new owner."""
        for block in blocks:
            self._of_block[block] = 0
            self._num_owners[block] += 1

    def owners(self, table: Sequence[int]) -> list[tuple[int, int]]:
        """Each block, and how many owners it has had. Equal pairs have equal content, but for what
        the owner itself has written since.
        """
        return [(block, self._num_owners[block]) for block in table]

    def copy(self, source: int, target: int) -> None:
        """A block is copied."""
        self._of_block[target] = self._of_block[source]

    def save(self, block: int, slot: int) -> None:
        """A block is saved in a slot of the second tier."""
        self._of_slot[slot] = self._of_block[block]

    def load(self, slot: int, block: int) -> None:
        """A slot is loaded into a block."""
        self._of_block[block] = self._of_slot[slot]

    def limit(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Only the first `num_tokens` tokens of these blocks are their owner's."""
        for block in blocks:
            self._of_block[block] = min(self._of_block[block], num_tokens)
