"""Pairwise designs: few rows in which each pair of values of two factors meets at least once."""

import itertools
import random
from collections.abc import Mapping, Sequence

__all__ = ["pairwise"]

_TRIES = 30  # candidate rows, of which the one with the most new pairs is taken


def pairwise(factors: Mapping[str, Sequence[object]], seed: int = 0) -> list[dict[str, object]]:
    """Rows of one value per factor. Greedy, and the same for a seed."""
    rng, names = random.Random(seed), list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows: list[dict[str, object]] = []
    while missing:
        best: dict[str, int] = {}
        most = 0
        for _ in range(_TRIES):
            # begin with a pair that is missing; fill the others at random
            pair = min(missing) if not best else rng.choice(sorted(missing))
            row = {name: rng.randrange(len(factors[name])) for name in names} | dict(pair)
            gain = len(_pairs(row) & missing)
            if gain > most:
                best, most = row, gain
        missing -= _pairs(best)
        rows.append({name: factors[name][best[name]] for name in names})
    return rows


def _pairs(row: Mapping[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    return set(itertools.combinations(row.items(), 2))
