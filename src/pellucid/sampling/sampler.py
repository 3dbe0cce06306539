"""Logits to tokens: each row is corrected, filtered and drawn from by itself.

One idea: the Gumbel-max trick with counter-based noise. A token is the argmax of z + gumbel(seed, position, token id) over the tokens that
are left: a draw from their softmax that never normalizes, never walks a cumulative sum, and depends on nothing but its own row. Greedy is
the same argmax without the noise.

NumPy's passes run along the vocabulary, row after row: the temporaries of one row stay in the cache and those of R rows do not, and a row
that is worked on alone cannot feel its neighbours, neither in its bits nor in its errors.

Shapes: logits [R, V] float32, one `SamplingRow` for each row; they are read and not changed. R rows, V vocabulary.
It must not keep anything between calls, and must not draw from a generator that has a state.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..request import SamplingParams
from .noise import LARGEST_GUMBEL, SMALLEST_GUMBEL, gumbel
from .processors import adjust, keep_largest, keep_min_p, keep_top_p, keep_typical, moments
from .row import SamplingRow

__all__ = ["sample", "survivors"]

_NEVER_DRAWN = SMALLEST_GUMBEL - LARGEST_GUMBEL  # no noise lifts a z below this over the largest, whose z is 0
_FLOAT32_MIN = float(np.finfo(np.float32).min)
_SLICE = 1 << 14  # tokens drawn from at a time where none is filtered


def sample(logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> list[int | RequestError]:
    """The token of each row of logits [R, V]; or, in its place, the error with which that request alone must end.

    A row fails where its logits hold NaN or +inf, or where bans leave it no token. The others are served as if it were not there.
    """
    with np.errstate(over="ignore"):  # a penalty may take a logit to inf, which its row is then told
        return [_sample_row(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)]


def _sample_row(logits: NDArray[np.float32], row: SamplingRow) -> int | RequestError:
    if not math.isfinite(largest := float(logits.max())):  # NaN if there is one, which no ban may hide
        return RequestError(f"the model's logits at position {row.position} have {largest} as their largest; it must be a finite number")
    logits = adjust(logits, row)
    best = int(logits.argmax())  # the first of the largest
    if logits[best] == -math.inf:
        return RequestError("no token is left to draw: logit_bias, allowed_token_ids, bad_words and min_tokens ban all of them")
    if logits[best] == math.inf:
        return RequestError(f"repetition_penalty {row.params.repetition_penalty} takes the logit of token {best} beyond float32")
    if row.params.temperature == 0:
        return best
    return _draw(logits, row)


def _draw(logits: NDArray[np.float32], row: SamplingRow) -> int:
    """The argmax of z + noise over what the filters leave, the first of equals."""
    p = row.params
    is_filtered = p.top_k > 0 or p.typical_p < 1 or p.top_p < 1 or p.min_p > 0
    width = logits.size if is_filtered else _SLICE
    largest = float(logits.max())
    best, best_score = 0, -math.inf
    for start in range(0, logits.size, width):
        token_ids, z = survivors(logits[start : start + width], p, largest)
        if not token_ids.size:
            continue
        token_ids += start
        score = gumbel(row.seed, row.position, token_ids)
        score += z
        i = int(score.argmax())
        if score[i] > best_score:
            best, best_score = int(token_ids[i]), float(score[i])
    return best


def survivors(logits: NDArray[np.float32], params: SamplingParams, largest: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens of logits [V] that top_k, typical_p, top_p and min_p leave, rising, and their z = (logit - largest) / temperature.

    `largest` is finite and the temperature above 0. Tokens that no noise could make the draw may be left out.
    """
    p = params
    token_ids = keep_largest(logits, p.top_k) if p.top_k > 0 else None
    values = logits if token_ids is None else logits[token_ids]
    total = mean = 0.0
    if p.typical_p < 1 or p.top_p < 1:
        total, mean = moments(values, largest, p.temperature)
        # those below this hold less than `share` together, however many: nobody needs them to reach the mass
        share = (1 - (p.typical_p if p.typical_p < 1 else p.top_p)) * total
        lowest = math.log(max(share / values.size, 5e-324))
        if p.typical_p < 1:
            lowest = min(lowest, 2 * mean)  # and they are farther from the mean than the likeliest is
    else:
        lowest = max(_NEVER_DRAWN, math.log(p.min_p)) if p.min_p > 0 else _NEVER_DRAWN
    bound = largest + p.temperature * (lowest - 1)  # a nat of room, so that no rounding matters
    near = np.flatnonzero(values >= max(bound, _FLOAT32_MIN))  # [n], banned tokens are not among them
    z = values[near].astype(np.float64)  # [n]
    z -= largest
    z /= p.temperature
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
