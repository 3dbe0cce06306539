"""GPTQ against its definition, against brute force, and against rounding to nearest."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.errors import ConfigError
from pellucid.quant.error_feedback import quadratic_loss
from pellucid.quant.gptq import factorize, feed_back, gptq, round_to_nearest

Doubles = NDArray[np.float64]


def correlated(n: int, seed: int, tokens: int = 2048, outliers: int = 4) -> tuple[Doubles, Doubles]:
    """Hessians of two samples of correlated inputs, some of which are much larger."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.normal(size=(n, n)))[0] * np.arange(1, n + 1) ** -0.4

    def hessian() -> Doubles:
        x = rng.normal(size=(tokens, n)) @ mixing.T
        x[:, n - outliers :] *= 15
        product: Doubles = x.T @ x / tokens
        return product

    return hessian(), hessian()


def heavy_tailed(rows: int, n: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(5, (rows, n)).astype(np.float32)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_damped_inverse(act_order: bool) -> None:
    hessian, _ = correlated(150, 0)
    factor = factorize(hessian, act_order=act_order, damping=0.01)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(150)
    inverse = np.linalg.inv(damped[np.ix_(factor.order, factor.order)])
    np.testing.assert_allclose(factor.upper.T @ factor.upper, inverse, rtol=1e-3, atol=1e-5)
    assert (np.tril(factor.upper, -1) == 0).all()
    ordered = np.diag(hessian)[factor.order]
    assert not act_order or (np.diff(ordered) <= 0).all()


@pytest.mark.parametrize("block", [1, 7, 128])
def test_feedback_in_blocks_is_the_definition(block: int) -> None:
    """OBQ in a fixed order: after each column, the others take the best change for its error."""
    n, rows = 24, 5
    hessian, _ = correlated(n, 1)
    weight = heavy_tailed(rows, n, 1)
    factor = factorize(hessian, act_order=True, damping=0.01)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(n)
    expected = weight.astype(np.float64)
    for place, j in enumerate(factor.order):
        rest = factor.order[place:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        error = expected[:, j] - np.rint(expected[:, j])
        expected[:, rest] -= np.outer(error, inverse[0] / inverse[0, 0])
        expected[:, j] = np.rint(expected[:, j])
    columns = weight.T[factor.order].copy()
    feed_back(columns, factor.upper, lambda _, x: np.rint(x), block)
    np.testing.assert_array_equal(columns, expected.T[factor.order])


def test_independent_inputs_leave_nothing_to_feed_back() -> None:
    weight = heavy_tailed(16, 64, 2)
    hessian = np.diag(np.random.default_rng(2).uniform(1, 9, 64))
    for act_order in (False, True):
        found = gptq(weight, hessian, bits=4, group_size=32, act_order=act_order)
        plain = round_to_nearest(weight, bits=4, group_size=32)
        np.testing.assert_array_equal(found.values(), plain.values())


def test_beside_the_best_of_all_codes() -> None:
    """Three columns of two bits: every choice of codes can be tried."""
    lost = np.zeros(3)  # by the best codes, GPTQ, rounding to nearest
    for seed in range(60):
        hessian, _ = correlated(3, seed, tokens=64, outliers=0)
        hessian += 3 * np.diag(hessian).mean()  # all inputs have a part in common
        weight = heavy_tailed(1, 3, seed)
        plain = round_to_nearest(weight, bits=2, group_size=None)
        found = gptq(weight, hessian, bits=2, group_size=None, act_order=True)
        np.testing.assert_array_equal(found.scales, plain.scales)  # one grid for all three
        numbers = plain.scales[0, 0] * (np.arange(4) - float(plain.zeros[0, 0]))
        best = min(
            quadratic_loss(weight - np.array([choice], np.float32), hessian)
            for choice in itertools.product(numbers, repeat=3)
        )
        mine, nearest = (quadratic_loss(weight - g.values(), hessian) for g in (found, plain))
        assert best <= mine * (1 + 1e-5)
        lost += best, mine, nearest
    assert lost[1] - lost[0] < 0.4 * (lost[2] - lost[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_less_is_lost_than_by_rounding_to_nearest(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    hessian, fresh = correlated(256, 3)
    weight = heavy_tailed(32, 256, 3)
    plain = round_to_nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    losses = [
        quadratic_loss(
            weight
            - gptq(
                weight,
                hessian,
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                act_order=act_order,
            ).values(),
            fresh,
        )
        for act_order in (False, True)
    ]
    nearest = quadratic_loss(weight - plain.values(), fresh)
    assert losses[1] < 0.9 * nearest
    assert losses[1] < losses[0]  # large inputs first


def test_codes_and_zeros_are_in_range() -> None:
    hessian, _ = correlated(128, 4)
    for bits, symmetric in itertools.product((2, 3, 4, 8), (False, True)):
        weight = heavy_tailed(8, 128, 4) + np.float32(2)  # far from 0
        found = gptq(weight, hessian, bits=bits, group_size=64, symmetric=symmetric)
        assert found.codes.max() < 1 << bits and found.zeros.max() < 1 << bits
        assert not symmetric or (found.zeros == 1 << (bits - 1)).all()
        assert np.array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    hessian, _ = correlated(64, 5)
    hessian[:, 10] = hessian[10] = 0
    found = gptq(heavy_tailed(4, 64, 5), hessian, bits=4, group_size=32)
    assert np.isfinite(found.values()).all() and (found.values()[:, 10] == 0).all()


@pytest.mark.parametrize("damping", [0.0, 1e-300, 1e-9])
def test_a_singular_hessian_is_damped_until_it_can_be_factorized(damping: float) -> None:
    x = np.random.default_rng(6).normal(size=(3, 64))  # three tokens
    # whether a matrix that is exactly singular can be factorized is left to round-off
    hessian = x.T @ x - 1e-6 * np.eye(64)
    found = gptq(heavy_tailed(4, 64, 6), hessian, bits=4, group_size=64, damping=damping)
    assert np.isfinite(found.values()).all()


@pytest.mark.parametrize("number", [-1.0, np.nan, -np.inf])
def test_a_hessian_that_no_damping_mends_is_refused(number: float) -> None:
    with pytest.raises(ConfigError, match="the calibration text is damaged"):
        factorize(np.diag([1e-3, 1e-3, number]), act_order=False, damping=0.0)


@pytest.mark.parametrize("damping", [-0.01, np.nan, np.inf])
def test_a_damping_that_is_no_share_of_the_diagonal_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match=r"damping is .*; it must be from 0 to 10"):
        factorize(np.eye(3), act_order=False, damping=damping)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [(5, 32, "bits is 5; it must be 2, 3, 4 or 8"), (4, 48, "group_size is 48; it must divide")],
)
def test_what_cannot_be_stored_is_refused(bits: int, group_size: int, message: str) -> None:
    hessian, _ = correlated(64, 7)
    with pytest.raises(ConfigError, match=message):
        gptq(heavy_tailed(4, 64, 7), hessian, bits=bits, group_size=group_size)
