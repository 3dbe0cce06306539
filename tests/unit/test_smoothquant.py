"""SmoothQuant against its paper's definitions, over activations with large channels and tokens."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from pellucid.quant import smoothquant
from pellucid.quant.migration import Migration
from pellucid.quant.smoothquant import (
    ALPHAS,
    Activation,
    choose_scales,
    quantize_rows,
    quantize_tokens,
    smoothing_scales,
)

Floats = NDArray[np.float32]


def activation(n: int, seed: int, factor: float = 60, count: int = 128) -> Activation:
    """Activations, three of whose channels are `factor` times larger."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, n)).astype(np.float32)
    x[:, rng.permutation(n)[:3]] *= np.float32(factor)
    return Activation(np.abs(x).max(axis=0), [x[:50], x[50:]])


def weights(rows: int, n: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(rows, n)).astype(np.float32)


def norm_migration(n: int) -> Migration:
    return Migration("g", ("norm",), ("w",), np.arange(n))


def loss(x: Floats, weight: Floats, scales: Floats) -> float:
    """The error of each token's output, relative to the output, in int32 arithmetic."""
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    token = np.abs(x / scales).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(x / scales / np.where(token > 0, token, 1)).astype(np.int64)
    rows = quantize_rows(weight * scales)
    products = codes @ (rows.codes.astype(np.int64) - 128).T
    found = products * token.astype(np.float64) * rows.scales.T
    live = (exact**2).sum(axis=1) > 0
    errors = ((found - exact)[live] ** 2).sum(axis=1) / (exact[live] ** 2).sum(axis=1)
    return float(errors.sum() / len(x))


def test_scales_are_those_of_the_paper() -> None:
    weight = weights(5, 8, 0)
    largest = np.linspace(0.5, 90, 8).astype(np.float32)
    for alpha in ALPHAS:
        found = smoothing_scales(largest, weight, norm_migration(8), alpha)
        expected = largest**alpha / np.abs(weight).max(axis=0) ** (1 - alpha)
        np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)
        assert np.log(found).mean() == pytest.approx(0, abs=1e-5)
    # at 0.5 the largest activation and the largest weight of each channel become equal
    half = smoothing_scales(largest, weight, norm_migration(8), 0.5)
    ratio = largest / half / np.abs(weight * half).max(axis=0)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_the_choice_is_the_best_alpha() -> None:
    for seed in range(4):
        inputs, weight = activation(64, seed), weights(48, 64, seed)
        x = np.concatenate(inputs.sample)
        migration = norm_migration(64)
        losses: dict[float | None, float] = {None: loss(x, weight, np.ones(64, np.float32))}
        for alpha in ALPHAS:
            scales = smoothing_scales(inputs.largest, weight, migration, alpha)
            losses[alpha] = loss(x, weight, scales)
        chosen, scales = choose_scales(weight, inputs, migration, ALPHAS)
        assert losses[chosen] == pytest.approx(min(losses.values()), rel=1e-3)
        assert loss(x, weight, scales) == pytest.approx(losses[chosen], rel=1e-3)


def test_large_channels_are_helped() -> None:
    inputs, weight = activation(128, 1), weights(96, 128, 2)
    x = np.concatenate(inputs.sample)
    alpha, scales = choose_scales(weight, inputs, norm_migration(128), ALPHAS)
    without = loss(x, weight, np.ones(128, np.float32))
    assert alpha is not None and loss(x, weight, scales) < 0.2 * without


def test_no_scales_are_kept_where_scales_do_not_help() -> None:
    """Planted fault: an exponent that makes large channels of even ones."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(128, 64)).astype(np.float32)
    inputs = Activation(np.abs(x).max(axis=0), [x])
    weight = weights(32, 64, 3)
    worse = smoothing_scales(inputs.largest, weight, norm_migration(64), 4.0)
    without = np.ones(64, np.float32)
    assert loss(x, weight, worse) > loss(x, weight, without)
    alpha, scales = choose_scales(weight, inputs, norm_migration(64), (4.0,))
    assert alpha is None and (scales == 1).all()


def test_the_help_is_in_the_right_channels() -> None:
    """Planted fault: the scales of neighbouring channels."""
    inputs, weight = activation(128, 1), weights(96, 128, 2)
    x = np.concatenate(inputs.sample)
    _, scales = choose_scales(weight, inputs, norm_migration(128), ALPHAS)
    assert loss(x, weight, np.roll(scales, 1)) > 5 * loss(x, weight, scales)


def test_a_huge_first_token_does_not_decide() -> None:
    """Its error is relative to its own output, so it counts as one token of many."""
    inputs, weight = activation(64, 4), weights(32, 64, 5)
    alpha, _ = choose_scales(weight, inputs, norm_migration(64), ALPHAS)
    x = np.concatenate(inputs.sample)
    first = np.float32(1e4) * x[:1]
    changed = Activation(inputs.largest, [first, x])
    assert choose_scales(weight, changed, norm_migration(64), ALPHAS)[0] == alpha


def test_dead_channels_keep_their_weights() -> None:
    inputs, weight = activation(32, 6), weights(8, 32, 7)
    for part in (inputs.largest, *inputs.sample):
        part[..., [3, 9]] = 0
    weight[:, 20] = 0
    _, scales = choose_scales(weight, inputs, norm_migration(32), (0.5,))
    found = smoothing_scales(inputs.largest, weight, norm_migration(32), 0.5)
    assert (found[[3, 9, 20]] == 1).all() and (scales > 0).all()


def test_query_heads_that_share_values_share_scales() -> None:
    rows = np.repeat(np.arange(16).reshape(2, 8), 2, axis=0).reshape(-1)
    inputs, weight = activation(32, 8), weights(16, 32, 9)
    x = np.concatenate(inputs.sample)
    _, scales = choose_scales(weight, inputs, Migration("g", ("v",), ("o",), rows), ALPHAS)
    assert scales.shape == (16,)
    assert loss(x, weight, scales[rows]) < loss(x, weight, np.ones(32, np.float32))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
)
def test_any_shape_and_size(rows: int, n: int, seed: int, w_unit: float, x_unit: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(6, n)) * (rng.random(n) > 0.3) * x_unit).astype(np.float32)
    weight = (rng.normal(size=(rows, n)) * w_unit).astype(np.float32)
    inputs = Activation(np.abs(x).max(axis=0), [x])
    _, scales = choose_scales(weight, inputs, norm_migration(n), ALPHAS)
    assert scales.shape == (n,) and np.isfinite(scales).all() and (scales > 0).all()
    assert np.isfinite(quantize_rows(weight * scales).values()).all()
    rounded = quantize_tokens(x / scales)
    largest = np.abs(x / scales).max(axis=1, keepdims=True, initial=0)
    assert (np.abs(rounded - x / scales) <= 0.5001 * largest / 127).all()


def test_tiny_and_huge_activations_leave_the_size_of_weights() -> None:
    """So their scales stay numbers that float16 holds well."""
    inputs, weight = activation(32, 10), weights(8, 32, 11)
    for unit in (1e-12, 1e12):
        scales = smoothing_scales(
            inputs.largest * np.float32(unit), weight, norm_migration(32), 0.5
        )
        assert 0.1 < np.abs(weight * scales).max() < 100


def test_codes_are_symmetric() -> None:
    weight = weights(4, 16, 1)
    found, mirrored = quantize_rows(weight), quantize_rows(-weight)
    np.testing.assert_array_equal(found.values(), -mirrored.values())
    assert found.codes.min() >= 1 and smoothquant.quantize_rows(0 * weight).values().any() == 0
