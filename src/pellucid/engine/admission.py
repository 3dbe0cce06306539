"""Turns a submission into requests for the scheduler: checks ids and parameters against the model,
and resolves the seed and the length of the answer.
"""

import random
from dataclasses import replace
from typing import NamedTuple

from ..config import ModelConfig
from ..constraint import Constraint
from ..errors import ConfigError
from ..pooling_params import Pooling, PoolingParams
from ..request import Request
from ..sampling import check_token_ids
from ..sampling_params import SamplingParams
from ..tokenizer import Tokenizer
from .prompts import TokenizedPrompt, check_prompt_ids, truncate_prompt

__all__ = ["Submission", "build_requests", "tokenize_bad_words"]


# of a request for an embedding
_NO_SAMPLING = SamplingParams(detokenize=False)


class Submission(NamedTuple):
    """What a reader asks for: `params.n` completions of a prompt under one id, or an embedding."""

    request_id: str
    prompt: TokenizedPrompt
    params: SamplingParams | PoolingParams
    constraint: Constraint | None = None  # params.structured_outputs, compiled
    banned_sequences: tuple[tuple[int, ...], ...] = ()  # params.bad_words, tokenized
    name: str = ""  # what errors call the prompt, if it is one of several: "prompts[2]"
    only_whole: bool = False  # the reader wants only the finished output


def build_requests(
    submission: Submission,
    tokenizer: Tokenizer,
    model: ModelConfig,
    max_model_len: int,
    seeds: random.Random,
) -> list[Request]:
    """One request for each completion, or one for an embedding. `seeds` provides a seed where the
    parameters have none.

    Raises RequestError or ConfigError for token ids or dimensions that the model does not have.
    """
    request_id, prompt, params, constraint, banned, *_ = submission
    check_prompt_ids(prompt.token_ids, model.vocab_size)
    if isinstance(params, PoolingParams):
        return [_build_pooled(request_id, prompt, params, model, max_model_len)]
    tokens = truncate_prompt(prompt.token_ids, params, max_model_len)
    check_token_ids(params, model.vocab_size)
    seed = params.seed if params.seed is not None else seeds.getrandbits(63)
    room = max_model_len - len(tokens)
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


def _build_pooled(
    request_id: str,
    prompt: TokenizedPrompt,
    params: PoolingParams,
    model: ModelConfig,
    max_model_len: int,
) -> Request:
    """The request for an embedding."""
    if params.dimensions is not None and params.dimensions > model.hidden_size:
        raise ConfigError(
            f"dimensions is {params.dimensions}; the embeddings of this model have "
            f"{model.hidden_size} numbers, so it must be at most that"
        )
    tokens, last = prompt.token_ids, params.truncate_prompt_tokens
    if last is not None:
        tokens = tokens[-(max_model_len if last == -1 else last) :]
    return Request(
        request_id=request_id,
        prompt_token_ids=tokens,
        params=_NO_SAMPLING,
        seed=0,
        pooling=Pooling(params, len(tokens)),
        max_tokens=0,
        priority=prompt.priority,
        tenant=prompt.tenant,
        cache_salt=prompt.cache_salt,
    )


def tokenize_bad_words(params: SamplingParams, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences that spell a bad word, at the beginning of the text or after a space."""
    found = sorted(
        {
            ids
            for word in params.bad_words or ()
            for text in (word, " " + word.lstrip())
            if (ids := tuple(tokenizer.encode(text, add_special=False)))
        }
    )
    return tuple(found)
