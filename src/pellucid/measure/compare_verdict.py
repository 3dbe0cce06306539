"""Which of several models is worth taking: the rows that others dominate, and one sentence.

A row is dominated if another one is as good in every respect (bytes of the file, bytes of the KV
cache per token, KL divergence, prefill and decode speed) and better in bytes or divergence. Small
differences count as none: two divergences whose difference is below two of its standard errors, or
which both lie within the noise floor; two speeds within 5 %.

This module computes nothing but the verdict: no model, no file, no clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..units import format_bytes

__all__ = ["MAX_LOSS", "Candidate", "Recommendation", "find_dominators", "recommend"]

MAX_LOSS = 0.05  # nats, the mean: perplexity rises by a few percent
SAME_SPEED = 0.95  # a speed of at least so much of another is not slower

IsLess = Callable[[int, int], bool]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one row."""

    name: str
    file_bytes: int
    kv_bytes: int  # per token
    kl: float  # mean, in nats
    same_top: float  # between 0 and 1
    prefill: float | None = None  # tokens/s; None: not measured
    decode: float | None = None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The row to take, and why."""

    name: str
    sentence: str


def find_dominators(rows: Sequence[Candidate], loses_less: IsLess) -> list[int | None]:
    """For each row the row that dominates it, or None. `loses_less(i, j)`: row i has measurably
    less divergence than row j.

    If several dominate it, the one with the least divergence is given that nothing dominates.
    """
    found: list[list[int]] = [
        [i for i in range(len(rows)) if i != j and _dominates(rows, i, j, loses_less)]
        for j in range(len(rows))
    ]

    def rank(i: int) -> tuple[bool, float]:
        return (bool(found[i]), rows[i].kl)

    return [min(above, key=rank) if above else None for above in found]


def _dominates(rows: Sequence[Candidate], i: int, j: int, loses_less: IsLess) -> bool:
    """Whether row i is as good as row j in every respect, and better in one that is exact or
    measured against its error.
    """
    a, b = rows[i], rows[j]
    if a.file_bytes > b.file_bytes or a.kv_bytes > b.kv_bytes or loses_less(j, i):
        return False
    if _is_slower(a.prefill, b.prefill) or _is_slower(a.decode, b.decode):
        return False
    return a.file_bytes < b.file_bytes or a.kv_bytes < b.kv_bytes or loses_less(i, j)


def _is_slower(speed: float | None, other: float | None) -> bool:
    return speed is not None and other is not None and speed < SAME_SPEED * other


def recommend(
    rows: Sequence[Candidate], dominators: Sequence[int | None], noise_floor: float | None
) -> Recommendation:
    """The smallest row that loses at most MAX_LOSS; if all lose more, the one that loses least; the
    base, if it dominates all others.

    `rows`: the base and at least one other. `noise_floor`: the divergence that is no difference.
    """
    base, others = rows[0], rows[1:]
    free = [row for row, above in zip(others, dominators[1:], strict=True) if above is None]
    if not free:
        return Recommendation(base.name, f"Take {base.name}: the base dominates all others.")
    good = [row for row in free if row.kl <= MAX_LOSS]
    if good:
        taken = min(good, key=lambda row: (row.file_bytes, row.kv_bytes, row.kl))
        loser = "it loses" if len(others) == 1 else f"the smallest of {len(others)} that loses"
        reason = f"{loser} at most {MAX_LOSS:g} nats"
    else:
        taken = min(free, key=lambda row: row.kl)
        loser = "it loses" if len(others) == 1 else "it loses least, though"
        reason = f"{loser} more than {MAX_LOSS:g} nats"
    # the figures behind it
    facts = [f"KL {taken.kl:.4f}"]
    if noise_floor is not None and taken.kl <= noise_floor:
        facts = [f"KL {taken.kl:.2g}, within the noise floor"]
    facts.append(f"the base's likeliest token {taken.same_top:.1%} of the time")
    facts.append(
        f"{format_bytes(taken.file_bytes)}, {taken.file_bytes / base.file_bytes:.0%} of the base"
    )
    if taken.decode is not None and base.decode is not None:
        facts.append(f"decode {taken.decode / base.decode:.2f} times as fast as the base")
    return Recommendation(taken.name, f"Take {taken.name}: {reason} ({'; '.join(facts)}).")
