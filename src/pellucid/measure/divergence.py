"""Compares a model's distributions with those of a base model, over the tokens of a text.

Use it to compare a quantized model with the original. It needs far fewer tokens than perplexity to
show a difference, because each token is compared with itself. Definitions are those of
`llama-perplexity --kl-divergence`, for each scored token, with natural logarithms:

    KL = Σ_v base(v) · (ln base(v) - ln model(v))      over the whole vocabulary
    Δp = model(t) - base(t)                            t: the token that follows in the text
    agreement: the likeliest token is the same
    ln(PPL(model) / PPL(base)) = mean of nll(model) - nll(base)

All errors are standard errors of means over the tokens. The last one is paired: it comes from the
variance of the differences, which is far smaller than those of the two perplexities.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .perplexity import Estimate, Perplexity, log_probs, mean_estimate, perplexity_of
from .scoring import ScoredRows, Scorer, Windows

__all__ = ["Base", "BaseRows", "Divergence", "LiveBase", "ReadPart", "measure_divergence"]


class BaseRows(NamedTuple):
    """The base model's predictions for some rows."""

    log_probs: NDArray[np.float32]  # [L, V]; may be rounded, and are normalized when used
    top: NDArray[np.int64]  # [L]  the likeliest token
    targets: NDArray[np.float64]  # [L]  log-probability of the token that follows


ReadPart: TypeAlias = Callable[[slice], BaseRows]  # rows of a step; may be called by any thread


class Base(Protocol):
    """A source of the base's predictions: a model that runs too, or a file."""

    def take(self, count: int) -> ReadPart:
        """The next `count` rows."""


class LiveBase:
    """A base model that runs together with the measured one."""

    def __init__(self, scorer: Scorer, windows: Windows) -> None:
        self._steps = scorer.run(windows)

    def take(self, count: int) -> ReadPart:
        rows = next(self._steps)
        if len(rows.targets) != count:
            raise AssertionError("base and model are run in different steps")

        def read(part: slice) -> BaseRows:
            logits, targets = rows.logits[part], rows.targets[part]
            values = log_probs(logits)
            chosen = values[np.arange(len(values)), targets]
            return BaseRows(values, logits.argmax(axis=1), chosen.astype(np.float64))

        return read


@dataclass(frozen=True, slots=True)
class Divergence:
    """The result after some chunks. Shares and probabilities lie between 0 and 1."""

    model: Perplexity
    base: Perplexity
    ratio: Estimate  # PPL(model) / PPL(base)
    kl: Estimate  # nats
    kl_median: float
    kl_99: float  # 99 of 100 tokens have at most this
    kl_999: float
    kl_max: float
    same_top: Estimate
    delta_p: Estimate
    delta_p_rms: Estimate


class _Tokens(NamedTuple):
    """The figures of each scored token [N]."""

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    base_nll: NDArray[np.float64]
    same_top: NDArray[np.bool_]


def measure_divergence(scorer: Scorer, windows: Windows, base: Base) -> Iterator[Divergence]:
    """Score the windows and compare with the base. Yields the result so far whenever windows are
    complete. Raises RequestError for a logit that is not finite.
    """
    tokens: list[_Tokens] = []
    num_windows = 0
    with ThreadPoolExecutor() as pool:

        def compare(rows: ScoredRows) -> tuple[int, list[_Tokens]]:
            read = base.take(len(rows.targets))

            def compare_part(part: slice) -> _Tokens:
                return _compare(rows.logits[part], rows.targets[part], read(part))

            return rows.num_windows, list(pool.map(compare_part, rows.parts()))

        # map: the logits of a step are forgotten before the next one runs
        for complete, found in map(compare, scorer.run(windows)):
            tokens += found
            num_windows += complete
            if complete:
                tokens = [_Tokens(*map(np.concatenate, zip(*tokens, strict=True)))]
                yield _divergence(num_windows, tokens[0])


def _compare(logits: NDArray[np.float32], targets: NDArray[np.int64], base: BaseRows) -> _Tokens:
    """The figures for some rows of logits [L, V]."""
    values = log_probs(logits)
    weights = np.exp(base.log_probs)
    total = weights.sum(axis=1)  # 1, apart from rounding
    with np.errstate(invalid="ignore"):  # 0 · infinity
        weights *= base.log_probs - values
    kl = weights.sum(axis=1).astype(np.float64) / total - np.log(total)
    nll = -values[np.arange(len(values)), targets].astype(np.float64)
    if not (np.isfinite(kl).all() and np.isfinite(nll).all()):
        raise RequestError("a logit is NaN or infinite; all must be finite numbers")
    return _Tokens(kl, nll, -base.targets, logits.argmax(axis=1) == base.top)


def _divergence(num_windows: int, tokens: _Tokens) -> Divergence:
    """The statistics of all scored tokens."""
    change = mean_estimate(tokens.nll - tokens.base_nll)
    ratio = float(np.exp(change.value))
    same_top = mean_estimate(tokens.same_top.astype(np.float64))
    delta_p = np.exp(-tokens.nll) - np.exp(-tokens.base_nll)
    # RMS is the root of a mean; the error follows from d sqrt(x) = dx / (2 sqrt(x))
    squares = mean_estimate(delta_p * delta_p)
    rms = float(np.sqrt(squares.value))
    median, p99, p999 = map(float, np.quantile(tokens.kl, (0.5, 0.99, 0.999)))
    return Divergence(
        model=perplexity_of(num_windows, tokens.nll),
        base=perplexity_of(num_windows, tokens.base_nll),
        ratio=Estimate(ratio, ratio * change.error),
        kl=mean_estimate(tokens.kl),
        kl_median=median,
        kl_99=p99,
        kl_999=p999,
        kl_max=float(tokens.kl.max()),
        same_top=same_top,
        delta_p=mean_estimate(delta_p),
        delta_p_rms=Estimate(rms, squares.error / (2 * rms) if rms else 0.0),
    )
