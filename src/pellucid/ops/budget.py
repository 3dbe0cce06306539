"""The error budget of each op. It follows from the arithmetic, not from the errors that were seen.

A fast kernel may round in another order than the formula, but its error must not be much larger. So
the formula is evaluated in the plainest way in float64 (taken as exact) and in float32 (naive). By
the rule of flash-attention's tests,

    max |actual - exact|  <=  2 · max |naive - exact|  +  jitter

The jitter is a few units in the last place of the largest result. It covers small cases in which
the naive evaluation happens to be exact. An op may magnify the rounding of its inputs, as the
softmax does with large scores: `condition` says how many times.

A backend that quantizes activations to int8, to multiply them with quantized weights, makes an
error of another kind. With blocks of 32 numbers it is about 3e-5 of the output's power for normally
distributed inputs. So such a product must have NMSE = Σ (actual - exact)² / Σ exact² <= 1e-4 · (1 +
4 / sqrt(n)). The last factor is there because the NMSE of few outputs n scatters. (ggml's
test-backend-ops allows 5e-4.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FACTOR",
    "INT8_ACTIVATIONS_NMSE",
    "Verdict",
    "check_dense",
    "check_int8_activations",
    "nmse",
]

FACTOR = 2.0  # times the naive evaluation's error
JITTER_ULPS = 4.0  # units in the last place of the largest result
INT8_ACTIVATIONS_NMSE = 1e-4


@dataclass(frozen=True, slots=True)
class Verdict:
    """An error and its limit, in the same unit."""

    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"error {self.error:.3g}, limit {self.limit:.3g}"


def _largest(x: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _error(actual: NDArray[np.float32], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error of each element; infinite for an unexpected NaN or infinity, and for a wrong
    shape.
    """
    if actual.shape != exact.shape:
        return np.array([np.inf])
    difference = np.subtract(actual, exact, dtype=np.float64)
    return np.where(np.isfinite(difference), difference, np.inf)


def check_dense(
    actual: NDArray[np.float32],
    exact: NDArray[np.float64],
    naive: NDArray[np.float32],
    *,
    condition: float = 1.0,
) -> Verdict:
    """Compare the error of a float32 result with twice that of the naive float32 evaluation."""
    jitter = JITTER_ULPS * condition * float(np.spacing(np.float32(_largest(exact))))
    return Verdict(
        _largest(_error(actual, exact)), FACTOR * _largest(_error(naive, exact)) + jitter
    )


def nmse(actual: NDArray[np.float32], exact: NDArray[np.float64]) -> float:
    """The power of the error divided by the power of the exact result."""
    error, power = float(np.sum(_error(actual, exact) ** 2)), float(np.sum(exact**2))
    return error / power if power else error


def check_int8_activations(actual: NDArray[np.float32], exact: NDArray[np.float64]) -> Verdict:
    """Compare the NMSE of a product of quantized weights with int8 activations with its limit."""
    return Verdict(nmse(actual, exact), INT8_ACTIVATIONS_NMSE * (1 + 4 / max(1, exact.size) ** 0.5))
