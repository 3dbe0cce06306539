"""Chooses one of several formats for each tensor, so that the sum of damages is least and the sum
of bytes stays within a budget (the multiple-choice knapsack problem).

Damages may be in any unit that adds up. The module knows no tensor and no format.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError

__all__ = ["Option", "allocate"]

MAX_UNITS = 1 << 17  # of bytes, in which the budget is counted


@dataclass(frozen=True, slots=True)
class Option:
    """A way to store a tensor."""

    num_bytes: int
    damage: float


def allocate(tensors: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The place of the option for each tensor. Raises ConfigError if the budget is too small.

    Dynamic programming over the bytes above the smallest possible sum, in the largest unit that
    divides them all. The choice is then the best there is. If that takes more than MAX_UNITS units,
    the unit is larger, each option's bytes are rounded up, and a greedy pass spends what that
    leaves. Of equally good choices the same one is always found.
    """
    least = [min(option.num_bytes for option in options) for options in tensors]
    spare = budget - sum(least)
    if spare < 0:
        raise ConfigError(f"budget is {budget} bytes; the least that is possible is {sum(least)}")
    # useful options: each larger one does less damage than all smaller ones
    useful = [_useful(options) for options in tensors]
    extras = [
        [options[i].num_bytes - low for i in kept]
        for options, kept, low in zip(tensors, useful, least, strict=True)
    ]
    spare = min(spare, sum(extra[-1] for extra in extras))
    unit = max(math.gcd(*(e for extra in extras for e in extra)), -(-spare // MAX_UNITS), 1)
    # table[u]: the least damage of the tensors so far within u units; picks: the last choice
    table = np.zeros(spare // unit + 1)
    picks = np.zeros((len(tensors), len(table)), np.uint8)
    for row, (options, kept, extra) in enumerate(zip(tensors, useful, extras, strict=True)):
        best = np.full(len(table), np.inf)
        for place, (i, bytes_more) in enumerate(zip(kept, extra, strict=True)):
            units = -(-bytes_more // unit)
            if units >= len(table):
                break
            tried = table[: len(table) - units] + options[i].damage
            better = tried < best[units:]
            best[units:][better] = tried[better]
            picks[row, units:][better] = place
        table = best
    # read the choices backwards
    chosen, at = [0] * len(tensors), len(table) - 1
    for row in reversed(range(len(tensors))):
        chosen[row] = int(picks[row, at])
        at -= -(-extras[row][chosen[row]] // unit)
    spare -= sum(extra[place] for extra, place in zip(extras, chosen, strict=True))
    _spend(tensors, useful, extras, chosen, spare)
    return [kept[place] for kept, place in zip(useful, chosen, strict=True)]


def _useful(options: Sequence[Option]) -> list[int]:
    """The options that no other one beats in both bytes and damage, from the smallest on."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].num_bytes, options[i].damage)):
        if not kept or options[i].damage < options[kept[-1]].damage:
            kept.append(i)
    return kept


def _spend(
    tensors: Sequence[Sequence[Option]],
    useful: Sequence[Sequence[int]],
    extras: Sequence[Sequence[int]],
    chosen: list[int],
    spare: int,
) -> None:
    """Spend `spare` bytes on the steps to larger options that gain most per byte."""
    while True:
        best, step = 0.0, None
        for row, place in enumerate(chosen):
            for larger in range(place + 1, len(extras[row])):
                more = extras[row][larger] - extras[row][place]
                before, after = useful[row][place], useful[row][larger]
                gain = (tensors[row][before].damage - tensors[row][after].damage) / more
                if more <= spare and gain > best:
                    best, step = gain, (row, larger, more)
        if step is None:
            return
        row, chosen[row], more = step
        spare -= more
