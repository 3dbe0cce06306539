"""Where keys and values lie: paged stores in whatever layout the backend's kernels like, and a
second, larger memory behind them.

One idea: whatever a store's layout, a block of it is a run of bytes. So copying a block for a
request that writes on in it, saving it before its memory is given to another, and loading it back
are copies of bytes, alike for every backend.

The only file of this room that touches arrays. A block id means the same place in each store.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batch import BlockOp
from ..errors import CapacityError
from ..ops.protocol import Backend, KVLayer
from .layout import KVLayout

__all__ = ["KVStorage", "MappedTier"]

Bytes = NDArray[np.uint8]
_log = logging.getLogger(__name__)


class KVStorage:
    """Owns the memory of the cache; `layers[i]` is what layer i's `kv_write` and `attention`
    take.
    """

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
        self.scratch_block = num_blocks  # for block tables to be padded with: no request owns it
        self._store_bytes = [
            layout.block_size * layout.token_bytes[layer] for layer in layout.groups[0].layers
        ]
        self._num_slots = num_slots
        self._tier: MappedTier | None = None  # made when it is first needed
        self._has_failed = False  # to be made

    def run(self, ops: Sequence[BlockOp]) -> None:
        """Copy, save and load blocks, in order."""
        for op in ops:
            if op.kind == "copy":
                for store in self._stores:
                    self._backend.copy_blocks(store, [(op.source, op.target)])
            elif op.kind == "save":
                pieces = [self._backend.save_blocks(store, [op.source]) for store in self._stores]
                self.open_tier().save(op.target, np.concatenate(pieces, axis=1)[0])
            else:
                saved, at = self.open_tier().load(op.source), 0
                for store, size in zip(self._stores, self._store_bytes, strict=True):
                    self._backend.load_blocks(store, [op.target], saved[None, at : at + size])
                    at += size

    def seconds_per_block(self) -> float:
        """What saving a block and loading it again costs here, measured once; infinite where the
        file cannot be had, and that is logged.
        """
        if not self._has_failed:
            try:
                return self.open_tier().seconds_per_slot
            except CapacityError as error:
                self._has_failed = True
                _log.warning("blocks that are evicted will be computed again: %s", error)
        return math.inf

    def open_tier(self) -> "MappedTier":
        """The second memory. Raises CapacityError where its file cannot be had."""
        if self._tier is None:
            self._tier = MappedTier(self._num_slots, sum(self._store_bytes))
        return self._tier


class MappedTier:
    """Blocks in a file without a name, mapped into memory: the system writes it back when it likes,
    and it is gone when this process is.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        try:
            with tempfile.TemporaryFile(prefix="pellucid-kv-") as file:
                # now: a mapped file that cannot grow would end the process
                os.posix_fallocate(file.fileno(), 0, num_slots * slot_bytes)
                self._slots: Bytes = np.memmap(file, np.uint8, "r+", shape=(num_slots, slot_bytes))
        except OSError as error:
            raise CapacityError(
                f"swap_space of {num_slots * slot_bytes} bytes cannot be had in "
                f"{tempfile.gettempdir()}: {error}"
            ) from error
        self.seconds_per_slot = self._measure()

    def save(self, slot: int, block: Bytes) -> None:
        self._slots[slot] = block

    def load(self, slot: int) -> Bytes:
        saved: Bytes = self._slots[slot].copy()
        return saved

    def _measure(self) -> float:
        """A round trip through slots that were never touched: what they cost at most."""
        block = np.ones(self._slots.shape[1], np.uint8)
        start = time.perf_counter()
        self.save(0, block)
        self.load(0)
        return time.perf_counter() - start
