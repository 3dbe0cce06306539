"""Log-probabilities and ranks of the chosen token and of the likeliest tokens, from raw logits.

A log-probability is logit - ln(Σ exp logits), and only that sum needs the whole vocabulary. A row
costs one pass for the sum and one for the rank. The softmax is never stored, so the extra memory
does not grow with the number of rows.

Raw logits are those before bias, bans, penalties and temperature. The sum has seven correct digits,
as many as the logits. The rank is 1 + the number of tokens that are strictly likelier.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..outputs import Logprob, LogprobsOnePosition
from .processors import keep_largest, total_weight

__all__ = ["top_logprobs"]


def top_logprobs(
    logits: NDArray[np.float32], chosen: Sequence[int], k: Sequence[int | None]
) -> list[LogprobsOnePosition | RequestError | None]:
    """For each row of logits [R, V]: the chosen token, then the k likeliest in falling order (ties
    by token id).

    k = 0 gives only the chosen token, k = -1 the whole vocabulary, and k = None gives None. A row
    whose logits hold NaN or +inf, or only -inf, gives the error with which its request must end.
    `decoded_token` is None here; the engine adds the text.
    """
    # the sums ignore a logit so far below the largest that the difference is -inf in float32
    with np.errstate(over="ignore"):
        return [
            None if n is None else _row_logprobs(x, token_id, n)
            for x, token_id, n in zip(logits, chosen, k, strict=True)
        ]


def _row_logprobs(
    logits: NDArray[np.float32], chosen: int, k: int
) -> LogprobsOnePosition | RequestError:
    # The normalizer of the softmax; the maximum is NaN if any logit is.
    largest = float(logits.max())
    if not math.isfinite(largest):
        return RequestError(
            f"the logits from which logprobs are asked have {largest} as their largest; it must "
            "be a finite number"
        )
    log_sum = largest + math.log(total_weight(logits, largest, 1.0))
    # The chosen token, then the k likeliest.
    rank = 1 + int(np.count_nonzero(logits > logits[chosen]))
    result = {chosen: Logprob(float(logits[chosen]) - log_sum, rank)}
    if k:
        top = keep_largest(logits, k if k > 0 else logits.size)
        top = top[np.argsort(-logits[top], kind="stable")]
        values = logits[top]
        ranks = 1 + np.searchsorted(-values, -values)
        for token_id, value, rank in zip(
            top.tolist(), values.tolist(), ranks.tolist(), strict=True
        ):
            result[token_id] = Logprob(value - log_sum, rank)
    return result
