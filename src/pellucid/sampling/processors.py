"""The steps between the model's logits and the draw, for one row: corrections change logits,
filters drop tokens.

The vocabulary is large, and only few tokens matter. Corrections index only the tokens that they
change. Filters keep few tokens: a cheap bound, which all survivors pass, comes first, and the exact
rule is applied to the tokens that pass it. The vocabulary is never sorted and never stored in
float64. Sums over all of it run in slices that fit in the cache.

Letters: V vocabulary; logits are float32; z = (logit - largest) / temperature in float64; a token's
weight is exp(z), its probability before normalization. Filters return the indices that they keep,
rising. Ties go to the lower index, so a result depends only on the values.
"""

import math

import numpy as np
from numpy.typing import NDArray

from .row import SamplingRow

__all__ = [
    "adjust",
    "keep_largest",
    "keep_min_p",
    "keep_top_p",
    "keep_typical",
    "moments",
    "total_weight",
]

_GROUP = 64  # logits per group in keep_largest
_SORTED = 2048  # up to this many tokens, sorting is faster than dividing the range
_PARTS = 4096  # parts into which a range of ranks is divided
_SMALLEST_SPAN = 1e-200  # closer ranks count as equal: the division would overflow
_SLICE = 1 << 14  # logits summed at a time


def adjust(logits: NDArray[np.float32], row: SamplingRow) -> NDArray[np.float32]:
    """The logits [V] after logit_bias, allowed and banned tokens, and penalties. A copy, or
    `logits` itself if the row has none of these.
    """
    p, mask = row.params, row.allowed_mask
    banned = _banned_token_ids(row)
    penalized = p.repetition_penalty != 1 or (
        len(row.output_token_ids) > 0 and (p.presence_penalty != 0 or p.frequency_penalty != 0)
    )
    is_restricted = p.allowed_token_ids or banned or mask is not None
    if not (p.logit_bias or is_restricted or penalized):
        return logits
    logits = logits.copy()
    if p.logit_bias:
        token_ids = np.fromiter(p.logit_bias.keys(), np.int64, len(p.logit_bias))
        logits[token_ids] += np.fromiter(p.logit_bias.values(), np.float64, len(p.logit_bias))
    if p.allowed_token_ids:
        token_ids = np.asarray(p.allowed_token_ids, dtype=np.int64)
        allowed = logits[token_ids]
        logits.fill(-np.inf)
        logits[token_ids] = allowed
    if banned:
        # a tokenizer may have special tokens without logits in the model
        logits[[token_id for token_id in banned if token_id < logits.size]] = -np.inf
    if mask is not None:
        logits[: mask.size][~mask] = -np.inf
        logits[mask.size :] = -np.inf
    if penalized:
        _penalize(logits, row)
    return logits


def _banned_token_ids(row: SamplingRow) -> list[int]:
    """The tokens that would end the request before min_tokens, and those that would complete a
    banned sequence.

    With ignore_eos an end-of-sequence token ends nothing, so it is not banned.
    """
    banned: list[int] = []
    if len(row.output_token_ids) < row.params.min_tokens:
        banned += row.params.stop_token_ids or ()
        if not row.params.ignore_eos:
            banned += sorted(row.eos_token_ids)
    if row.banned_sequences:
        longest = max(map(len, row.banned_sequences)) - 1
        tail = _tail(row, longest)
        for sequence in row.banned_sequences:
            head = list(sequence[:-1])
            if head == tail[len(tail) - len(head) :]:
                banned.append(sequence[-1])
    return banned


def _tail(row: SamplingRow, length: int) -> list[int]:
    """The last `length` tokens of prompt and output, or as many as there are."""
    output = [int(t) for t in row.output_token_ids[max(0, len(row.output_token_ids) - length) :]]
    missing = length - len(output)
    return [
        int(t) for t in row.prompt_token_ids[max(0, len(row.prompt_token_ids) - missing) :]
    ] + output


def _penalize(logits: NDArray[np.float32], row: SamplingRow) -> None:
    """Apply the repetition penalty over prompt and output (Keskar et al., arXiv:1909.05858), then
    the frequency and presence penalties over the output.
    """
    p = row.params
    # first mark the tokens of the output, then those of the prompt
    output = np.asarray(row.output_token_ids, dtype=np.int64)
    is_seen = np.zeros(logits.size, dtype=np.bool_)
    is_seen[output] = True
    drawn = np.flatnonzero(is_seen)
    if p.repetition_penalty != 1:
        is_seen[np.asarray(row.prompt_token_ids, dtype=np.int64)] = True
        seen = np.flatnonzero(is_seen)
        x = logits[seen].astype(np.float64)
        logits[seen] = np.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        logits[drawn] -= p.frequency_penalty * np.bincount(output)[drawn] + p.presence_penalty


def keep_largest(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Top-k (Fan et al., arXiv:1805.04833): the k largest logits. No logit may be NaN.

    The vocabulary is cut into groups. The bound is the k-th largest of the groups' largest logits.
    At least k logits reach it, so the k largest do. Few others reach it, and the exact selection
    runs among these.
    """
    if k >= logits.size:
        return np.arange(logits.size)
    # the bound, if there are more than k groups
    num_groups = logits.size // _GROUP
    bound = np.float32(-np.inf)
    if k < num_groups:
        bound = _kth_largest(
            logits[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0), k
        )
    # the selection among the logits that reach it; of equals the first
    near = np.flatnonzero(logits >= bound)
    values = logits[near]
    kth = _kth_largest(values, k)
    keep = values > kth
    ties = np.flatnonzero(values == kth)
    keep[ties[: k - np.count_nonzero(keep)]] = True
    return near[keep]


def _kth_largest(values: NDArray[np.float32], k: int) -> np.float32:
    largest: np.float32 = np.partition(values, values.size - k)[values.size - k]
    return largest


def moments(logits: NDArray[np.float32], largest: float, temperature: float) -> tuple[float, float]:
    """The sum of the weights Σ exp z, and the mean of z under them. `largest` is finite and no
    logit is above it.
    """
    total = weighted = 0.0
    for start in range(0, logits.size, _SLICE):
        z = logits[start : start + _SLICE].astype(np.float64)
        z -= largest
        z /= temperature
        np.maximum(z, -746.0, out=z)  # below this exp(z) is 0 in float64, and 0 · -inf is NaN
        weights = np.exp(z)
        total += float(weights.sum())
        weights *= z
        weighted += float(weights.sum())
    return total, weighted / total


def total_weight(logits: NDArray[np.float32], largest: float, temperature: float) -> float:
    """The sum of the weights Σ exp z, to seven digits: float32 in slices, whose sums are added in
    float64.
    """
    total = 0.0
    for start in range(0, logits.size, _SLICE):
        z = logits[start : start + _SLICE] - np.float32(largest)
        if temperature != 1:
            # smaller temperatures are no float32; z = 0 stays 0 with any temperature
            z /= np.float32(max(temperature, 1e-30))
        total += float(np.exp(z, out=z).sum())
    return total


def keep_top_p(z: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """Nucleus (Holtzman et al., arXiv:1904.09751): the fewest likeliest tokens whose weights reach
    `mass`.
    """
    return _keep_first(-z, np.exp(z), mass)


def keep_typical(z: NDArray[np.float64], mean: float, mass: float) -> NDArray[np.int64]:
    """Locally typical (Meister et al., arXiv:2202.00666): the fewest tokens with a surprise nearest
    to the entropy whose weights reach `mass`.

    Surprise is ln(Σ exp z) - z and entropy ln(Σ exp z) - mean z, so these are the tokens whose z is
    nearest to the mean of z.
    """
    return _keep_first(np.abs(z - mean), np.exp(z), mass)


def keep_min_p(z: NDArray[np.float64], min_p: float) -> NDArray[np.int64]:
    """Min-p (Nguyen et al., arXiv:2407.01082): the tokens that are at least `min_p` times as likely
    as the likeliest.
    """
    return np.flatnonzero(z >= z.max() + math.log(min_p))


def _keep_first(
    rank: NDArray[np.float64], weights: NDArray[np.float64], mass: float
) -> NDArray[np.int64]:
    """The fewest tokens of lowest rank whose weights reach `mass`, with the one that reaches it.

    The range of ranks is cut into equal parts, whose masses are summed. The part in which the mass
    is reached is cut again. When few tokens are left in it, they are sorted.
    """
    keep = np.zeros(rank.size, dtype=np.bool_)
    near = np.arange(rank.size)  # tokens of the part in which the mass is reached
    held = 0.0  # the mass of the tokens of lower rank, all of which are kept
    ranks, masses = rank, weights
    while (
        near.size > _SORTED
        and (span := float(ranks.max()) - (low := float(ranks.min()))) > _SMALLEST_SPAN
    ):
        # the part of each token; rounding never makes it fall as the rank rises
        part = ((ranks - low) * (_PARTS / span)).astype(np.int64)
        reached = held + np.cumsum(np.bincount(part, masses))
        last = min(int(np.searchsorted(reached, mass)), reached.size - 1)
        keep[near[part < last]] = True
        held = float(reached[last - 1]) if last else held
        inside = part == last
        near, ranks, masses = near[inside], ranks[inside], masses[inside]
    # sort the last few
    near = near[np.argsort(ranks, kind="stable")]
    count = int(np.searchsorted(held + np.cumsum(weights[near]), mass)) + 1
    keep[near[:count]] = True
    return np.flatnonzero(keep)
