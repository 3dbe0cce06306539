"""Prefill and decode speed of several models, measured in turns: A B C A B C …, so that a slow
minute of the machine meets all of them.

Models that do not fit in memory together form groups, which are measured one after another.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import CapacityError
from .bench_model import BenchModel
from .compare import Comparison, Entry

__all__ = ["ROUNDS", "Speed", "SpeedTest", "run_speeds", "speed_test"]

ROUNDS = 5
PROMPT, OUTPUT = 512, 64  # tokens
CHUNK = 512  # tokens of a step


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """The prefill of a prompt, and the decode of tokens behind it."""

    prompt: int
    output: int


@dataclass
class Speed:
    """Tokens per second of each round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def speed_test(comparison: Comparison) -> SpeedTest:
    """The test that all models have room for."""
    room = min(facts.max_context for facts in comparison.facts)
    if room >= PROMPT + OUTPUT:
        return SpeedTest(PROMPT, OUTPUT)
    output = max(1, room * OUTPUT // (PROMPT + OUTPUT))
    return SpeedTest(room - output, output)


def run_speeds(
    entries: Sequence[Entry], test: SpeedTest, speeds: Sequence[Speed]
) -> Iterator[tuple[int, int]]:
    """Fill `speeds`, one for each entry. Yields (measurements done, in all). Raises CapacityError
    if a model does not fit alone.
    """
    waiting = list(range(len(entries)))
    done = 0
    while waiting:
        group = _load_group(entries, waiting, test)
        waiting = waiting[len(group) :]
        for _ in range(ROUNDS):
            for i, model in group:
                prefill = model.prefill(1, 0, test.prompt)
                decode = model.decode(1, test.prompt, test.output)
                speeds[i].prefill.append(test.prompt / prefill)
                speeds[i].decode.append(test.output / decode)
                done += 1
                yield done, ROUNDS * len(entries)
        del group, model
        gc.collect()


def _load_group(
    entries: Sequence[Entry], waiting: Sequence[int], test: SpeedTest
) -> list[tuple[int, BenchModel]]:
    """Load as many of the entries, in order, as fit."""
    group: list[tuple[int, BenchModel]] = []
    for i in waiting:
        config = entries[i].config
        try:
            model = BenchModel(
                entries[i].path,
                backend=config.backend,
                options=dict(config.backend_options),
                kv_dtype=config.kv_cache_dtype,
                longest=test.prompt + test.output,
                chunk=CHUNK,
            )
        except CapacityError:
            if not group:
                raise
            break
        group.append((i, model))
    return group
