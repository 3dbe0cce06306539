"""The memory of keys and values: paged stores in the backend's own layout, and a second, larger
memory behind them.

The backend saves, loads and copies blocks as bytes that only it interprets. A block id means
the same place in each store. This is the only file of the room that touches arrays.

A disk may fail while the engine runs. A block that cannot be saved is lost. The failure is logged
once, and nothing is saved from then on. If a step needs a lost block, `LostBlocksError` is raised
and its requests are computed again.
"""

import logging
import math
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..batch import BlockOp
from ..errors import CapacityError
from ..host_memory import lies_in_memory
from ..ops.backend import Backend
from ..ops.protocol import KVLayer
from .layout import KVLayout

if TYPE_CHECKING:
    from .swap_file import SwapFile

__all__ = ["KVStorage", "LostBlocksError"]

_log = logging.getLogger(__name__)


class LostBlocksError(Exception):
    """Blocks that a step needs could not be loaded: nothing of the step has been computed."""


class KVStorage:
    """Owns the memory of the cache; layer i reads and writes `layers[i]`."""

    def __init__(
        self, backend: Backend, layout: KVLayout, num_blocks: int, num_slots: int = 0
    ) -> None:
        self._backend = backend
        self._stores: list[Any] = [
            backend.new_kv_store(num_blocks + 1, layout.block_size, spec) for spec in layout.stores
        ]
        placed = {
            layer: KVLayer(self._stores[j], g)
            for g, group in enumerate(layout.groups)
            for j, layer in enumerate(group.layers)
        }
        self.layers: list[KVLayer] = [placed[layer] for layer in sorted(placed)]
        self.scratch_block = num_blocks  # block tables are padded with it: no request owns it
        # a buffer for one block that is saved or loaded, and each store's part of it
        self._moved = np.empty(layout.bytes_per_block, np.uint8)
        sizes = [layout.block_size * layout.token_bytes[layer] for layer in layout.groups[0].layers]
        self._parts = np.split(self._moved, np.cumsum(sizes)[:-1])
        self._num_slots = num_slots
        self._file: SwapFile | None = None  # created when first needed
        self._seconds_per_block = math.inf  # to save and to load it
        self._has_failed = False  # creating, writing or reading the file failed
        self._lost_slots: set[int] = set()

    def run(self, ops: Sequence[BlockOp]) -> None:
        """Run ops in order. Raises LostBlocksError where a block cannot be loaded."""
        for kind, same in groupby(ops, key=lambda op: op.kind):
            if kind == "copy":
                pairs = [(op.source, op.target) for op in same]
                for store in self._stores:
                    self._backend.copy_blocks(store, pairs)
            else:
                move = self._save if kind == "save" else self._load
                for op in same:
                    move(op.source, op.target)

    def _save(self, block: int, slot: int) -> None:
        for store, part in zip(self._stores, self._parts, strict=True):
            part[:] = self._backend.save_blocks(store, [block])[0]
        try:
            self.open_tier().write(slot, self._moved.data)
        except OSError as error:
            self._fail("saved", error)
            self._lost_slots.add(slot)
        else:
            self._lost_slots.discard(slot)

    def _load(self, slot: int, block: int) -> None:
        if slot in self._lost_slots:
            raise LostBlocksError(f"block {block} was never saved")
        try:
            self.open_tier().read(slot, self._moved.data)
        except OSError as error:
            self._fail("loaded", error)
            raise LostBlocksError(f"block {block} cannot be loaded: {error}") from error
        for store, part in zip(self._stores, self._parts, strict=True):
            self._backend.load_blocks(store, [block], part[None])

    def _fail(self, what: str, error: Exception) -> None:
        if not self._has_failed:
            message = "a block cannot be %s (%s): blocks that are evicted will be computed again"
            _log.warning(message, what, error)
        self._has_failed = True

    def saving_works(self) -> bool:
        """False after the file could not be created, written or read."""
        return not self._has_failed

    def seconds_per_block(self) -> float:
        """Seconds to save and load a block, measured once; infinite, and logged, without a file."""
        if self._file is None and not self._has_failed:
            # most engines save nothing, and start faster without this import
            from tempfile import gettempdir

            try:
                if lies_in_memory(Path(gettempdir())):
                    raise CapacityError(f"{gettempdir()}, where they would be saved, is memory too")
                self.open_tier()
            except CapacityError as error:
                self._has_failed = True
                _log.warning("blocks that are evicted will be computed again: %s", error)
        return math.inf if self._has_failed else self._seconds_per_block

    def open_tier(self) -> "SwapFile":
        """The second memory's file, created at the first call. Raises CapacityError."""
        if self._file is None:
            from .swap_file import SwapFile

            self._file = SwapFile(self._num_slots, len(self._moved))
            self._measure(self._file)
            message = "blocks that are evicted may be saved in a file of %d bytes in %s"
            _log.info(message, self.swap_file_bytes, self._file.folder)
        return self._file

    @property
    def swap_file_bytes(self) -> int:
        """The size of the second memory's file; 0 while there is none."""
        return 0 if self._file is None else self._num_slots * self._file.slot_bytes

    def _measure(self, file: "SwapFile") -> None:
        """Time a round trip through a slot that was never written: an upper bound."""
        start = time.perf_counter()
        try:
            file.write(0, self._moved.data)
            file.read(0, self._moved.data)
        except OSError as error:
            self._fail("saved", error)
        self._seconds_per_block = time.perf_counter() - start
