"""What the sampler must know of the request that a row of logits belongs to, and the checks that
need the model's vocabulary.

One idea: a `SamplingRow` is everything that the next token may depend on beside its logits. What is
not in it (the other rows, the step, the order of the batch, the clock) cannot reach the token.

It must not know `Request`, so that speculation can ask for tokens at positions that the request has
not reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from numpy.typing import NDArray

from ..errors import ConfigError
from ..request import SamplingParams

__all__ = ["SamplingRow", "TokenIds", "check_token_ids"]

# an integer array spares a conversion at each step where a penalty reads long prompts
TokenIds: TypeAlias = Sequence[int] | NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """One row of logits and how its token is to be chosen. Build it for the step; it holds
    references, no copies.
    """

    params: SamplingParams
    seed: int  # the request's, resolved; its low 64 bits count
    position: int  # of the token to be chosen, in its request: the number of tokens before it
    prompt_token_ids: TokenIds = ()
    output_token_ids: TokenIds = ()  # so far
    banned_sequences: Sequence[Sequence[int]] = ()  # params.bad_words, tokenized
    eos_token_ids: frozenset[int] = frozenset()


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
