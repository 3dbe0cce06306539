"""Logits to tokens: each row is corrected, filtered and drawn from by itself.

One idea: the Gumbel-max trick with counter-based noise. A token is the argmax of z + gumbel(seed,
position, token id) over the tokens that are left: a draw from their softmax that never normalizes,
never walks a cumulative sum, and depends on nothing but its own row. Greedy is the same argmax
without the noise. Where nothing is filtered, the noise of the groups of tokens (noise.py) says
which few can have the largest score, and nothing else is asked about the others.

NumPy's passes over the vocabulary run row after row: the temporaries of one row stay in the cache
and those of R rows do not. What is small (groups, and the tokens that are left) is worked on for
several rows at once, element by element, so that no row feels its neighbours, neither in its bits
nor in its errors.

Shapes: logits [R, V] float32, one `SamplingRow` for each row; they are read and not changed. R
rows, V vocabulary. It must not keep anything between calls, and must not draw from a generator that
has a state.
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

# no noise lifts a z below this over the largest, whose z is 0
_NEVER_DRAWN = SMALLEST_GUMBEL - LARGEST_GUMBEL
_FLOAT32_MIN = float(np.finfo(np.float32).min)
_FEW = 1024  # tokens that often hold the mass of top_p
_MANY = 4096  # tokens left by filters whose noise costs more than that of all groups
# rows drawn from at a time: what there is for each group of tokens stays in the cache
_TOGETHER = 16
_ROUNDING = 1e-6  # more than any score may be off by; scores are below 100 wherever it matters


def sample(logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> list[int | RequestError]:
    """The token of each row of logits [R, V]; or, in its place, the error with which that request
    alone must end.

    A row fails where its logits hold NaN or +inf, or where bans leave it no token. The others are
    served as if it were not there.
    """
    tokens: list[int | RequestError] = []
    # a penalty may take a logit to inf, which its row is then told
    with np.errstate(over="ignore"):
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            found = [
                _peak(row_logits, row)
                for row_logits, row in zip(logits[start : start + _TOGETHER], some, strict=True)
            ]
            drawing = [
                (peak, row)
                for peak, row in zip(found, some, strict=True)
                if isinstance(peak, _Peak)
            ]
            drawn = iter(_draw(drawing)) if drawing else iter(())
            tokens += [next(drawn) if isinstance(token, _Peak) else token for token in found]
    return tokens


class _Peak(NamedTuple):
    """A row after its corrections, and the first of its largest logits."""

    logits: NDArray[np.float32]
    token_id: int
    largest: float


def _peak(logits: NDArray[np.float32], row: SamplingRow) -> _Peak | int | RequestError:
    """What a row is drawn from; or its token at once, where it is greedy."""
    best = int(logits.argmax())  # the first NaN if there is one, which no ban may hide
    if not math.isfinite(largest := float(logits[best])):
        return RequestError(
            f"the model's logits at position {row.position} have {largest} as their largest; it "
            "must be a finite number"
        )
    adjusted = adjust(logits, row)
    if adjusted is not logits:
        best = int(adjusted.argmax())
        largest = float(adjusted[best])
        if largest == -math.inf:
            return RequestError(
                "no token is left to draw: logit_bias, allowed_token_ids, bad_words and "
                "min_tokens ban all of them"
            )
        if largest == math.inf:
            return RequestError(
                f"repetition_penalty {row.params.repetition_penalty} takes the logit of token "
                f"{best} beyond float32"
            )
    return best if row.params.temperature == 0 else _Peak(adjusted, best, largest)


def _draw(rows: Sequence[tuple[_Peak, SamplingRow]]) -> list[int]:
    """For each row the argmax of z + noise over what the filters leave, the first of equals."""
    states = np.array([noise_state(row.seed, row.position) for _, row in rows], np.uint64)
    found: list[tuple[NDArray[np.int64], NDArray[np.float64]] | None] = [
        survivors(peak.logits, row.params, peak.largest) if _is_filtered(row.params) else None
        for peak, row in rows
    ]
    free = [i for i, kept in enumerate(found) if kept is None]
    if free:
        for i, kept in zip(free, _contenders([rows[i] for i in free], states[free]), strict=True):
            found[i] = kept
    for i, many in enumerate(found):
        if many is not None and many[0].size > _MANY:
            found[i] = _contenders_among(*many, states[i : i + 1], rows[i][0].logits.size)
    kept_all = [kept for kept in found if kept is not None]
    counts = [token_ids.size for token_ids, _ in kept_all]
    token_ids = np.concatenate([token_ids for token_ids, _ in kept_all])
    score = gumbel(states.repeat(counts), token_ids)
    score += np.concatenate([z for _, z in kept_all])
    starts = np.cumsum([0, *counts[:-1]])
    token_ids[score < np.maximum.reduceat(score, starts).repeat(counts)] = np.iinfo(np.int64).max
    tokens: list[int] = np.minimum.reduceat(token_ids, starts).tolist()
    return tokens


def _is_filtered(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.typical_p < 1 or p.top_p < 1 or p.min_p > 0


def _contenders(
    rows: Sequence[tuple[_Peak, SamplingRow]], states: NDArray[np.uint64]
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """For each row: tokens among which the draw from all of its logits must fall, in no order, and
    their z.

    The noise of a group's leader over the group's largest logit is a ceiling of its scores.
    Whatever token's score is known is a floor of the largest: that of the likeliest is a high one
    where the distribution is peaked, the highest of the leaders' where it is flat.
    """
    vocab_size = rows[0][0].logits.size
    largest = np.array([[peak.largest] for peak, _ in rows])  # [R, 1]
    temperature = np.array([[row.params.temperature] for _, row in rows])
    noise, leader = leaders(states, vocab_size)  # [R, G]
    ceiling = np.stack([group_maxima(peak.logits) for peak, _ in rows]).astype(np.float64)
    ceiling -= largest
    ceiling /= temperature
    ceiling += noise
    score = np.stack(
        [peak.logits.take(t, mode="clip") for (peak, _), t in zip(rows, leader, strict=True)]
    ).astype(np.float64)
    score -= largest
    score /= temperature
    score += noise
    score[leader >= vocab_size] = -math.inf
    floor = np.maximum(
        score.max(axis=1), gumbel(states, np.array([peak.token_id for peak, _ in rows]))
    )
    floor -= _ROUNDING
    found = []
    for i, (peak, row) in enumerate(rows):
        groups = np.flatnonzero(ceiling[i] >= floor[i])
        token_ids = members(groups)  # [n, 64]
        z = peak.logits.take(token_ids, mode="clip").astype(np.float64)
        z -= peak.largest
        z /= row.params.temperature
        # nor can a token beat its own z with its leader's noise
        keep = z >= floor[i] - noise[i, groups][:, None]
        keep &= token_ids < vocab_size
        found.append((token_ids[keep], z[keep]))
    return found


def _contenders_among(
    token_ids: NDArray[np.int64], z: NDArray[np.float64], state: NDArray[np.uint64], vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Those of the tokens that filters leave which the draw can fall on, in order, and their z: as
    above, token by token.
    """
    noise, leader = leaders(state, vocab_size)
    groups = groups_of(token_ids)
    ceiling = noise[0].take(groups)
    ceiling += z
    leads = leader[0].take(groups) == token_ids  # what these score is the ceiling
    likeliest = int(z.argmax())
    floor = float(z[likeliest] + gumbel(state, token_ids[likeliest : likeliest + 1])[0])
    floor = max(floor, float(ceiling[leads].max(initial=-math.inf))) - _ROUNDING
    keep = ceiling >= floor
    return token_ids[keep], z[keep]


def survivors(
    logits: NDArray[np.float32], params: SamplingParams, largest: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens of logits [V] that top_k, typical_p, top_p and min_p leave, rising, and their z =
    (logit - largest) / temperature.

    `largest` is finite and the temperature above 0. Tokens that no noise could make the draw may be
    left out.
    """
    p = params
    token_ids = keep_largest(logits, p.top_k) if p.top_k > 0 else None
    values = logits if token_ids is None else logits[token_ids]
    total = mean = 0.0
    lowest = max(_NEVER_DRAWN, math.log(p.min_p)) if p.min_p > 0 else _NEVER_DRAWN
    if p.typical_p < 1:
        total, mean = moments(values, largest, p.temperature)
        # those below this hold less than their share together, however many: nobody needs them to
        # reach the mass; and they are farther from the mean than the likeliest is
        lowest = min(_log_share((1 - p.typical_p) * total, values.size), 2 * mean)
    elif p.top_p < 1:
        total = total_weight(values, largest, p.temperature)
        lowest = _log_share((1 - p.top_p) * total, min(values.size, _FEW))
    near, z = _above(values, largest, p.temperature, lowest)
    # many hold the mass
    if (
        p.typical_p == 1
        and p.top_p < 1
        and values.size > _FEW
        and float(np.exp(z).sum()) < p.top_p * total
    ):
        near, z = _above(
            values, largest, p.temperature, _log_share((1 - p.top_p) * total, values.size)
        )
    token_ids = near if token_ids is None else token_ids[near]
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
    """Where z is at least `lowest`, or a little below, rising; and these z. What is banned is not
    among them.
    """
    bound = largest + temperature * (lowest - 1)  # a nat of room, so that no rounding matters
    near = np.flatnonzero(values >= max(bound, _FLOAT32_MIN))
    z = values[near].astype(np.float64)
    z -= largest
    z /= temperature
    return near, z
