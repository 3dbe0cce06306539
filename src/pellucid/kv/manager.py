"""Which request holds which KV blocks. This is the scheduler's only interface to the cache.

A request's block tables grow as its tokens are computed, one table per layer group. Position i lies
in slot `table[i // block_size] · block_size + i % block_size`. Computed blocks are published in the
prefix tree, where requests with the same prefix hit them. A preempted request gives its blocks
back, and hits them in the tree when it resumes.

    lookup → admit → (allocate_slots → publish) … → release

Integers only: `take_ops()` lists what must be done with the bytes, and `storage` does it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..batch import BlockOp
from ..request import Request
from .block_pool import BlockPool
from .draft_coverage import DraftCoverage
from .layout import KVLayout
from .node import HOLE, Match, Node, kept
from .radix_tree import RadixTree
from .second_tier import SecondTier

__all__ = ["Hit", "KVCacheManager"]


@dataclass(slots=True)
class Hit:
    """A cached prefix of a request: its first `num_tokens` need not be computed."""

    num_tokens: int
    match: Match  # only the columns and the partial column that will be used


@dataclass(slots=True)
class _Held:
    """What a running request holds."""

    request: Request
    salt: str
    node: Node  # the end of its published prefix
    num_published: int  # tokens of that prefix: a multiple of block_size
    tables: list[list[int]]  # per group: the request's blocks in order; HOLE: behind the window
    first: list[int]  # per group: the first column that is still held
    tail: Node | None = None  # its last block, published before it was full


class KVCacheManager:
    """Owns the block tables of the running requests, and the tree of published prefixes."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        enable_prefix_caching: bool = True,
        num_slots: int = 0,
        saving_pays: Callable[[], bool] = lambda: True,
        coverage: DraftCoverage | None = None,
    ) -> None:
        """`num_slots`: blocks in the second tier; `saving_pays` is called before each save.
        `coverage` follows the blocks, if a draft model's keys and values lie in them too.
        """
        self.layout = layout
        self._coverage = coverage
        self.enable_prefix_caching = enable_prefix_caching
        self._pool = BlockPool(num_blocks)
        windowed = [group.window is not None for group in layout.groups]
        self._windowed = any(windowed)
        self._tier = SecondTier(num_slots, saving_pays, coverage)
        self._tree = RadixTree(self._pool, windowed, layout.block_size, self._tier)
        self._held: dict[str, _Held] = {}  # by request_id

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks without a holder."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that the prefix tree alone holds."""
        return self._pool.num_idle

    @property
    def num_available_blocks(self) -> int:
        """Blocks that no request holds."""
        return self._pool.num_available

    @property
    def num_saved_blocks(self) -> int:
        """Evicted blocks that the second memory holds now."""
        return self._tier.num_slots - self._tier.num_free

    @property
    def num_loaded_blocks(self) -> int:
        """Blocks that were brought back from the second memory, so far."""
        return self._tier.num_loaded

    def capacity(self, chunk: int, at_most: int) -> int:
        """Tokens that one request alone may hold, up to `at_most`, computed `chunk` at a time."""
        return self.layout.tokens_in(self.num_blocks, chunk, at_most)

    # ---- starting

    def lookup(self, request: Request, *, whole_blocks: bool = False) -> Hit:
        """The longest cached prefix, without the tokens that must be computed."""
        limit = request.num_reusable
        match = self._tree.match(self._salt(request), request.token_ids(0, limit), limit)
        size, partial = self.layout.block_size, match.partial
        groups = range(len(self.layout.groups))
        # The block in which a hit ends is copied, so every group must have it.
        whole = len(match.columns) * size
        length = whole + match.partial_tokens
        if whole_blocks or (partial is not None and not all(_has(partial, g) for g in groups)):
            length = whole
        # If a group cannot serve the length, it is shortened for all groups.
        while length and (shorter := min(self._usable(g, match, length) for g in groups)) < length:
            length = shorter
        if length <= whole:
            match.partial, match.partial_tokens = None, 0
        del match.columns[length // size :]
        return Hit(length, match)

    def _usable(self, group: int, match: Match, length: int) -> int:
        """How many tokens of a hit a group can serve: those before its last missing block."""
        size = self.layout.block_size
        first = self.layout.groups[group].first_needed(length, size)
        for i in range(min(length // size, len(match.columns)) - 1, first - 1, -1):
            if not _has(match.columns[i], group):
                return i * size
        return length

    def admit(self, request: Request, hit: Hit, num_new_tokens: int) -> bool:
        """Start a request: share the blocks that it hit, allocate slots for its next tokens. False,
        with nothing changed, if it does not fit. The columns of each group's table, in order:

            before `first`          HOLE: behind the window of the next token
            … len(columns) - 1      blocks of the hit: shared in memory, or loaded from the tier
            len(columns)            a copy of the block in which the hit ends, if it ends inside one
            up to the new tokens    free blocks
        """
        # Do all known tokens fit? If not, the request would soon be preempted again.
        size, groups = self.layout.block_size, self.layout.groups
        columns, partial = hit.match.columns, hit.match.partial
        first = [group.first_needed(hit.num_tokens, size) for group in groups]
        kept = [(node, i, g) for g in range(len(groups)) for node, i in columns[first[g] :]]
        shared = [node.blocks[g][i] for node, i, g in kept if node.slots is None]
        copied = _blocks(partial)
        held_back = sum(self._pool.is_idle(block) for block in shared + copied)
        total = self.layout.blocks_for(request.num_tokens, num_new_tokens)
        if total - len(shared) > self._pool.num_available - held_back:
            # it may fit without the block that is copied
            return bool(copied) and self.admit(
                request, self.lookup(request, whole_blocks=True), num_new_tokens
            )
        # Split the path where the hit ends, and lock it: nothing below may evict it.
        path = list(dict.fromkeys(node for node, _ in columns))
        if path:
            lower, length = path[-1], columns[-1][1] + 1
            path[-1] = self._tree.split(lower, length)
            if partial is not None and partial[0] is lower and path[-1] is not lower:
                partial = (lower, partial[1] - length)
        for node in path:
            node.locks += 1
        for block in shared:
            self._pool.share(block)
        # Copy the block in which the hit ends, before loads can evict it.
        targets = [] if partial is None else self._copy_partial(*partial, hit.match.partial_tokens)
        # Build the tables, node by node; load saved nodes.
        tables: list[list[int]] = [[] for _ in groups]
        for node in path:
            if node.slots is not None:
                self._promote(node, [f - len(tables[0]) for f in first])
            for table, row in zip(tables, node.blocks, strict=True):
                table += row
        for g, table in enumerate(tables):
            table[: first[g]] = [HOLE] * first[g]
        # Keep the lock on the end of the path for the request; release the others.
        end = path[-1] if path else self._tree.root(self._salt(request))
        held = _Held(request, self._salt(request), end, len(columns) * size, tables, first)
        end.locks += 1
        for node in path:
            node.locks -= 1
        self._tree.touch(end)
        self._held[request.request_id] = held
        # Append the copy and free blocks.
        for table, target in zip(tables, targets, strict=False):
            table.append(target)
        self._grow(held, hit.num_tokens + num_new_tokens)
        request.num_computed_tokens, request.block_tables = hit.num_tokens, tables
        request.next_kv_event = self._next_event(held)
        return True

    def _promote(self, node: Node, first: list[int]) -> None:
        """Load a saved node: of group g the columns from `first[g]` on; others are not read."""
        assert node.slots is not None
        wanted = [
            [slot != HOLE and i >= first[g] for i, slot in enumerate(row)]
            for g, row in enumerate(node.slots)
        ]
        fresh = iter(self._take(sum(map(sum, wanted))))
        blocks = [[next(fresh) if want else HOLE for want in row] for row in wanted]
        self._tree.promote(node, blocks)

    def _copy_partial(self, node: Node, column: int, num_tokens: int) -> list[int]:
        """Copy-on-write: the hit ends inside a block that others may hold, so the request goes on
        in a copy of it, from `num_tokens` on. The copies, one for each group.

        Making room for the copy must not evict its source. So the source is held until the copy is
        listed in `ops`: a block is shared, or the node of a slot is locked.
        """
        self._tree.touch(node)
        if node.slots is not None:
            sources = [row[column] for row in node.slots]
            node.locks += 1
            targets = self._take(len(sources))
            node.locks -= 1
            self._tree.load(list(zip(sources, targets, strict=True)))
        else:
            sources = [row[column] for row in node.blocks]
            for block in sources:
                self._pool.share(block)
            targets = self._take(len(sources))
            for source, target in zip(sources, targets, strict=True):
                self._tree.ops.append(BlockOp("copy", source, target))
                if self._coverage is not None:
                    self._coverage.copy(source, target)
            for block in sources:
                self._pool.release(block)
                self._tree.offer_block(block)
        if self._coverage is not None:
            self._coverage.limit(targets, num_tokens)
        return targets

    # ---- running: a request calls allocate_slots and publish only at its `next_kv_event`, which in
    # decode comes once per block

    def allocate_slots(self, request: Request, num_new_tokens: int) -> bool:
        """Allocate slots for a running request's next tokens: all (True) or none (False)."""
        held = self._held[request.request_id]
        stop = request.num_computed_tokens + num_new_tokens
        if self._windowed:
            self._leave_behind(held, request.num_computed_tokens)
        columns = self.layout.columns_for(stop)
        if sum(max(0, columns - len(table)) for table in held.tables) > self._pool.num_available:
            return False
        self._grow(held, stop)
        request.next_kv_event = self._next_event(held)
        return True

    def give_back_slots(self, request: Request, num_tokens: int) -> bool:
        """Give back the blocks behind a running request's first `num_tokens` slots. They were
        allocated for drafts: nothing in them is published. False if there are none.
        """
        held = self._held[request.request_id]
        columns = self.layout.columns_for(num_tokens)
        if columns >= len(held.tables[0]):
            return False
        for table in held.tables:
            for block in table[columns:]:
                self._pool.release(block)
            del table[columns:]
        request.next_kv_event = self._next_event(held)
        return True

    def _next_event(self, held: _Held) -> int:
        """The next count of computed tokens at which a block is allocated, published or freed."""
        request, size = held.request, self.layout.block_size
        border = len(held.tables[0]) * size
        if self.enable_prefix_caching:
            border = min(border, held.num_published + size)
            # the prompt's last block is published when the prompt ends
            if request.num_computed_tokens < request.num_prompt_tokens:
                border = min(border, request.num_prompt_tokens)
        if self._windowed:
            for group, first in zip(self.layout.groups, held.first, strict=True):
                if group.window is not None:
                    border = min(border, (first + 1) * size + group.window - 1)
        return border

    def _grow(self, held: _Held, num_tokens: int) -> None:
        columns = self.layout.columns_for(num_tokens)
        for table in held.tables:
            if columns > len(table):
                table += self._take(columns - len(table))

    def _take(self, count: int) -> list[int]:
        if count > self._pool.num_free:
            self._tree.evict(count - self._pool.num_free)
        taken = [self._pool.take() for _ in range(count)]
        if self._coverage is not None:
            self._coverage.clear(taken)
        return taken

    def _leave_behind(self, held: _Held, num_computed_tokens: int) -> None:
        """Give back the blocks that no later token sees."""
        for g, group in enumerate(self.layout.groups):
            table, first = held.tables[g], held.first[g]
            needed = group.first_needed(num_computed_tokens, self.layout.block_size)
            for block in kept([table[first:needed]]):
                self._pool.release(block)
                self._tree.offer_block(block)
            table[first:needed] = [HOLE] * len(table[first:needed])
            held.first[g] = max(first, needed)

    def publish(self, request: Request) -> None:
        """Publish full blocks; at the prompt's end also its last, partial block."""
        if not self.enable_prefix_caching:
            return
        held = self._held[request.request_id]
        computed = request.num_computed_tokens
        if computed - held.num_published >= self.layout.block_size:
            self._publish_blocks(held, request)
        if computed == request.num_prompt_tokens:
            self._publish_tail(held, request)
        request.next_kv_event = self._next_event(held)

    def _publish_blocks(self, held: _Held, request: Request) -> None:
        size = self.layout.block_size
        stop = request.num_computed_tokens // size * size
        if stop == held.num_published:
            return
        first = held.num_published // size
        part = [table[first : stop // size] for table in held.tables]
        self._retract_tail(held)
        node = self._tree.insert(held.node, request.token_ids(held.num_published, stop), part)
        for table, row in zip(held.tables, part, strict=True):
            table[first : stop // size] = row
        held.node.locks -= 1
        node.locks += 1
        held.node, held.num_published = node, stop

    def _publish_tail(self, held: _Held, request: Request) -> None:
        tokens = request.token_ids(held.num_published, request.num_computed_tokens)
        column = held.num_published // self.layout.block_size
        self._retract_tail(held)
        if tokens:
            held.tail = self._tree.insert_tail(
                held.node, tokens, [table[column] for table in held.tables]
            )

    def _retract_tail(self, held: _Held) -> None:
        if held.tail is not None:
            self._tree.remove_tail(held.tail)
            held.tail = None

    # ---- ending

    def release(self, request: Request, *, publish: bool = True) -> None:
        """Give back all blocks of a request, if it holds any. They can be hit until they are
        evicted.

        `publish=False`: its unpublished blocks may be wrong and are not published.
        """
        held = self._held.pop(request.request_id, None)
        is_over = not self.enable_prefix_caching and request.is_finished
        if held is None:
            if is_over:  # it was preempted, and ended while waiting
                self._tree.drop(self._salt(request))
            return
        # Publish what it has computed and not published yet.
        if publish and not is_over:
            self._publish_blocks(held, request)
            self._publish_tail(held, request)
        # Give the blocks back; those that only the tree holds now may be evicted.
        request.block_tables = []
        for block in kept(held.tables):
            self._pool.release(block)
        held.node.locks -= 1
        self._tree.touch(held.node)
        for table, group in zip(held.tables, self.layout.groups, strict=True):
            for block in kept([table]) if group.window is not None else ():
                self._tree.offer_block(block)
        # Forget the salt if no request can hit it any more.
        if is_over:
            self._tree.drop(held.salt)
        else:
            self._tree.close(held.salt)

    def forget(self) -> None:
        """Drop every published prefix: its blocks may be wrong. Running requests keep theirs."""
        self._tree.drop_all()
        for held in self._held.values():
            held.node, held.num_published = self._tree.root(held.salt), 0
            held.node.locks += 1
            held.request.next_kv_event = self._next_event(held)

    def holders(self) -> set[str]:
        """The ids of requests that hold blocks."""
        return set(self._held)

    def begin_step(self) -> None:
        """Advance the clock of the LRU order."""
        self._tree.clock += 1

    def take_ops(self) -> list[BlockOp]:
        """The copies, saves and loads that must be done before the step runs, in order."""
        ops, self._tree.ops = self._tree.ops, []
        return ops

    def _salt(self, request: Request) -> str:
        """The salt whose prefixes a request may hit; its own one without prefix caching."""
        if self.enable_prefix_caching:
            return f"salt {request.cache_salt}"
        return f"request {request.request_id}"

    def check_integrity(self) -> None:
        """Raise AssertionError if counts, tables and tree are inconsistent."""
        self._pool.check_integrity()
        self._tree.check_integrity()
        holders = [int(self._pool.is_cached(block)) for block in range(self.num_blocks)]
        for held in self._held.values():
            request, mine = held.request, kept(held.tables)
            if request.block_tables is not held.tables:
                raise AssertionError("a request does not know its blocks")
            if request.num_computed_tokens < request.next_kv_event and self._has_work(held):
                raise AssertionError("a request does not ask in time")
            if len(set(mine)) != len(mine):
                raise AssertionError("a request holds a block twice")
            for block in mine:
                holders[block] += 1
        if holders != self._pool.ref_count:
            raise AssertionError("the pool counts other holders than the tables and the tree have")

    def _has_work(self, held: _Held) -> bool:
        """True if a block must be allocated, published, or given back behind a window."""
        computed, size = held.request.num_computed_tokens, self.layout.block_size
        return (
            computed >= len(held.tables[0]) * size
            or (self.enable_prefix_caching and computed - held.num_published >= size)
            or any(
                group.first_needed(computed, size) > first
                for group, first in zip(self.layout.groups, held.first, strict=True)
            )
        )


def _blocks(column: tuple[Node, int] | None) -> list[int]:
    """The blocks of a column, if it lies in memory."""
    if column is None or column[0].slots is not None:
        return []
    return [row[column[1]] for row in column[0].blocks]


def _has(column: tuple[Node, int], group: int) -> bool:
    node, i = column
    return (node.blocks if node.slots is None else node.slots)[group][i] != HOLE
