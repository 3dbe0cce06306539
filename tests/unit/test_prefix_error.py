"""The weight that makes up for errors of the layers before, against its definition."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.quant.gptq import factorize
from pellucid.quant.prefix_error import Moments, corrected, mean_moments

Floats = NDArray[np.float32]
N, ROWS = 48, 7


def text(seed: int, tokens: int, sign: float = 1.0) -> tuple[Floats, Floats]:
    """Inputs as they are and exact ones. Their difference is a fixed map of the exact inputs, as
    behind a weight that was rounded, and some noise.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    mixing = fixed.normal(size=(N, N)) * np.arange(1, N + 1) ** -0.5
    wrong = fixed.normal(size=(N, N)) * 0.02
    exact = rng.normal(size=(tokens, N)) @ mixing
    found = exact + sign * exact @ wrong + rng.normal(size=(tokens, N)) * 0.05
    return found.astype(np.float32), exact.astype(np.float32)


def moments(found: Floats, exact: Floats) -> Moments:
    return mean_moments(zip(np.array_split(found, 3), np.array_split(exact, 3), strict=True))


def weight() -> Floats:
    return np.random.default_rng(5).normal(size=(ROWS, N)).astype(np.float32)


def lost(changed: Floats, found: Floats, exact: Floats) -> float:
    return float(np.square(found @ changed.T - exact @ weight().T).mean())


def test_moments_are_means_over_all_tokens() -> None:
    found, exact = text(1, 100)
    result = moments(found, exact)
    np.testing.assert_allclose(result.hessian, found.T @ found / 100, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.drift, (exact - found).T @ found / 100, atol=1e-5)


def test_the_corrected_weight_is_the_best_one() -> None:
    found, exact = text(1, 4000)
    own = moments(found, exact)
    best = np.linalg.lstsq(found, exact @ weight().T, rcond=None)[0].T
    factor = factorize(own.hessian, act_order=True, damping=1e-6)
    np.testing.assert_allclose(corrected(weight(), own, factor, own), best, atol=2e-3)


def test_less_is_lost_on_fresh_text() -> None:
    own, other, fresh = (text(seed, tokens) for seed, tokens in ((1, 2000), (2, 400), (3, 400)))
    found = moments(*own)
    changed = corrected(weight(), found, factorize(found.hessian, act_order=True), moments(*other))
    assert lost(changed, *fresh) < 0.5 * lost(weight(), *fresh)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_what_does_not_help_on_other_text_is_not_used(sign: float) -> None:
    """Another text whose inputs are exact, or wrong in the opposite direction."""
    found, other = moments(*text(1, 2000)), moments(*text(2, 2000, sign))
    changed = corrected(weight(), found, factorize(found.hessian, act_order=True), other)
    assert np.abs(changed - weight()).max() < 0.1 * np.abs(weight()).mean()


def test_exact_inputs_change_nothing() -> None:
    _, exact = text(1, 400)
    same = moments(exact, exact)
    factor = factorize(same.hessian, act_order=True)
    np.testing.assert_array_equal(corrected(weight(), same, factor, same), weight())
