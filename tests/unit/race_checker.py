"""Finds what a plan of the native backend would get wrong, by laying out every thread's reads and
writes in a real arena.

It shares no code with `backends/native/plan.py`: the layouts are those that csrc/program.cpp and
csrc/kernels.h state, for one number of tokens T, of wanted logits L and of threads. Memory is
counted in units of 4 bytes; each (entry, thread) has the set of units that it reads and the set
that it writes, as arrays of bool.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.native.capture import Entry, Rows, Symbol
from pellucid.backends.native.plan import Plan

__all__ = ["find_overwritten", "find_races"]

Units = NDArray[np.bool_]


@dataclass
class _Touched:
    reads: list[Units]  # per thread
    writes: list[Units]
    # which thread writes what is not said: each may write all, but no two the same
    any_thread: bool


class _Arena:
    def __init__(
        self, entries: list[Entry], plan: Plan, tokens: int, logits: int, threads: int
    ) -> None:
        self.plan, self.threads = plan, threads
        # as many hidden states as logits
        self.rows = {Rows.TOKENS: tokens, Rows.LOGITS: logits, Rows.HIDDEN: logits}
        self.capacity = -(-tokens // 16) * 16
        self.caches: dict[Any, int] = {}
        end = plan.bytes_per_token // 4 * self.capacity
        self.results = {}  # where they lie, by their buffers
        for result in [r for r in (plan.output, plan.hidden) if r >= 0]:
            self.results[result] = end
            end += plan.buffers[result].width * tokens
        for entry in entries:
            if entry.kv is not None and entry.kv not in self.caches:
                self.caches[entry.kv] = end
                end += tokens
        self.partials = end
        self.size = end + 1

    def share(self, count: int, thread: int) -> range:
        return range(count * thread // self.threads, count * (thread + 1) // self.threads)

    def rows_of(self, symbol: Symbol, rows: range) -> Units:
        """The units of some rows of a symbol."""
        place = self.plan.buffers[self.plan.index[symbol.storage]]
        units = np.zeros(self.size, bool)
        start = self.results.get(self.plan.index[symbol.storage], place.offset * self.capacity // 4)
        planes = [place.width]
        if place.quantized:  # codes, scales, sums of 32, sums of 16
            planes = [place.width // 4, place.width // 32, place.width // 32, place.width // 16]
        for width in planes:
            units[start + rows.start * width : start + rows.stop * width] = True
            start += width * self.capacity
        return units

    def columns_of(self, symbol: Symbol, columns: range) -> Units:
        """The units of some columns of every row."""
        place = self.plan.buffers[self.plan.index[symbol.storage]]
        start = self.results.get(self.plan.index[symbol.storage], place.offset * self.capacity // 4)
        units = np.zeros(self.size, bool)
        rows = self.rows[place.rows]
        units[start : start + rows * place.width].reshape(rows, place.width)[
            :, columns.start : columns.stop
        ] = True
        return units

    def span(self, start: int, rows: range) -> Units:
        units = np.zeros(self.size, bool)
        units[start + rows.start : start + rows.stop] = True
        return units

    def touched(self, entry: Entry) -> _Touched:
        found = _Touched([], [], entry.op == "attention")
        for thread in range(self.threads):
            read, write = np.zeros(self.size, bool), np.zeros(self.size, bool)
            for symbol in entry.inputs:
                count = self.rows[symbol.rows]
                whole = entry.op in ("linear", "attention", "take_rows")
                read |= self.rows_of(symbol, range(count) if whole else self.share(count, thread))
            if entry.op == "linear":
                assert entry.output is not None
                tiles = self.share(-(-entry.output.width // 16), thread)
                write |= self.columns_of(
                    entry.output, range(tiles.start * 16, min(tiles.stop * 16, entry.output.width))
                )
            elif entry.output is not None:
                count = self.rows[entry.output.rows]
                rows = range(count) if found.any_thread else self.share(count, thread)
                write |= self.rows_of(entry.output, rows)
            if entry.op == "kv_write":
                write |= self.span(
                    self.caches[entry.kv], self.share(self.rows[Rows.TOKENS], thread)
                )
            if entry.op == "attention":
                read |= self.span(self.caches[entry.kv], range(self.rows[Rows.TOKENS]))
                write |= self.span(self.partials, range(1))
            found.reads.append(read)
            found.writes.append(write)
        return found


def find_races(
    entries: list[Entry],
    plan: Plan,
    barriers: list[bool],
    *,
    tokens: int,
    logits: int,
    threads: int,
) -> list[tuple[int, int]]:
    """Pairs of entries (or one entry twice) in which two threads touch the same unit, one of them
    writing, with no barrier between.
    """
    arena = _Arena(entries, plan, tokens, logits, threads)
    races: list[tuple[int, int]] = []
    epoch: list[tuple[int, _Touched]] = []
    for j, (entry, barrier) in enumerate(zip(entries, barriers, strict=True)):
        if barrier:
            epoch = []
        new = arena.touched(entry)
        for i, old in [*epoch, *([] if new.any_thread else [(j, new)])]:
            for s in range(threads):
                others = [t for t in range(threads) if t != s]
                written, touched = np.zeros(arena.size, bool), np.zeros(arena.size, bool)
                for t in others:
                    written |= new.writes[t]
                    touched |= new.writes[t] | new.reads[t]
                if (old.writes[s] & touched).any() or (old.reads[s] & written).any():
                    races.append((i, j))
                    break
        epoch.append((j, new))
    return races


def find_overwritten(entries: list[Entry], plan: Plan) -> list[int]:
    """Entries that read what another symbol has been written over, or write over what they read."""
    arena = _Arena(entries, plan, 16, 16, 1)
    owner = np.full(arena.size, -1)
    ids = {storage: i for i, storage in enumerate(plan.index)}
    wrong = []
    for i, entry in enumerate(entries):
        for symbol in entry.inputs:
            if not (owner[arena.rows_of(symbol, range(16))] == ids[symbol.storage]).all():
                wrong.append(i)
        if entry.output is not None:
            written = arena.rows_of(entry.output, range(16))
            for symbol in entry.inputs:
                other = symbol.storage is not entry.output.storage
                if other and (written & arena.rows_of(symbol, range(16))).any():
                    wrong.append(i)
            owner[written] = ids[entry.output.storage]
    return wrong
