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

__all__ = [
    "Base",
    "BaseRows",
    "Divergence",
    "DivergenceMeter",
    "LiveBase",
    "ReadPart",
    "base_rows",
    "measure_divergence",
]


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

        return lambda part: base_rows(rows.logits[part], rows.targets[part])


def base_rows(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> BaseRows:
    """What a base with these logits [L, V] predicts. Raises RequestError for a logit that is not
    finite.
    """
    values = log_probs(logits)
    chosen = values[np.arange(len(values)), targets]
    return BaseRows(values, logits.argmax(axis=1), chosen.astype(np.float64))


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


class DivergenceMeter:
    """Collects the figures of scored tokens, and gives the statistics of all so far. An exception
    in `add` leaves the windows that were complete before.
    """

    def __init__(self, rows_per_window: int) -> None:
        self.num_windows = 0  # complete ones
        self._rows_per_window = rows_per_window
        self._tokens: list[_Tokens] = []

    def add(self, rows: ScoredRows, read: ReadPart, pool: ThreadPoolExecutor) -> None:
        """Compare the rows of a step with what `read` gives for the same rows of the base. Raises
        RequestError for a logit that is not finite.
        """

        def compare_part(part: slice) -> _Tokens:
            return _compare(rows.logits[part], rows.targets[part], read(part))

        self._tokens += pool.map(compare_part, rows.parts())
        self.num_windows += rows.num_windows

    def kl(self, num_windows: int) -> NDArray[np.float64]:
        """The divergence of each scored token of the first windows [N], in the order of the
        text.
        """
        return self._first(num_windows).kl

    def result(self, num_windows: int) -> Divergence:
        """The statistics of the first windows: at least one, and all of them complete."""
        return _divergence(num_windows, self._first(num_windows))

    def _first(self, num_windows: int) -> _Tokens:
        self._tokens = [_Tokens(*map(np.concatenate, zip(*self._tokens, strict=True)))]
        count = num_windows * self._rows_per_window
        kl, nll, base_nll, same_top = self._tokens[0]
        return _Tokens(kl[:count], nll[:count], base_nll[:count], same_top[:count])


def measure_divergence(scorer: Scorer, windows: Windows, base: Base) -> Iterator[Divergence]:
    """Score the windows and compare with the base. Yields the result so far whenever windows are
    complete. Raises RequestError for a logit that is not finite.
    """
    meter = DivergenceMeter(windows.rows_per_window)
    with ThreadPoolExecutor() as pool:

        def compare(rows: ScoredRows) -> bool:
            meter.add(rows, base.take(len(rows.targets)), pool)
            return rows.num_windows > 0

        # map: the logits of a step are forgotten before the next one runs
        for is_complete in map(compare, scorer.run(windows)):
            if is_complete:
                yield meter.result(meter.num_windows)


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
