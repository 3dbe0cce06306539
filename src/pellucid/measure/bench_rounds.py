"""Rounds of a test: ours, the peer, ours, the peer … with a reading of the machine's bandwidth
before each of ours.

In the first round each variant of the peer runs once, and the fastest runs alone in the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .bench_tests import Ratio, best_of, mean_and_deviation

__all__ = ["Samples", "run_rounds"]


@dataclass
class Samples:
    """What the rounds of one test gave so far. Seconds; one entry per finished measurement."""

    tokens: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    # each gives (least seconds that the machine allows, those of them that memory binds); called at
    # the end, when the highest readings of the peaks are known
    roofs: list[Callable[[], tuple[float, float]]] = field(default_factory=list)
    variant: str = ""  # of the peer
    tried: dict[str, float] = field(default_factory=dict)  # its variants' tokens per second
    started_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    @property
    def speeds(self) -> list[float]:
        """Tokens per second."""
        return [self.tokens / seconds for seconds in self.ours]

    @property
    def peer_speeds(self) -> list[float]:
        return [self.tokens / seconds for seconds in self.theirs]

    @property
    def ratio(self) -> Ratio | None:
        """Over the rounds that both sides finished."""
        rounds = min(len(self.ours), len(self.theirs))
        return Ratio.of(self.speeds[:rounds], self.peer_speeds[:rounds]) if rounds else None

    @property
    def roof_share(self) -> tuple[float, float] | None:
        """(the smallest, the largest) share of the machine's ceiling."""
        shares = [roof()[0] / s for roof, s in zip(self.roofs, self.ours, strict=False)]
        return (min(shares), max(shares)) if shares else None

    @property
    def bound(self) -> str | None:
        """The resource that most of the least time goes to."""
        if not self.roofs:
            return None
        least, memory = (sum(parts) for parts in zip(*(r() for r in self.roofs), strict=True))
        return "memory" if 2 * memory > least else "arithmetic"

    @property
    def mean(self) -> float:
        return mean_and_deviation(self.speeds)[0]


def run_rounds(
    samples: Sequence[Samples],
    rounds: int,
    ours: Callable[[], Sequence[float]],
    *,
    roof: Callable[[], Sequence[Callable[[], tuple[float, float]]]] | None = None,
    theirs: Callable[[str], Sequence[float]] | None = None,
    variants: Sequence[str] = ("",),
) -> Iterator[None]:
    """Fill `samples`, one for each figure that a call gives; yields after each round, so that what
    was measured is there when the caller is interrupted.
    """
    for i in range(rounds):
        if roof is not None:
            for sample, found in zip(samples, roof(), strict=True):
                sample.roofs.append(found)
        for sample, seconds in zip(samples, ours(), strict=True):
            sample.ours.append(seconds)
        if theirs is not None:
            peer_seconds = _peer_round(samples, theirs, variants, i == 0)
            for sample, seconds in zip(samples, peer_seconds, strict=True):
                sample.theirs.append(seconds)
        yield


def _peer_round(
    samples: Sequence[Samples],
    theirs: Callable[[str], Sequence[float]],
    variants: Sequence[str],
    is_first: bool,
) -> Sequence[float]:
    if not is_first:
        return theirs(samples[0].variant)
    found = {variant: theirs(variant) for variant in variants}
    # The variant counts that is fastest over all figures together.
    best = best_of({variant: 1 / sum(seconds) for variant, seconds in found.items()})
    for i, sample in enumerate(samples):
        sample.variant = best
        sample.tried = {v: sample.tokens / seconds[i] for v, seconds in found.items()}
    return found[best]
