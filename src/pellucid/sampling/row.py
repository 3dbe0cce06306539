"""The inputs of the sampler for one row of logits, and the checks that need the model's vocabulary.

A `SamplingRow` is everything that the next token may depend on, beside its logits. It does not hold
the other rows, the step, the order of the batch or the clock, so the token cannot depend on them.

This module does not use `Request`, so that speculation can ask for tokens at positions that the
request has not reached.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..sampling_params import SamplingParams

__all__ = ["SamplingRow", "TokenIds", "check_token_ids"]

# as an integer array, a long prompt needs no conversion at each step with a penalty
TokenIds: TypeAlias = Sequence[int] | NDArray[Any]


class SamplingRow(NamedTuple):
    """How the token of one row of logits is chosen. It is built for one step and refers to the
    request's lists without copying them.
    """

    params: SamplingParams
    seed: int  # the request's, already resolved; its low 64 bits are used
    position: int  # of the new token in its request: the number of tokens before it
    prompt_token_ids: TokenIds = ()
    output_token_ids: TokenIds = ()  # so far
    banned_sequences: Sequence[Sequence[int]] = ()  # params.bad_words, tokenized
    eos_token_ids: frozenset[int] = frozenset()
    # bool [V] or shorter, for constrained output: only tokens that are True may be drawn, and none
    # beyond the mask. It acts with the other bans, so logprobs stay those of the model.
    allowed_mask: NDArray[np.bool_] | None = None


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise ConfigError if `params` name a token outside a vocabulary of this size."""
    for name, token_ids in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids),
        ("stop_token_ids", params.stop_token_ids),
    ):
        largest = max(token_ids, default=0) if token_ids is not None else 0
        if largest >= vocab_size:
            raise ConfigError(
                f"{name} holds token id {largest}; the model's token ids lie between 0 and "
                f"{vocab_size - 1}"
            )
