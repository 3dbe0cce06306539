"""Logits to tokens: each row is corrected, filtered and drawn from by itself.

One idea: the Gumbel-max trick with counter-based noise. A token is the argmax of z + gumbel(seed,
position, token id) over the tokens that are left. This is a draw from their softmax without a
normalization or a cumulative sum, and it depends on its own row alone. Greedy is the same argmax
without the noise. Where nothing is filtered, the noise of groups of tokens (noise.py) bounds the
scores, and only the few tokens that can have the largest score are looked at one by one.

NumPy's passes over the vocabulary run row after row, because the temporaries of one row fit in the
cache. Small arrays (groups, tokens that are left) are computed for several rows at once, element by
element, so that no row changes the bits or the errors of another.

Shapes: logits [R, V] float32, one `SamplingRow` for each row; they are read and not changed. R
rows, V vocabulary. This module keeps nothing between calls and uses no generator with a state.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..request import SamplingParams
from .noise import (
    LARGEST_GUMBEL,
    SMALLEST_GUMBEL,
    group_maxima,
    groups_of,
    gumbel,
    leaders,
    members,
    noise_state,
)
from .processors import (
    adjust,
    keep_largest,
    keep_min_p,
    keep_top_p,
    keep_typical,
    moments,
    total_weight,
)
from .row import SamplingRow

__all__ = ["sample", "survivors"]

# No noise lifts a z below this over the largest logit, whose z is 0.
_NEVER_DRAWN = SMALLEST_GUMBEL - LARGEST_GUMBEL
_FLOAT32_MIN = float(np.finfo(np.float32).min)
_FEW = 1024  # tokens that often hold the mass of top_p
_MANY = 4096  # the noise of more tokens costs more than the noise of all groups
# rows drawn from at a time: the arrays with an entry for each group fit in the cache
_TOGETHER = 16
_ROUNDING = 1e-6  # more than any score may be off by; scores are below 100 wherever it matters


def sample(logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> list[int | RequestError]:
    """The token of each row of logits [R, V]; or, in its place, the error with which that request
    alone must end.

    A row fails where its logits hold NaN or +inf, or where bans leave it no token. The other rows
    are not affected.
    """
    tokens: list[int | RequestError] = []
    # A penalty may take a logit to inf; the row then gets an error.
    with np.errstate(over="ignore"):
        for start in range(0, len(rows), _TOGETHER):
            stop = start + _TOGETHER
            tokens += _sample_some(logits[start:stop], rows[start:stop])
    return tokens


def _sample_some(
    logits: NDArray[np.float32], rows: Sequence[SamplingRow]
) -> list[int | RequestError]:
    """`sample` for at most `_TOGETHER` rows."""
    tokens: dict[int, int | RequestError] = {}
    drawn_from: dict[int, tuple[_Peak, SamplingRow]] = {}
    # Rows that fail and greedy rows are done once their largest logit is known.
    for i, (row_logits, row) in enumerate(zip(logits, rows, strict=True)):
        peak = _find_peak(row_logits, row)
        if isinstance(peak, RequestError):
            tokens[i] = peak
        elif row.params.temperature == 0:
            tokens[i] = peak.token_id
        else:
            drawn_from[i] = peak, row
    # The others are drawn from together.
    if drawn_from:
        tokens.update(zip(drawn_from, _draw([*drawn_from.values()]), strict=True))
    return [tokens[i] for i in range(len(rows))]


class _Peak(NamedTuple):
    """A row after its corrections, and the first of its largest logits."""

    logits: NDArray[np.float32]
    token_id: int
    largest: float


def _find_peak(logits: NDArray[np.float32], row: SamplingRow) -> _Peak | RequestError:
    """The corrected row and its largest logit, which is finite; or why the row fails."""
    # The model's own logits first: argmax finds the first NaN, which no ban may hide.
    best = int(logits.argmax())
    if not math.isfinite(largest := float(logits[best])):
        return RequestError(
            f"the model's logits at position {row.position} have {largest} as their largest; it "
            "must be a finite number"
        )
    adjusted = adjust(logits, row)
    if adjusted is logits:
        return _Peak(logits, best, largest)
    # Then what corrections have made of them.
    best = int(adjusted.argmax())
    largest = float(adjusted[best])
    if largest == -math.inf:
        return RequestError(
            "no token is left to draw: logit_bias, allowed_token_ids, bad_words, min_tokens and "
            "the output's constraint ban all of them"
        )
    if largest == math.inf:
        return RequestError(
            f"repetition_penalty {row.params.repetition_penalty} takes the logit of token {best} "
            "beyond float32"
        )
    return _Peak(adjusted, best, largest)


class _Kept(NamedTuple):
    """Tokens among which the draw from a row must fall."""

    token_ids: NDArray[np.int64]  # [n]
    z: NDArray[np.float64]  # [n], (logit - largest) / temperature


def _draw(rows: Sequence[tuple[_Peak, SamplingRow]]) -> list[int]:
    """For each row the argmax of z + noise over what the filters leave, the first of equals."""
    states = np.array([noise_state(row.seed, row.position) for _, row in rows], np.uint64)
    # Rows without filters are worked on together, rows with filters one at a time.
    free = [i for i, (_, row) in enumerate(rows) if not _is_filtered(row.params)]
    kept: dict[int, _Kept] = {}
    if free:
        kept.update(zip(free, _contenders([rows[i] for i in free], states[free]), strict=True))
    for i, (peak, row) in enumerate(rows):
        if i not in kept:
            kept[i] = _contenders_after_filters(peak, row.params, states[i : i + 1])
    return _winners([kept[i] for i in range(len(rows))], states)


def _winners(rows: Sequence[_Kept], states: NDArray[np.uint64]) -> list[int]:
    """The token of the largest z + noise of each row; of equals the lowest token id."""
    # All rows lie end to end, so that the noise is computed in one call.
    counts = [kept.token_ids.size for kept in rows]
    token_ids = np.concatenate([kept.token_ids for kept in rows])
    score = gumbel(states.repeat(counts), token_ids)
    score += np.concatenate([kept.z for kept in rows])
    # Ids below the largest score of their row are put out of the way of the minimum.
    starts = np.cumsum([0, *counts[:-1]])
    token_ids[score < np.maximum.reduceat(score, starts).repeat(counts)] = np.iinfo(np.int64).max
    tokens: list[int] = np.minimum.reduceat(token_ids, starts).tolist()
    return tokens


def _is_filtered(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.typical_p < 1 or p.top_p < 1 or p.min_p > 0


def _contenders(
    rows: Sequence[tuple[_Peak, SamplingRow]], states: NDArray[np.uint64]
) -> list[_Kept]:
    """For each row: tokens among which the draw from all of its logits must fall, in no order.

    The noise of a group's leader over the group's largest logit is a ceiling of the group's scores.
    The score of any token is a floor of the largest score: that of the likeliest token is high
    where the distribution is peaked, the highest of the leaders' where it is flat.
    """
    vocab_size = rows[0][0].logits.size
    largest = np.array([[peak.largest] for peak, _ in rows])  # [R, 1]
    temperature = np.array([[row.params.temperature] for _, row in rows])
    noise, leader = leaders(states, vocab_size)  # [R, G]
    # Ceilings of the groups.
    ceiling = np.stack([group_maxima(peak.logits) for peak, _ in rows]).astype(np.float64)
    ceiling -= largest
    ceiling /= temperature
    ceiling += noise
    # Scores of the leaders; a leader beyond the vocabulary has none.
    score = np.stack(
        [peak.logits.take(t, mode="clip") for (peak, _), t in zip(rows, leader, strict=True)]
    ).astype(np.float64)
    score -= largest
    score /= temperature
    score += noise
    score[leader >= vocab_size] = -math.inf
    # The floor of each row.
    floor = np.maximum(
        score.max(axis=1), gumbel(states, np.array([peak.token_id for peak, _ in rows]))
    )
    floor -= _ROUNDING
    # Tokens of the groups whose ceiling reaches the floor.
    found = []
    for i, (peak, row) in enumerate(rows):
        groups = np.flatnonzero(ceiling[i] >= floor[i])
        token_ids = members(groups)  # [n, 64]
        z = peak.logits.take(token_ids, mode="clip").astype(np.float64)
        z -= peak.largest
        z /= row.params.temperature
        # No token scores more than its own z plus the noise of its group's leader.
        keep = z >= floor[i] - noise[i, groups][:, None]
        keep &= token_ids < vocab_size
        found.append(_Kept(token_ids[keep], z[keep]))
    return found


def _contenders_after_filters(
    peak: _Peak, params: SamplingParams, state: NDArray[np.uint64]
) -> _Kept:
    """The tokens that the filters of a row leave, in order; of very many only those on which the
    draw can fall. `state`: [1].
    """
    token_ids, z = survivors(peak.logits, params, peak.largest)
    if token_ids.size <= _MANY:
        return _Kept(token_ids, z)
    # As in `_contenders`, token by token: the group's noise over a token's own z is its ceiling.
    noise, leader = leaders(state, peak.logits.size)
    groups = groups_of(token_ids)
    ceiling = noise[0].take(groups)
    ceiling += z
    is_leader = leader[0].take(groups) == token_ids  # a leader's score is its ceiling
    likeliest = int(z.argmax())
    floor = float(z[likeliest] + gumbel(state, token_ids[likeliest : likeliest + 1])[0])
    floor = max(floor, float(ceiling[is_leader].max(initial=-math.inf))) - _ROUNDING
    keep = ceiling >= floor
    return _Kept(token_ids[keep], z[keep])


def survivors(
    logits: NDArray[np.float32], params: SamplingParams, largest: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens of logits [V] that top_k, typical_p, top_p and min_p leave, rising, and their z =
    (logit - largest) / temperature.

    `largest` is finite and the temperature above 0. Tokens that no noise could make the draw may be
    left out.
    """
    p = params
    # top_k
    token_ids = keep_largest(logits, p.top_k) if p.top_k > 0 else None
    values = logits if token_ids is None else logits[token_ids]
    # A bound on z below which no filter keeps a token.
    total = mean = 0.0
    lowest = max(_NEVER_DRAWN, math.log(p.min_p)) if p.min_p > 0 else _NEVER_DRAWN
    if p.typical_p < 1:
        total, mean = moments(values, largest, p.temperature)
        # Tokens below this hold less than the mass that may be dropped, however many they are, and
        # they are farther from the mean than the likeliest token.
        lowest = min(_log_share((1 - p.typical_p) * total, values.size), 2 * mean)
    elif p.top_p < 1:
        total = total_weight(values, largest, p.temperature)
        lowest = _log_share((1 - p.top_p) * total, min(values.size, _FEW))
    near, z = _above(values, largest, p.temperature, lowest)
    # The bound of top_p assumed that few tokens hold the mass; lower it where they do not.
    if (
        p.typical_p == 1
        and p.top_p < 1
        and values.size > _FEW
        and float(np.exp(z).sum()) < p.top_p * total
    ):
        lowest = _log_share((1 - p.top_p) * total, values.size)
        near, z = _above(values, largest, p.temperature, lowest)
    token_ids = near if token_ids is None else token_ids[near]
    # typical_p, top_p, min_p: each acts on what the one before it left.
    if p.typical_p < 1:
        keep = keep_typical(z, mean, p.typical_p * total)
        token_ids, z = token_ids[keep], z[keep]
        total = float(np.exp(z).sum())
    if p.top_p < 1:
        keep = keep_top_p(z, p.top_p * total)
        token_ids, z = token_ids[keep], z[keep]
    if p.min_p > 0:
        keep = keep_min_p(z, p.min_p)
        token_ids, z = token_ids[keep], z[keep]
    return token_ids, z


def _log_share(mass: float, count: int) -> float:
    """z of a token that holds this mass with `count` others like it."""
    return math.log(max(mass / count, 5e-324))


def _above(
    values: NDArray[np.float32], largest: float, temperature: float, lowest: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where z is at least `lowest`, or a little below, rising; and these z. Banned tokens are not
    among them.
    """
    bound = largest + temperature * (lowest - 1)  # a nat of room, so that no rounding matters
    near = np.flatnonzero(values >= max(bound, _FLOAT32_MIN))
    z = values[near].astype(np.float64)
    z -= largest
    z /= temperature
    return near, z
