"""Perplexity by llama.cpp's protocol, so that figures are comparable with its own.

The text is tokenized once and cut into chunks of `n_ctx` tokens. If the model has a
beginning-of-sequence token, it begins the text and replaces the first token of each chunk. Each
chunk is a sequence of its own. Only its second half is scored: the tokens at positions n_ctx/2 + 1
… n_ctx - 1, so that each has at least half a window of context. The perplexity is exp of the mean
negative log-likelihood:

    PPL = exp(Σ nll / N)        N = (n_ctx - 1 - n_ctx/2) per chunk

and its standard error PPL · sqrt((E[nll²] - E[nll]²) / (N - 1)). Source:
`tools/perplexity/perplexity.cpp` of llama.cpp. The model runs through the public API, so the whole
engine is measured.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..engine.llm import LLM
from ..errors import RequestError
from ..request import SamplingParams

__all__ = ["Perplexity", "measure_perplexity"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The result after some chunks. llama-perplexity prints `perplexity ± error` as its
    estimate.
    """

    num_chunks: int
    num_scored_tokens: int
    nll: float  # nats, summed
    perplexity: float
    error: float


def measure_perplexity(
    llm: LLM, text: str, *, n_ctx: int = 512, max_chunks: int | None = None
) -> Iterator[Perplexity]:
    """Score `text`, yielding the estimate after each chunk; the last is the result. Raises
    RequestError if the text is too short.
    """
    if not 8 <= n_ctx <= llm.max_model_len - 1:
        raise RequestError(
            f"n_ctx is {n_ctx}; it must be between 8 and {llm.max_model_len - 1}, one less than "
            "max_model_len"
        )
    # tokenize, and cut into chunks
    token_ids = llm.tokenizer.encode(text.removesuffix("\n"))
    num_chunks = len(token_ids) // n_ctx
    if num_chunks < 2:
        raise RequestError(
            f"the text has {len(token_ids)} tokens; perplexity over chunks of {n_ctx} needs at "
            f"least {2 * n_ctx}"
        )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    total = squares = 0.0
    scored = 0
    # score the second half of each chunk
    for i in range(num_chunks if max_chunks is None else min(num_chunks, max_chunks)):
        chunk = token_ids[i * n_ctx : (i + 1) * n_ctx]
        if llm.tokenizer.add_bos and llm.tokenizer.bos_token_id is not None:
            chunk[0] = llm.tokenizer.bos_token_id
        rows = llm.generate([chunk], params, use_tqdm=False)[0].prompt_logprobs or []
        for token, row in zip(chunk[n_ctx // 2 + 1 :], rows[n_ctx // 2 + 1 :], strict=True):
            if row is None:
                raise AssertionError("a scored token has no logprob")
            nll = -row[token].logprob
            total += nll
            squares += nll * nll
            scored += 1
        # the estimate so far
        mean = total / scored
        perplexity = math.exp(mean)
        yield Perplexity(
            i + 1,
            scored,
            total,
            perplexity,
            perplexity * math.sqrt(max(0.0, squares / scored - mean * mean) / (scored - 1)),
        )
