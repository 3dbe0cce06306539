"""Who holds which KV blocks: all that the scheduler sees of the cache.

One idea: a request's block table grows as its tokens are computed, and position i of a request lies in slot
`table[i // block_size] · block_size + i % block_size`. Integers only; the bytes are in `storage`.
"""

from ..request import Request
from .block_pool import BlockPool
from .layout import KVLayout

__all__ = ["KVCacheManager"]


class KVCacheManager:
    """Owns the block tables of the requests that have one."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self._pool = BlockPool(num_blocks)
        self._tables: dict[str, list[int]] = {}  # request_id -> blocks, in order of position

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def capacity(self) -> int:
        """Tokens that one request alone may hold."""
        return self._pool.num_blocks * self.layout.block_size

    def allocate_slots(self, request: Request, num_new_tokens: int) -> bool:
        """Make room for the next num_new_tokens of a request: all of them and True, or nothing and False."""
        table = self._tables.get(request.request_id, [])
        missing = self.layout.blocks_for(request.num_computed_tokens + num_new_tokens) - len(table)
        blocks = self._pool.allocate(max(0, missing))
        if blocks is None:
            return False
        self._tables[request.request_id] = table + blocks
        return True

    def block_table(self, request: Request) -> list[int]:
        """The request's blocks in order. The list is never changed afterwards."""
        return self._tables[request.request_id]

    def free(self, request: Request) -> None:
        """Give back all that a request holds, if it holds anything."""
        self._pool.free(self._tables.pop(request.request_id, []))

    def check_integrity(self) -> None:
        """Raise AssertionError where tables share a block, or do not add up to what the pool has given out."""
        self._pool.check_integrity()
        held = [block for table in self._tables.values() for block in table]
        if len(set(held)) != len(held):
            raise AssertionError("two block tables share a block")
        if len(held) + self._pool.num_free != self._pool.num_blocks:
            raise AssertionError(f"{len(held)} blocks in tables + {self._pool.num_free} free are not {self._pool.num_blocks}")
