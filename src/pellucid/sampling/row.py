"""The inputs of the sampler for one row of logits, and the checks that need the model's
vocabulary.

One idea: a `SamplingRow` is everything that the next token may depend on beside its logits. The
token cannot depend on the other rows, the step, the order of the batch or the clock, because they
are not in it.

This module does not know `Request`, so that speculation can ask for tokens at positions that the
request has not reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..request import SamplingParams

__all__ = ["SamplingRow", "TokenIds", "check_token_ids"]

# An integer array saves the conversion of a long prompt at each step with a penalty.
TokenIds: TypeAlias = Sequence[int] | NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """How the token of one row of logits is chosen. It is built for a step and holds references to
    the request's lists, not copies.
    """

    params: SamplingParams
    seed: int  # the request's, resolved; its low 64 bits count
    position: int  # of the token to be chosen, in its request: the number of tokens before it
    prompt_token_ids: TokenIds = ()
    output_token_ids: TokenIds = ()  # so far
    banned_sequences: Sequence[Sequence[int]] = ()  # params.bad_words, tokenized
    eos_token_ids: frozenset[int] = frozenset()
    # bool [V] or shorter: constrained output. Only tokens that are True may be drawn; tokens beyond
    # the mask may not. It acts with the other bans, so logprobs stay those of the model.
    allowed_mask: NDArray[np.bool_] | None = None


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise ConfigError where `params` name a token that a vocabulary of this size does not
    hold.
    """
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
