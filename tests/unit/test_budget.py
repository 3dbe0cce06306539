"""The error budgets refuse what they should, and allow what they should."""

import numpy as np
from numpy.typing import NDArray

from pellucid.ops.budget import INT8_ACTIVATIONS_NMSE, check_dense, check_int8_activations, nmse

RNG = np.random.default_rng(0)
EXACT = RNG.normal(size=(5, 40))
NAIVE = EXACT.astype(np.float32)


def test_a_correctly_rounded_result_is_within_the_budget() -> None:
    assert check_dense(NAIVE, EXACT, NAIVE).ok


def test_three_times_the_naive_error_is_not() -> None:
    naive = (EXACT + 1e-4).astype(np.float32)
    assert check_dense((EXACT - 1.9e-4).astype(np.float32), EXACT, naive).ok
    assert not check_dense((EXACT + 3e-4).astype(np.float32), EXACT, naive).ok


def test_one_wrong_element_among_many_is_seen() -> None:
    wrong = NAIVE.copy()
    wrong[3, 7] += np.float32(1e-4)
    assert not check_dense(wrong, EXACT, NAIVE).ok


def test_nan_infinity_and_another_shape_are_never_within_a_budget() -> None:
    for bad in (np.nan, np.inf):
        wrong = NAIVE.copy()
        wrong[0, 0] = bad
        assert not check_dense(wrong, EXACT, NAIVE).ok
        assert not check_int8_activations(wrong, EXACT).ok
    assert not check_dense(NAIVE[:, :1], EXACT, NAIVE).ok
    assert not check_int8_activations(NAIVE[:1], EXACT).ok


def test_an_empty_result_is_right() -> None:
    empty = np.zeros((0, 4), np.float32)
    assert check_dense(empty, empty.astype(np.float64), empty).ok
    assert check_int8_activations(empty, empty.astype(np.float64)).ok


def test_nmse_is_the_share_of_power() -> None:
    assert (
        nmse(np.array([1.1, 1.0], np.float32), np.array([1.0, 1.0]))
        == np.float64(np.float32(1.1) - 1.0) ** 2 / 2
    )


def quantize(x: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    blocks = x.reshape(len(x), -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / levels
    rounded: NDArray[np.float64] = np.round(blocks / step) * step
    return rounded.reshape(x.shape)


def test_the_int8_limit_allows_8_bits_per_block_of_32_and_refuses_7() -> None:
    x, weight = RNG.normal(size=(16, 512)), RNG.normal(size=(64, 512))
    exact = x @ weight.T
    errors = {
        bits: nmse((quantize(x, 2 ** (bits - 1) - 1) @ weight.T).astype(np.float32), exact)
        for bits in (7, 8)
    }
    assert errors[8] < INT8_ACTIVATIONS_NMSE / 2
    assert errors[7] > INT8_ACTIVATIONS_NMSE
    assert check_int8_activations((quantize(x, 127) @ weight.T).astype(np.float32), exact).ok
