"""Logits to tokens: each row is corrected, filtered and drawn from independently.

One idea: the Gumbel-max trick with counter-based noise. A token is the argmax of z + gumbel(seed,
position, token id) over the tokens that are left. This is a draw from their softmax without a
normalization or a cumulative sum, and it depends only on its own row. Greedy is the same argmax
without the noise. Where nothing is filtered, the noise of groups of tokens (noise.py) bounds the
scores, and only the few tokens that can have the largest score are computed one by one.

Passes over the vocabulary run row by row, because the temporaries of one row fit in the cache.
Small arrays (groups, tokens that are left) are computed for several rows at once, element by
element, so that no row changes the bits or the errors of another.

Shapes: logits [R, V] float32, one `SamplingRow` for each row; neither is changed. R rows, V
vocabulary. This module keeps no state between calls.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..sampling_params import SamplingParams
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

# with a z below this, no noise makes a token's score larger than that of the largest logit (z = 0)
_NEVER_DRAWN = SMALLEST_GUMBEL - LARGEST_GUMBEL
_FLOAT32_MIN = float(np.finfo(np.float32).min)
_FEW = 1024  # this many tokens often hold the mass of top_p
_MANY = 4096  # the noise of more tokens costs more than the noise of all groups
# rows drawn from at a time, so that arrays with an entry per group fit in the cache
_TOGETHER = 16
_ROUNDING = 1e-6  # more than the error of any score; scores are below 100 where it matters


def sample(logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> list[int | RequestError]:
    """The token of each row of logits [R, V], or the error with which that row's request must end.

    A row fails if its logits hold NaN or +inf, or if bans leave it no token. Other rows are not
    affected.
    """
    tokens: list[int | RequestError] = []
    # a penalty may overflow a logit to inf; that row gets an error
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
    # failed rows and greedy rows need only their largest logit
    for i, (row_logits, row) in enumerate(zip(logits, rows, strict=True)):
        peak = _find_peak(row_logits, row)
        if isinstance(peak, RequestError):
            tokens[i] = peak
        elif row.params.temperature == 0:
            tokens[i] = peak.token_id
        else:
            drawn_from[i] = peak, row
    # draw from the others together
    if drawn_from:
        tokens.update(zip(drawn_from, _draw([*drawn_from.values()]), strict=True))
    return [tokens[i] for i in range(len(rows))]


class _Peak(NamedTuple):
    """A row after its corrections, and the first of its largest logits."""

    logits: NDArray[np.float32]
    token_id: int
    largest: float


def _find_peak(logits: NDArray[np.float32], row: SamplingRow) -> _Peak | RequestError:
    """The corrected row and its largest logit, which is finite; or the error of the row."""
    # check the model's own logits: argmax finds a NaN, which no ban may hide
    best = int(logits.argmax())
    if not math.isfinite(largest := float(logits[best])):
        return RequestError(
            f"the model's logits at position {row.position} have {largest} as their largest; it "
            "must be a finite number"
        )
    adjusted = adjust(logits, row)
    if adjusted is logits:
        return _Peak(logits, best, largest)
    # check the corrected logits
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
    """Tokens of one row, among which the drawn token is."""

    token_ids: NDArray[np.int64]  # [n]
    z: NDArray[np.float64]  # [n], (logit - largest) / temperature


def _draw(rows: Sequence[tuple[_Peak, SamplingRow]]) -> list[int]:
    """For each row the argmax of z + noise over the tokens that the filters leave; the first of
    equals.
    """
    states = np.array([noise_state(row.seed, row.position) for _, row in rows], np.uint64)
    # rows without filters together, rows with filters one at a time
    free = [i for i, (_, row) in enumerate(rows) if not _is_filtered(row.params)]
    kept: dict[int, _Kept] = {}
    if free:
        kept.update(zip(free, _contenders([rows[i] for i in free], states[free]), strict=True))
    for i, (peak, row) in enumerate(rows):
        if i not in kept:
            kept[i] = _contenders_after_filters(peak, row.params, states[i : i + 1])
    return _winners([kept[i] for i in range(len(rows))], states)


def _winners(rows: Sequence[_Kept], states: NDArray[np.uint64]) -> list[int]:
    """For each row the token with the largest z + noise; of equals the lowest token id."""
    # lay the rows end to end, so that one call computes the noise
    counts = [kept.token_ids.size for kept in rows]
    token_ids = np.concatenate([kept.token_ids for kept in rows])
    score = gumbel(states.repeat(counts), token_ids)
    score += np.concatenate([kept.z for kept in rows])
    # the smallest token id among those with the largest score of their row
    starts = np.cumsum([0, *counts[:-1]])
    token_ids[score < np.maximum.reduceat(score, starts).repeat(counts)] = np.iinfo(np.int64).max
    tokens: list[int] = np.minimum.reduceat(token_ids, starts).tolist()
    return tokens


def _is_filtered(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.typical_p < 1 or p.top_p < 1 or p.min_p > 0


def _contenders(
    rows: Sequence[tuple[_Peak, SamplingRow]], states: NDArray[np.uint64]
) -> list[_Kept]:
    """For each row without filters: tokens among which the drawn token is, in no order.

    The leader of a group is its token with the largest noise. The leader's noise plus the group's
    largest z is a ceiling for the scores of the group. The score of any token is a floor for the
    largest score. The likeliest token gives a high floor where the distribution is peaked, the
    leaders where it is flat.
    """
    vocab_size = rows[0][0].logits.size
    largest = np.array([[peak.largest] for peak, _ in rows])  # [R, 1]
    temperature = np.array([[row.params.temperature] for _, row in rows])
    noise, leader = leaders(states, vocab_size)  # [R, G]
    # ceilings of the groups
    ceiling = np.stack([group_maxima(peak.logits) for peak, _ in rows]).astype(np.float64)
    ceiling -= largest
    ceiling /= temperature
    ceiling += noise
    # scores of the leaders; a leader beyond the vocabulary has none
    score = np.stack(
        [peak.logits.take(t, mode="clip") for (peak, _), t in zip(rows, leader, strict=True)]
    ).astype(np.float64)
    score -= largest
    score /= temperature
    score += noise
    score[leader >= vocab_size] = -math.inf
    # the floor of each row
    floor = np.maximum(
        score.max(axis=1), gumbel(states, np.array([peak.token_id for peak, _ in rows]))
    )
    floor -= _ROUNDING
    # tokens of the groups whose ceiling reaches the floor
    found = []
    for i, (peak, row) in enumerate(rows):
        groups = np.flatnonzero(ceiling[i] >= floor[i])
        token_ids = members(groups)  # [n, 64]
        z = peak.logits.take(token_ids, mode="clip").astype(np.float64)
        z -= peak.largest
        z /= row.params.temperature
        # of these, the tokens whose own z plus their leader's noise reaches it
        keep = z >= floor[i] - noise[i, groups][:, None]
        keep &= token_ids < vocab_size
        found.append(_Kept(token_ids[keep], z[keep]))
    return found


def _contenders_after_filters(
    peak: _Peak, params: SamplingParams, state: NDArray[np.uint64]
) -> _Kept:
    """The tokens that the filters of a row leave, in order. Of very many, only those that can be
    drawn. `state`: [1].
    """
    token_ids, z = survivors(peak.logits, params, peak.largest)
    if token_ids.size <= _MANY:
        return _Kept(token_ids, z)
    # as in `_contenders`, token by token: z plus the leader's noise is a token's ceiling
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
    """The tokens of the logits [V] that top_k, typical_p, top_p and min_p leave, rising, and their
    z = (logit - largest) / temperature.

    `largest` is finite and the temperature is above 0. Tokens that no noise could make win the draw
    may be left out.
    """
    p = params
    # top_k
    token_ids = keep_largest(logits, p.top_k) if p.top_k > 0 else None
    values = logits if token_ids is None else logits[token_ids]
    # a bound on z below which no filter keeps a token
    total = mean = 0.0
    lowest = max(_NEVER_DRAWN, math.log(p.min_p)) if p.min_p > 0 else _NEVER_DRAWN
    if p.typical_p < 1:
        total, mean = moments(values, largest, p.temperature)
        # all tokens below this together hold less than the mass that may be dropped, and they are
        # farther from the mean than the likeliest token
        lowest = min(_log_share((1 - p.typical_p) * total, values.size), 2 * mean)
    elif p.top_p < 1:
        total = total_weight(values, largest, p.temperature)
        lowest = _log_share((1 - p.top_p) * total, min(values.size, _FEW))
    near, z = _above(values, largest, p.temperature, lowest)
    # the bound of top_p assumed that few tokens hold the mass; lower it if they do not
    if (
        p.typical_p == 1
        and p.top_p < 1
        and values.size > _FEW
        and float(np.exp(z).sum()) < p.top_p * total
    ):
        lowest = _log_share((1 - p.top_p) * total, values.size)
        near, z = _above(values, largest, p.temperature, lowest)
    token_ids = near if token_ids is None else token_ids[near]
    # typical_p, top_p, min_p: each acts on the tokens that the previous one left
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
    """The z of each of `count` equal tokens that hold this mass together."""
    return math.log(max(mass / count, 5e-324))


def _above(
    values: NDArray[np.float32], largest: float, temperature: float, lowest: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The indices whose z is at least `lowest`, or a little below, rising; and these z. Without
    banned tokens.
    """
    bound = largest + temperature * (lowest - 1)  # one nat lower, so that no rounding matters
    near = np.flatnonzero(values >= max(bound, _FLOAT32_MIN))
    z = values[near].astype(np.float64)
    z -= largest
    z /= temperature
    return near, z
