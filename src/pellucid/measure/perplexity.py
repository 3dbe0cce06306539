"""Perplexity of a text, by one of two protocols. Figures of different protocols are not comparable.

`llama.cpp`, as llama-perplexity computes it: the text is tokenized once and cut into chunks of
n_ctx tokens (512 by default). If the model has a beginning-of-sequence token, it begins the text
and replaces the first token of each chunk. Each chunk is a sequence of its own. Only its second
half is scored, the tokens at positions n_ctx/2 + 1 … n_ctx - 1, so that each has at least half a
window of context. Source: `tools/perplexity/perplexity.cpp` of llama.cpp.

`papers`, as papers on quantization report it (GPTQ, AWQ, SmoothQuant, usually with 2,048 tokens):
the tokens are cut into consecutive windows of n_ctx tokens, and every token of a window but the
first is scored. No token is replaced. The text is used unchanged; those papers first join the rows
of WikiText-2 with two newlines.

    PPL = exp(Σ nll / N)        its standard error: PPL · sqrt((E[nll²] - E[nll]²) / (N - 1))
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..tokenizer import Tokenizer
from .scoring import ScoredRows, Scorer, Windows

__all__ = [
    "PROTOCOLS",
    "Estimate",
    "Perplexity",
    "Protocol",
    "cut_windows",
    "log_probs",
    "mean_estimate",
    "measure_perplexity",
    "perplexity_of",
]

MIN_N_CTX = 8


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a text is cut, and which tokens are scored."""

    name: str
    default_n_ctx: int
    min_windows: int
    scores_half: bool  # the second half of a window; else all of it
    overwrites_first: bool  # with the beginning-of-sequence token, if the model has one

    def first(self, n_ctx: int) -> int:
        """The first position of a window whose prediction is scored."""
        return n_ctx // 2 if self.scores_half else 0


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("llama.cpp", 512, min_windows=2, scores_half=True, overwrites_first=True),
        Protocol("papers", 2048, min_windows=1, scores_half=False, overwrites_first=False),
    )
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The result after some chunks. `perplexity ± error` is what llama-perplexity prints as its
    estimate.
    """

    num_chunks: int
    num_scored_tokens: int
    nll: float  # nats, summed
    perplexity: float
    error: float


def cut_windows(
    tokenizer: Tokenizer, text: str, protocol: Protocol, n_ctx: int, max_windows: int | None = None
) -> Windows:
    """Tokenize `text` and cut it by the protocol into at most `max_windows` windows. Raises
    RequestError if `n_ctx` or the text is too short.
    """
    if n_ctx < MIN_N_CTX:
        raise RequestError(f"n_ctx is {n_ctx}; it must be at least {MIN_N_CTX}")
    token_ids = np.array(tokenizer.encode(text.removesuffix("\n")), np.int32)
    num_windows = len(token_ids) // n_ctx
    if num_windows < protocol.min_windows:
        raise RequestError(
            f"the text has {len(token_ids)} token{'s' * (len(token_ids) != 1)}; the protocol "
            f"{protocol.name} with n_ctx {n_ctx} needs at least {protocol.min_windows * n_ctx}"
        )
    if max_windows is not None:
        num_windows = min(num_windows, max_windows)
    windows = token_ids[: num_windows * n_ctx].reshape(num_windows, n_ctx)
    if protocol.overwrites_first and tokenizer.add_bos and tokenizer.bos_token_id is not None:
        windows[:, 0] = tokenizer.bos_token_id
    return Windows(windows, protocol.first(n_ctx))


def measure_perplexity(scorer: Scorer, windows: Windows) -> Iterator[Perplexity]:
    """Score the windows. Yields the estimate whenever windows are complete; the last is the result.
    Raises RequestError if the logits are not finite.
    """
    nlls = np.empty(0)
    num_windows = 0
    with ThreadPoolExecutor() as pool:

        def score(rows: ScoredRows) -> tuple[int, list[NDArray[np.float64]]]:
            def score_part(part: slice) -> NDArray[np.float64]:
                return _nlls(rows.logits[part], rows.targets[part])

            return rows.num_windows, list(pool.map(score_part, rows.parts()))

        # map: the logits of a step are forgotten before the next one runs
        for complete, found in map(score, scorer.run(windows)):
            nlls = np.concatenate([nlls, *found])
            num_windows += complete
            if complete:
                yield perplexity_of(num_windows, nlls)


def perplexity_of(num_windows: int, nlls: NDArray[np.float64]) -> Perplexity:
    """The result for the negative log-likelihoods [N] of all scored tokens."""
    mean = mean_estimate(nlls)
    perplexity = math.exp(mean.value) if mean.value < 700 else math.inf
    return Perplexity(
        num_windows, len(nlls), float(nlls.sum()), perplexity, perplexity * mean.error
    )


def mean_estimate(values: NDArray[np.float64]) -> Estimate:
    """The mean of [N] and its standard error, from the variance of the values."""
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(max(1, len(values) - 1)))


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """logits - ln Σ exp logits, row by row: [L, V], with seven correct digits. Raises RequestError
    for a logit that is NaN or infinite.
    """
    with np.errstate(invalid="ignore"):  # infinity - infinity
        shifted: NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    sums = np.exp(shifted).sum(axis=1, keepdims=True)
    if not np.isfinite(sums).all():
        raise RequestError("a logit is NaN or infinite; all must be finite numbers")
    shifted -= np.log(sums)
    return shifted


def _nlls(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """The negative log-likelihood of each target [L]."""
    largest = logits.max(axis=1)
    with np.errstate(invalid="ignore"):  # infinity - infinity
        shifted = logits - largest[:, None]
        chosen = logits[np.arange(len(logits)), targets].astype(np.float64) - largest
    sums = np.exp(shifted, out=shifted).sum(axis=1).astype(np.float64)
    nlls: NDArray[np.float64] = np.log(sums) - chosen
    if not np.isfinite(nlls).all():
        raise RequestError("a logit is NaN or infinite; all must be finite numbers")
    return nlls
