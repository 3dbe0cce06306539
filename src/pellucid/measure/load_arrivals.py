"""When requests are sent: a renewal process of a given rate, or the arrivals of a recorded trace.

All times are seconds from the start of the run. The process is vLLM's: intervals come from a gamma
distribution of mean 1 / rate and shape `burstiness`. Shape 1 is the exponential distribution, so
arrivals are a Poisson process; below 1 they are burstier, above 1 more even.

Traces come in two forms, told apart by their first line:

    TIMESTAMP,ContextTokens,GeneratedTokens                            Azure LLM traces, CSV
    {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": […]}    Mooncake, JSONL

References: Patel et al., Splitwise, ISCA 2024; Qin et al., Mooncake, FAST 2025.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import ConfigError, FormatError
from ..files import open_regular, parse_json

__all__ = ["BLOCK_TOKENS", "TraceEntry", "random_arrivals", "read_trace", "scale_trace"]

BLOCK_TOKENS = 512  # prompt tokens that one hash id of a trace stands for
MAX_ENTRIES = 1_000_000
MAX_LINE = 1 << 16  # bytes
MAX_LENGTH = 10_000_000  # tokens
MAX_HASH_ID = 1 << 53

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One request of a trace."""

    arrival: float  # seconds since the first request
    input_length: int  # tokens
    output_length: int  # tokens
    hash_ids: tuple[int, ...] = ()  # of blocks of BLOCK_TOKENS prompt tokens; equal ids, equal text


def random_arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Arrival times without end. `rate`: requests per second; infinity: all at once."""
    if rate == float("inf"):
        while True:
            yield 0.0
    rng = np.random.default_rng([seed, 1])
    now = 0.0
    while True:
        for interval in rng.gamma(burstiness, 1 / (rate * burstiness), size=256).tolist():
            yield now  # the first request is sent at once
            now += interval


def read_trace(path: Path, count: int | None = None) -> list[TraceEntry]:
    """The first `count` requests of a trace, or all; the first arrives at 0.

    Raises FormatError, with the number of the line, where the file is no trace.
    """
    with open_regular(path) as file:
        first = file.readline(MAX_LINE)
        file.seek(0)
        is_csv = not first.lstrip().startswith(b"{")
        entries = _read_azure(file, path, count) if is_csv else _read_mooncake(file, path, count)
    if not entries:
        raise FormatError(f"{path} has no requests")
    # Some traces are not in order.
    entries.sort(key=lambda entry: entry.arrival)
    origin = entries[0].arrival
    return [replace(entry, arrival=entry.arrival - origin) for entry in entries]


def scale_trace(trace: list[TraceEntry], rate: float) -> list[TraceEntry]:
    """The same requests with intervals stretched so that their mean rate is `rate`."""
    span = trace[-1].arrival
    if span == 0:
        raise ConfigError(
            "all requests of the trace arrive at once; --request-rate cannot scale their times"
        )
    factor = (len(trace) - 1) / rate / span
    return [replace(entry, arrival=entry.arrival * factor) for entry in trace]


def _read_azure(file: BinaryIO, path: Path, count: int | None) -> list[TraceEntry]:
    header: list[str] = []
    entries: list[TraceEntry] = []
    for number, line in _lines(file, path):
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        if not header:
            header = cells
            missing = [name for name in _AZURE if name not in header]
            if missing:
                raise FormatError(
                    f"{path} is no trace: its first line is neither a JSON object nor a CSV header "
                    f"with {', '.join(_AZURE)}"
                )
            continue
        if len(cells) != len(header):
            raise FormatError(f"{path}, line {number}, has {len(cells)} cells, not {len(header)}")
        row = dict(zip(header, cells, strict=True))
        where = f"{path}, line {number}:"
        num_input, num_output = (_integer(row[name], name, where) for name in _AZURE[1:])
        entries.append(TraceEntry(_seconds(row["TIMESTAMP"], where), num_input, num_output))
        if len(entries) == count:
            break
    return entries


def _read_mooncake(file: BinaryIO, path: Path, count: int | None) -> list[TraceEntry]:
    entries: list[TraceEntry] = []
    for number, line in _lines(file, path):
        where = f"{path}, line {number}:"
        row = parse_json(line.encode(), where.removesuffix(":"))
        arrival = row.get("timestamp")
        if not isinstance(arrival, int | float) or isinstance(arrival, bool) or arrival < 0:
            raise FormatError(f"{where} timestamp is {arrival!r:.60}; it must be milliseconds")
        ids = row.get("hash_ids", [])
        if not isinstance(ids, list) or not all(
            isinstance(i, int) and 0 <= i < MAX_HASH_ID for i in ids
        ):
            raise FormatError(f"{where} hash_ids must be a list of integers of at least 0")
        num_input, num_output = (
            _integer(row.get(name), name, where) for name in ("input_length", "output_length")
        )
        entries.append(TraceEntry(arrival / 1e3, num_input, num_output, tuple(ids)))
        if len(entries) == count:
            break
    return entries


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    for number in range(1, MAX_ENTRIES + 2):
        data = file.readline(MAX_LINE + 1)
        if not data:
            return
        if len(data) > MAX_LINE:
            raise FormatError(f"{path}, line {number}, is longer than {MAX_LINE} bytes")
        try:
            line = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise FormatError(f"{path}, line {number}, is not UTF-8 text") from None
        if line:
            yield number, line
    raise FormatError(f"{path} has more than {MAX_ENTRIES} lines; cut a part of it")


def _integer(value: object, name: str, where: str) -> int:
    try:
        number = int(value) if isinstance(value, int | str) else -1
    except ValueError:
        number = -1
    if isinstance(value, bool) or not 0 <= number <= MAX_LENGTH:
        raise FormatError(
            f"{where} {name} is {value!r:.60}; it must be an integer of 0 to {MAX_LENGTH}"
        )
    return number


def _seconds(text: str, where: str) -> float:
    """A date with a time, or a number of seconds. The traces have seven digits after the point."""
    try:
        return float(text)
    except ValueError:
        pass
    whole, _, fraction = text.partition(".")
    try:
        moment = datetime.fromisoformat(whole)
        digits = fraction.partition("+")[0].removesuffix("Z")
        return (moment - datetime(1970, 1, 1)).total_seconds() + float(f"0.{digits or 0}")
    except (ValueError, TypeError, OverflowError):
        raise FormatError(
            f"{where} TIMESTAMP is {text!r:.60}; it must be a date and time"
        ) from None
