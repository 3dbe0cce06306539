"""Turns a submission into requests for the scheduler: checks ids and parameters against the model,
and resolves the seed and the length of the answer.
"""

import random
from dataclasses import replace
from typing import NamedTuple

from ..constraint import Constraint
from ..request import Request
from ..sampling import check_token_ids
from ..sampling_params import SamplingParams
from ..tokenizer import Tokenizer
from .prompts import TokenizedPrompt, check_prompt_ids, truncate_prompt

__all__ = ["Submission", "build_requests"]


class Submission(NamedTuple):
    """What a reader asks for: `params.n` completions of a prompt, under one id."""

    request_id: str
    prompt: TokenizedPrompt
    params: SamplingParams
    constraint: Constraint | None = None  # params.structured_outputs, compiled


def build_requests(
    submission: Submission,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_model_len: int,
    seeds: random.Random,
) -> list[Request]:
    """One request for each completion. `seeds` provides a seed where the parameters have none.

    Raises RequestError or ConfigError for token ids that the model does not have.
    """
    request_id, prompt, params, constraint = submission
    check_prompt_ids(prompt.token_ids, vocab_size)
    tokens = truncate_prompt(prompt.token_ids, params, max_model_len)
    check_token_ids(params, vocab_size)
    seed = params.seed if params.seed is not None else seeds.getrandbits(63)
    room = max_model_len - len(tokens)
    banned = tuple(_banned_sequences(params, tokenizer))
    return [
        Request(
            request_id=request_id if params.n == 1 else f"{request_id}-{i}",
            prompt_token_ids=tokens,
            # the prompt is scored once
            params=params if i == 0 else replace(params, prompt_logprobs=None),
            seed=(seed + i) & 0xFFFFFFFFFFFFFFFF,
            eos_token_ids=tokenizer.eos_token_ids,
            banned_sequences=banned,
            constraint=None if constraint is None else constraint.copy(),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            priority=prompt.priority,
            tenant=prompt.tenant,
            cache_salt=prompt.cache_salt,
            prompt_logprobs=[None] if params.prompt_logprobs is not None and i == 0 else [],
        )
        for i in range(params.n)
    ]


def _banned_sequences(params: SamplingParams, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Token sequences that spell a bad word, at the beginning of the text or after a space."""
    return sorted(
        {
            ids
            for word in params.bad_words or ()
            for text in (word, " " + word.lstrip())
            if (ids := tuple(tokenizer.encode(text, add_special=False)))
        }
    )
