"""The cached prefixes: a radix tree over tokens whose edges own KV blocks (Zheng et al.,
arXiv:2312.07104).

The keys and values of a position depend only on the tokens up to it. So each path from the root is
a cached prefix, and a new request computes only the tokens behind its longest match. An edge holds
a whole number of blocks; where two prefixes diverge inside an edge, it is split at a block
boundary. A partial last block is a `tail`: a leaf that no path goes through. Requests copy it, so
prefixes match token by token, not only in whole blocks.

Reference counts decide what may be evicted: a request holds every block of its path that it may
still read. Leaves whose blocks only the tree holds are evicted, the least recently used first
(`eviction`), block by block from the end. A block behind a sliding window may be evicted from the
middle of an edge, and leaves a HOLE. An evicted edge may be saved in the second tier
(`second_tier`). It stays in the tree, with `slots` in place of blocks.

Every column of an edge has one block in each layer group. Integers only; copies, saves and loads
are listed in `ops`, in order.
"""

import itertools
from collections.abc import Iterator, Sequence

from ..batch import BlockOp
from .block_pool import BlockPool
from .eviction import EvictionOrder, Leaf
from .node import HOLE, Match, Node, kept
from .second_tier import SecondTier

__all__ = ["RadixTree"]

_MOST_SIBLINGS = 32  # a partial match compares this many children, the newest


class RadixTree:
    """Owns the nodes, their stamps, and the tree's share of the pool's counts."""

    def __init__(
        self, pool: BlockPool, windowed: Sequence[bool], block_size: int, tier: SecondTier
    ) -> None:
        self.ops: list[BlockOp] = []
        self._pool = pool
        self._tier = tier
        self._windowed = windowed  # per group
        self._block_size = block_size
        # per salt: requests hit prefixes of their own salt only
        self._roots: dict[str, Node] = {}
        self.clock = 0  # steps so far: what is used in a later step is newer
        self._order = EvictionOrder(pool)
        # a cached block of a windowed group -> its node and group
        self._home: dict[int, tuple[Node, int]] = {}

    # ---- looking

    def root(self, salt: str) -> Node:
        if salt not in self._roots:
            self._roots[salt] = Node(None, [], [[] for _ in self._windowed], salt)
        return self._roots[salt]

    def close(self, salt: str) -> None:
        """Forget a salt without prefixes: salts are untrusted input, and must not accumulate."""
        root = self._roots.get(salt)
        if root is not None and not root.children and not root.locks:
            del self._roots[salt]

    def match(self, salt: str, tokens: Sequence[int], limit: int) -> Match:
        """The longest cached prefix of tokens[:limit]. Nothing is changed."""
        size, at, columns = self._block_size, 0, []
        node, inside = self._roots.get(salt), 0
        # Go down, block by block.
        while node is not None and at + size <= limit:
            block = tokens[at : at + size]
            if inside == node.columns:
                child = self._child(node, block)
                if child is None:
                    break
                node, inside = child, 0
            elif node.tokens[inside * size : (inside + 1) * size] != block:
                break
            columns.append((node, inside))
            inside += 1
            at += size
        if node is None:
            return Match([], None, 0)
        # Find the next block that shares the most first tokens.
        partial, most = None, 0
        rest = tokens[at : min(limit, at + size)]
        for candidate, column in self._continuations(node, inside, rest):
            same = _common(candidate.tokens[column * size : (column + 1) * size], rest)
            if same > most:
                partial, most = (candidate, column), same
        return Match(columns, partial, most)

    def _child(self, node: Node, block: Sequence[int]) -> Node | None:
        siblings = node.children.get(block[0])
        return siblings.get(tuple(block)) if siblings else None

    def _continuations(
        self, node: Node, inside: int, rest: Sequence[int]
    ) -> Iterator[tuple[Node, int]]:
        """Columns that may follow the first `inside` columns of a node and begin like `rest`."""
        if not rest:
            return
        if inside < node.columns:
            yield node, inside
            return
        siblings = node.children.get(rest[0], {})
        for child in itertools.islice(reversed(siblings.values()), _MOST_SIBLINGS):
            yield child, 0

    # ---- growing

    def insert(self, node: Node, tokens: list[int], table: list[list[int]]) -> Node:
        """Publish full blocks behind the end of `node`: the tokens from i·B on lie in block
        table[g][i]. Returns the node at which the published blocks end.

        Where the tree has a column already, the caller's block is released and replaced by the
        tree's: `table` is changed in place.
        """
        size, done, total, start = self._block_size, 0, len(tokens) // self._block_size, node
        while done < total:
            child = self._child(node, tokens[done * size : (done + 1) * size])
            # Append what is new: on the caller's own edge if no other path ends there.
            if child is None:
                part, extend = [row[done:total] for row in table], node is start and node.locks == 1
                node = self._append(node, tokens[done * size :], part, extend)
                break
            # Count the columns that the child shares: at least the first.
            same, most = 1, min(child.columns, total - done)
            while same < most:
                begin, end = same * size, (same + 1) * size
                if child.tokens[begin:end] != tokens[done * size + begin : done * size + end]:
                    break
                same += 1
            # Use the shared columns, and go on behind them.
            node = self.split(child, same)
            self._join(node, table, done)
            done += same
        return node

    def _append(self, node: Node, tokens: list[int], blocks: list[list[int]], extend: bool) -> Node:
        """Append new columns: to the edge itself (`extend`), or as a child."""
        if node.children:
            self._drop_tails(node, tokens)
        if extend and node.tokens and not node.children:
            node.tokens += tokens
            for row, more in zip(node.blocks, blocks, strict=True):
                row += more
        else:
            node = self._attach(node, tokens, blocks)
        self._take_over(node, blocks)
        self.touch(node)
        return node

    def _attach(self, parent: Node, tokens: list[int], blocks: list[list[int]]) -> Node:
        child = Node(parent, tokens, blocks)
        siblings = parent.children.setdefault(tokens[0], {})
        if siblings.setdefault(tuple(tokens[: self._block_size]), child) is not child:
            raise AssertionError("a child takes another's place, whose blocks stay in the cache")
        return child

    def _take_over(self, node: Node, blocks: list[list[int]]) -> None:
        for group, row in enumerate(blocks):
            for block in row:
                if block != HOLE:
                    self._cache(node, group, block)

    def _cache(self, node: Node, group: int, block: int) -> None:
        self._pool.cache(block)
        if self._windowed[group]:
            self._home[block] = (node, group)

    def _join(self, node: Node, table: list[list[int]], at: int) -> None:
        """Replace the caller's blocks by the node's; fill the node's holes with the caller's."""
        if node.slots is not None:
            self._tier.free(node.slots)
            node.slots = None  # its blocks are HOLEs
        for group, row in enumerate(node.blocks):
            for i, block in enumerate(row):
                own = table[group][at + i]
                if own in (HOLE, block):
                    continue
                if block == HOLE:
                    row[i] = own
                    self._cache(node, group, own)
                else:
                    self._pool.share(block)
                    self._pool.release(own)
                    table[group][at + i] = block

    def insert_tail(self, node: Node, tokens: list[int], blocks: list[int]) -> Node | None:
        """Publish a partial block, for requests to copy. None if its tokens are cached already."""
        known = self._child(node, tokens)  # it may be older than the siblings that are compared
        for other, _ in [(known, 0)] if known else self._continuations(node, node.columns, tokens):
            if _common(other.tokens, tokens) == len(tokens):
                self.touch(other)
                return None
        self._drop_tails(node, tokens)
        tail = self._attach(node, tokens, [[block] for block in blocks])
        self._take_over(tail, tail.blocks)
        self.touch(tail)
        return tail

    def remove_tail(self, tail: Node) -> None:
        """Forget a tail whose owner has published more tokens since."""
        if tail.parent is not None:
            self._remove(tail)

    def _drop_tails(self, node: Node, tokens: list[int]) -> None:
        """Forget tails that a longer block replaces."""
        for length in range(1, min(len(tokens), self._block_size)):
            if tail := self._child(node, tokens[:length]):
                self._remove(tail)

    def split(self, node: Node, columns: int) -> Node:
        """Cut off an edge's first `columns` as a new node; `node` stays the lower end."""
        if columns == node.columns:
            return node
        cut = columns * self._block_size
        assert node.parent is not None
        upper = Node(node.parent, node.tokens[:cut], [row[:columns] for row in node.blocks])
        node.parent.children[node.tokens[0]][tuple(node.tokens[: self._block_size])] = upper
        if node.slots is not None:
            upper.slots = [row[:columns] for row in node.slots]
            node.slots = [row[columns:] for row in node.slots]
        node.tokens, node.parent = node.tokens[cut:], upper
        node.blocks = [row[columns:] for row in node.blocks]
        upper.children = {node.tokens[0]: {tuple(node.tokens[: self._block_size]): node}}
        upper.stamp = node.stamp
        for group, row in enumerate(upper.blocks):
            if self._windowed[group]:
                self._home.update((block, (upper, group)) for block in row if block != HOLE)
        return upper

    # ---- forgetting

    def touch(self, node: Node) -> None:
        """Mark a node and its path as used now, and offer the node for eviction."""
        walk: Node | None = node
        while walk is not None:
            walk.stamp = self.clock
            walk = walk.parent
        self._offer(node)

    def _offer(self, node: Node) -> None:
        if node.slots is not None:
            self._tier.leaves.offer(node)
        elif node.tokens:
            self._order.leaves.offer(node)

    def offer_block(self, block: int) -> None:
        """A block behind a window was released: once idle, it may be evicted before its edge."""
        if self._pool.is_idle(block) and block in self._home:
            self._order.offer_block(block, self.clock)

    def evict(self, count: int) -> None:
        """Free `count` blocks, the least recently used first; at least so many must be idle."""
        wanted = self._pool.num_free + count
        if wanted > self._pool.num_available:
            raise AssertionError(
                f"{count} blocks are to be evicted, and {self._pool.num_idle} are idle"
            )
        offered_all = False
        while self._pool.num_free < wanted:
            entry = self._order.pop()
            if isinstance(entry, Leaf):
                self._shrink(entry.node, wanted)
            elif entry is not None:
                if entry.block in self._home:
                    self._make_hole(entry.block)
            elif not offered_all:
                # entries of edges that were locked were dropped: offer all edges again
                self._offer_all()
                offered_all = True
            else:
                raise AssertionError("idle blocks are left that nothing lets go")

    def _offer_all(self) -> None:
        for root in self._roots.values():
            for node in root.descendants():
                self._offer(node)
                for block in kept(node.blocks):
                    self.offer_block(block)

    def _make_hole(self, block: int) -> None:
        node, group = self._home[block]
        node.blocks[group][node.blocks[group].index(block)] = HOLE
        self._uncache(block)

    def _uncache(self, block: int) -> None:
        self._home.pop(block, None)
        self._pool.uncache(block)

    def _shrink(self, node: Node, wanted: int) -> None:
        """Take columns from the end of an unheld leaf until the pool has `wanted` free blocks."""
        if node.locks or any(
            child.slots is None for same in node.children.values() for child in same.values()
        ):
            return
        # Count the columns to keep: go back from the end up to the first that a request holds.
        free, keep = self._pool.num_free, node.columns
        while keep and free < wanted:
            column = [row[keep - 1] for row in node.blocks if row[keep - 1] != HOLE]
            if not all(self._pool.is_idle(block) for block in column):
                break
            free += len(column)
            keep -= 1
        if keep == node.columns:
            return
        # Split off the columns to keep; `node` is then the evicted part.
        if keep:
            self.split(node, keep)
        parent = node.parent
        assert parent is not None
        if not self._demote(node):
            self._remove(node)
        self._offer(parent)

    def _demote(self, node: Node) -> bool:
        """Save a node's blocks in the tier. False, with `node` unchanged, if it has no room."""
        num_blocks = len(kept(node.blocks))
        if not self._tier.takes(num_blocks):
            return False
        while self._tier.num_free < num_blocks:
            oldest = self._tier.oldest_leaf()
            if oldest is None:
                return False
            self._remove(oldest)
        node.slots = [[self._save(block) for block in row] for row in node.blocks]
        node.blocks = [[HOLE] * len(row) for row in node.blocks]
        self._offer(node)
        return True

    def _save(self, block: int) -> int:
        if block == HOLE:
            return HOLE
        op = self._tier.save(block)
        self.ops.append(op)
        self._uncache(block)
        return op.target

    def load(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy slots of the tier into blocks that the caller holds: (slot, block)."""
        self.ops += [self._tier.load(slot, block) for slot, block in moves]

    def promote(self, node: Node, blocks: list[list[int]]) -> None:
        """Load a node from the tier into the caller's `blocks`; a HOLE's slot is not loaded."""
        assert node.slots is not None
        for slots, row in zip(node.slots, blocks, strict=True):
            self.load(
                [(slot, block) for slot, block in zip(slots, row, strict=True) if block != HOLE]
            )
        self._tier.free(node.slots)
        node.slots, node.blocks = None, [list(row) for row in blocks]
        self._take_over(node, blocks)

    def _remove(self, node: Node) -> None:
        """Forget a node and its descendants."""
        for child in list(node.descendants()):
            self._empty(child)
        self._empty(node)
        assert node.parent is not None
        siblings = node.parent.children[node.tokens[0]]
        del siblings[tuple(node.tokens[: self._block_size])]
        if not siblings:
            del node.parent.children[node.tokens[0]]
        if node.parent.slots is not None:
            self._offer(node.parent)
        elif not node.parent.tokens:
            self.close(node.parent.salt)
        node.parent = None

    def _empty(self, node: Node) -> None:
        self._tier.free(node.slots or ())
        for block in kept(node.blocks):
            self._uncache(block)
        node.slots = None
        node.blocks = [[HOLE] * len(row) for row in node.blocks]

    def drop(self, salt: str) -> None:
        """Forget all prefixes of a salt."""
        root = self._roots.pop(salt, None)
        if root is not None:
            for node in list(root.descendants()):
                self._empty(node)
                node.parent = None

    def drop_all(self) -> None:
        """Forget everything: after a failed step the blocks' content may be wrong."""
        for salt in list(self._roots):
            self.drop(salt)
        self.ops.clear()
        self._order.clear()
        self._tier.leaves.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError if edges, counts or slots are inconsistent."""
        cached: list[int] = []
        slots: list[int] = []
        for root in self._roots.values():
            for node in root.descendants():
                # Check each node's place, lengths and blocks.
                assert node.parent is not None
                if self._child(node.parent, node.tokens[: self._block_size]) is not node:
                    raise AssertionError("a node is not where its first block says")
                columns = -(-len(node.tokens) // self._block_size)
                if any(len(row) != columns for row in node.slots or node.blocks):
                    raise AssertionError(f"a group has not the {columns} columns of its edge")
                if len(node.tokens) % self._block_size and (columns > 1 or node.children):
                    raise AssertionError("a tail is longer than one block, or has children")
                if node.slots is None and node.parent.slots is not None:
                    raise AssertionError("a node is in memory, and what comes before it is not")
                if node.slots is None and any(
                    HOLE in row for row, w in zip(node.blocks, self._windowed, strict=True) if not w
                ):
                    raise AssertionError("a block of a group that sees all is missing")
                # Collect the blocks and slots that it owns.
                cached += kept(node.blocks)
                slots += kept(node.slots or ())
        if len(set(cached)) != len(cached):
            raise AssertionError("two edges own one block")
        if sorted(cached) != list(filter(self._pool.is_cached, range(self._pool.num_blocks))):
            raise AssertionError("the pool counts other blocks as cached than the tree holds")
        self._tier.check_integrity(slots)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
