"""A prefix tree with a pool and publishers, for the tests of the tree by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pellucid.batch import BlockOp
from pellucid.kv.block_pool import BlockPool
from pellucid.kv.node import Node
from pellucid.kv.radix_tree import RadixTree
from pellucid.kv.second_tier import SecondTier

B = 4  # tokens per block
A, C = [0, 1, 2, 3], [2, 2, 2, 2]


class Cache:
    """A tree, its pool, and publishers that hold their blocks until `release`."""

    def __init__(
        self,
        num_blocks: int = 16,
        windowed: Sequence[bool] = (False,),
        num_slots: int = 0,
        saving_pays: bool = True,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_groups = len(windowed)
        self.tier = SecondTier(num_slots, lambda: saving_pays)
        self.tree = RadixTree(self.pool, windowed, B, self.tier)

    def publish(self, tokens: list[int], salt: str = "", after: "Held | None" = None) -> "Held":
        """What a request does: blocks of its own for all tokens, whole ones published, what is left
        over as a tail.
        """
        start = after.node if after else self.tree.root(salt)
        start.locks += after is None
        whole = len(tokens) // B * B
        table = [[self.pool.take() for _ in range(whole // B)] for _ in range(self.num_groups)]
        own = [list(row) for row in table]
        node = self.tree.insert(start, tokens[:whole], table)
        start.locks -= 1
        node.locks += 1
        held = Held(node, table, own)
        if tokens[whole:]:
            last = [self.pool.take() for _ in range(self.num_groups)]
            for row, block in zip(table, last, strict=True):
                row.append(block)
            held.tail = self.tree.insert_tail(node, tokens[whole:], last)
        self.tree.touch(node)
        return held

    def release(self, held: "Held") -> None:
        for row in held.table:
            for block in row:
                self.pool.release(block)
        held.node.locks -= 1
        self.tree.touch(held.end)
        for row in held.table:
            for block in row:
                self.tree.offer_block(block)

    def pass_by(self, held: "Held", group: int = 1, column: int = 0) -> int:
        """The window of a group has passed a block of a request, which gives it back: the block."""
        block = held.table[group][column]
        self.pool.release(block)
        self.tree.offer_block(block)
        return block

    def leave(self, tokens: list[int], salt: str = "") -> "Held":
        """Publish, and let go: idle blocks, used now."""
        held = self.publish(tokens, salt)
        self.release(held)
        self.tree.clock += 1
        return held

    def evict(self, count: int) -> list[BlockOp]:
        self.tree.evict(count)
        ops, self.tree.ops = self.tree.ops, []
        self.check()
        return ops

    def known(self, tokens: list[int], salt: str = "", limit: int | None = None) -> int:
        """How many first tokens the tree has."""
        match = self.tree.match(salt, tokens, len(tokens) if limit is None else limit)
        return len(match.columns) * B + match.partial_tokens

    def blocks(self, tokens: list[int], group: int = 0) -> list[int]:
        return [
            node.blocks[group][i] for node, i in self.tree.match("", tokens, len(tokens)).columns
        ]

    def check(self) -> None:
        self.pool.check_integrity()
        self.tree.check_integrity()


@dataclass
class Held:
    node: Node
    table: list[list[int]]
    own: list[list[int]] = field(default_factory=list)  # the table before the tree had its say
    tail: Node | None = None

    @property
    def has_tail(self) -> bool:
        """True where the tree took its last block, and still has it."""
        return self.end is not self.node

    @property
    def end(self) -> Node:
        """The last node of its path."""
        return self.tail if self.tail is not None and self.tail.parent is not None else self.node
