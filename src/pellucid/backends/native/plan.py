"""Places a program's symbols in memory, and barriers between its entries.

Memory: a symbol is live from the entry that writes it to the last that reads it. Symbols that are
never live together may share their bytes. Places are chosen first fit from a list of free ranges.
Sizes are in bytes per token, so that one plan serves every batch size.

Barriers: two entries that touch the same bytes need a barrier between them if one of them writes.
Two readers need none: q, k and v, or gate and up, run without a barrier. There is one exception.
Entries that divide rows of the same layout into shares do it in the same way, so each thread
touches only rows of its own share. Quantized rows have another layout than plain ones.
"""

from dataclasses import dataclass

from .capture import OPS, Capture, Entry, Rows, Symbol

__all__ = ["Placement", "Plan", "build_plan", "bytes_per_row", "place_symbols"]

# A place is reused only this many entries after its last use: writing where another entry has just
# read would need one more barrier.
REST = 3


@dataclass(frozen=True, slots=True)
class Placement:
    """One buffer: `size` bytes per token after `offset` bytes per token."""

    offset: int
    size: int
    width: int
    quantized: bool
    rows: Rows


@dataclass(frozen=True, slots=True)
class Plan:
    """A buffer for each symbol of a program, and a barrier before some of its entries."""

    buffers: list[Placement]
    index: dict[Symbol, int]  # storage -> its buffer
    barriers: list[bool]  # per entry
    bytes_per_token: int
    output: int
    hidden: int  # -1: no hidden states are returned


def build_plan(captured: Capture) -> Plan:
    """Place every symbol, then the barriers."""
    buffers, index, end = place_symbols(captured)
    barriers = _barriers(captured.entries, buffers, index)
    hidden = -1 if captured.hidden is None else index[captured.hidden.storage]
    return Plan(buffers, index, barriers, end, index[captured.result.storage], hidden)


def place_symbols(captured: Capture) -> tuple[list[Placement], dict[Symbol, int], int]:
    """Place every symbol but the results, which lie in the caller's memory. Returns the buffers,
    the index of each storage's buffer, and the bytes per token of all buffers.
    """
    entries = captured.entries
    last_use = {symbol.storage: i for i, entry in enumerate(entries) for symbol in _symbols(entry)}
    outputs = [symbol.storage for symbol in captured.results]
    buffers: list[Placement] = []
    index: dict[Symbol, int] = {}
    free: list[tuple[int, int]] = []  # (offset, size), by offset; adjacent ranges are merged
    resting: list[tuple[int, Placement]] = []  # (last entry that used it, place)
    end = 0
    for i, entry in enumerate(entries):
        while resting and resting[0][0] + REST < i:
            _give(free, resting.pop(0)[1])
        if entry.output is not None and (storage := entry.output.storage) not in index:
            size = 0 if storage in outputs else bytes_per_row(storage)
            offset, end = _take(free, size, end)
            index[storage] = len(buffers)
            buffers.append(Placement(offset, size, storage.width, storage.quantized, storage.rows))
        for storage in {s.storage for s in _symbols(entry)}:
            if last_use[storage] == i and storage not in outputs:
                resting.append((i, buffers[index[storage]]))
    return buffers, index, end


def _symbols(entry: Entry) -> list[Symbol]:
    return entry.inputs + ([entry.output] if entry.output is not None else [])


def bytes_per_row(symbol: Symbol) -> int:
    """Bytes of a row. Quantized: 8-bit codes, and in float32 a scale and a sum per 32 codes and a
    sum per 16 codes. Otherwise float32.
    """
    return symbol.width + symbol.width // 32 * 4 * 4 if symbol.quantized else symbol.width * 4


def _take(free: list[tuple[int, int]], size: int, end: int) -> tuple[int, int]:
    """An offset with `size` free bytes, and the new end of the arena."""
    if size == 0:
        return 0, end
    for i, (offset, room) in enumerate(free):
        if room >= size:
            free[i : i + 1] = [(offset + size, room - size)] if room > size else []
            return offset, end
    if free and sum(free[-1]) == end:  # the last free range reaches the end: extend it
        offset, _ = free.pop()
        return offset, offset + size
    return end, end + size


def _give(free: list[tuple[int, int]], place: Placement) -> None:
    merged: list[tuple[int, int]] = []
    for start, room in sorted([*free, (place.offset, place.size)]):
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + room)
        else:
            merged.append((start, room))
    free[:] = merged


@dataclass(frozen=True, slots=True)
class _Access:
    place: object  # (offset, size) of a buffer, the symbol of a result, or a KV cache
    writes: bool
    # (its rows, quantized) if each share touches only its own rows; None if it may touch all
    rows: tuple[Rows, bool] | None


def _barriers(
    entries: list[Entry], buffers: list[Placement], index: dict[Symbol, int]
) -> list[bool]:
    """For each entry, whether it needs a barrier: it conflicts with one since the last barrier."""
    since: list[_Access] = []
    barriers = []
    for entry in entries:
        accesses = _accesses(entry, buffers, index)
        wait = any(_conflict(a, b) for a in accesses for b in since)
        since = accesses if wait else since + accesses
        barriers.append(wait)
    return barriers


def _accesses(entry: Entry, buffers: list[Placement], index: dict[Symbol, int]) -> list[_Access]:
    def rows(symbol: Symbol, writes: bool) -> tuple[Rows, bool] | None:
        division = OPS[entry.op][0]
        if division == "all_rows" or (division == "writes_rows" and not writes):
            return None
        return symbol.rows, symbol.quantized

    found = []
    for symbol, writes in [(s, False) for s in entry.inputs] + (
        [(entry.output, True)] if entry.output is not None else []
    ):
        place = buffers[index[symbol.storage]]
        found.append(
            _Access(
                (place.offset, place.size) if place.size else symbol.storage,
                writes,
                rows(symbol, writes),
            )
        )
    if entry.kv is not None:
        found.append(_Access(entry.kv, entry.op == "kv_write", None))
    if entry.op == "attention":
        found.append(_Access("partial results", True, None))  # used if a long context is split
    return found


def _conflict(a: _Access, b: _Access) -> bool:
    if not (a.writes or b.writes):
        return False
    if isinstance(a.place, tuple) and isinstance(b.place, tuple):
        if a.place == b.place:
            return a.rows is None or a.rows != b.rows
        (start_a, size_a), (start_b, size_b) = a.place, b.place
        return bool(start_a < start_b + size_b and start_b < start_a + size_a)
    return a.place is b.place and (a.rows is None or a.rows != b.rows)
