"""Makes a weight make up for errors of the layers before it.

Behind a prefix that is quantized a matrix does not see its exact input x, but x̃. The products
Ŵ x̃ shall come near W x, so the weight to be rounded is the one that does this best before rounding
(GPTAQ, Li et al., arXiv:2504.02692):

    W + W D H⁻¹        D = E[(x - x̃) x̃ᵀ], H = E[x̃ x̃ᵀ]

A share of the change is used: the one that lowers the error most on other text, between 0 and 1.

Shapes: R rows (outputs), n columns (inputs), T tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..formats.finite import check_activation
from .gptq import Factor

__all__ = ["Moments", "corrected", "mean_moments"]

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Means over the tokens of a text."""

    hessian: Doubles  # [n, n]  H
    drift: Floats  # [n, n]  D


@np.errstate(over="ignore", invalid="ignore")  # the caller refuses what is not finite
def mean_moments(steps: Iterable[tuple[Floats, Floats]]) -> Moments:
    """The means over some steps. Each has the inputs x̃ and x, [T, n]."""
    tokens, hessian, drift = 0, None, None
    for found, exact in steps:
        # float32 within a step, float64 between steps
        own, missed = found.T @ found, (exact - found).T @ found
        if hessian is None or drift is None:
            hessian, drift = np.zeros(own.shape), np.zeros(own.shape)
        tokens += len(found)
        hessian += own
        drift += missed
    if hessian is None or drift is None:
        raise ValueError("there are no steps")
    return Moments(hessian / tokens, (drift / tokens).astype(np.float32))


@np.errstate(over="ignore", invalid="ignore")
def corrected(weight: Floats, moments: Moments, factor: Factor, other: Moments) -> Floats:
    """The weight [R, n] with a share of the change. `factor` is that of `moments.hessian`, `other`
    are the moments of another text. Raises FormatError if inputs are so large that it overflows.
    """
    order, upper = factor.order, factor.upper
    # W D H⁻¹ with H⁻¹ = Uᵀ U
    change = np.empty_like(weight)
    change[:, order] = (weight @ moments.drift)[:, order] @ upper.T @ upper
    # the error on the other text is a parabola of the share
    slope = np.vdot(change, weight @ other.drift)
    curve = np.vdot(change @ other.hessian.astype(np.float32), change)
    share = np.float32(np.clip(slope / curve, 0, 1)) if curve > 0 else np.float32(0)
    found: Floats = weight + share * change
    check_activation("the correction for layers before", bool(np.isfinite(found).all()))
    return found
