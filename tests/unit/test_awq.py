"""AWQ against its paper's definitions, in float64 over the tokens themselves."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from pellucid.quant import awq
from pellucid.quant.awq import InputStatistics, clip_groups, search_scales
from pellucid.quant.gptq import round_to_nearest
from pellucid.quant.migration import Migration

Floats = NDArray[np.float32]
SIZE = 32


def tokens(n: int, seed: int, outliers: int = 3, count: int = 256) -> Floats:
    """Activations, some of whose channels are much larger."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, n)).astype(np.float32)
    x[:, rng.permutation(n)[:outliers]] *= 40
    return x


def weights(rows: int, n: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_t(5, (rows, n)).astype(np.float32)


def statistics(x: Floats) -> InputStatistics:
    exact = x.astype(np.float64)
    return InputStatistics(exact.T @ exact / len(x), np.abs(x).mean(axis=0))


def norm_migration(n: int) -> Migration:
    return Migration("g", ("norm",), ("w",), np.arange(n))


def rounded(weight: Floats) -> Floats:
    return round_to_nearest(weight, bits=4, group_size=SIZE, symmetric=False).values()


def loss(x: Floats, found: Floats, weight: Floats) -> float:
    """The mean over tokens of the squared error of the outputs."""
    error = x.astype(np.float64) @ (found.astype(np.float64) - weight).T
    return float((error**2).sum() / len(x))


def scaled_loss(x: Floats, weight: Floats, scales: Floats) -> float:
    return loss(x, rounded(weight * scales) / scales, weight)


def test_the_search_finds_the_best_of_all_exponents() -> None:
    """Equation 5 for each a, written down again, and equation 4 over the tokens."""
    n = 96
    for seed in range(3):
        x, weight = tokens(n, seed), weights(24, n, seed + 9)
        groups = np.abs(weight).reshape(24, -1, SIZE)
        sizes = (groups / groups.max(axis=2, keepdims=True)).reshape(24, n).mean(axis=0)
        candidates = [np.ones(n, np.float32)]
        for step in range(21):
            a = step / 20
            s = np.abs(x).mean(axis=0) ** a / sizes ** (1 - a)
            candidates.append((s / np.sqrt(s.max() * s.min())).astype(np.float32))
        best = min(scaled_loss(x, weight, s) for s in candidates)
        found = search_scales(weight, statistics(x), norm_migration(n), SIZE)
        assert scaled_loss(x, weight, found) == pytest.approx(best, rel=0.02)


def test_large_channels_are_helped() -> None:
    n = 128
    x, weight = tokens(n, 1), weights(64, n, 2)
    large = np.abs(x).mean(axis=0) > 10
    assert large.sum() == 3
    scales = search_scales(weight, statistics(x), norm_migration(n), SIZE)
    assert scales[large].min() > 2 * scales[~large].max()
    without, with_scales = (scaled_loss(x, weight, s) for s in (np.ones_like(scales), scales))
    assert with_scales < 0.35 * without
    # and on tokens that the search did not see, whose large channels are the same
    other = np.random.default_rng(7).normal(size=(256, n)).astype(np.float32)
    other *= np.where(large, np.float32(40), np.float32(1))
    assert scaled_loss(other, weight, scales) < 0.35 * loss(other, rounded(weight), weight)


@pytest.mark.parametrize("shift", [1, 17])
def test_activations_of_other_channels_are_of_no_help(shift: int) -> None:
    """The help above comes from the right scales on the right channels."""
    n = 128
    x, weight = tokens(n, 1), weights(64, n, 2)
    found = search_scales(weight, statistics(np.roll(x, shift, axis=1)), norm_migration(n), SIZE)
    assert scaled_loss(x, weight, found) > 0.95 * scaled_loss(x, weight, np.ones_like(found))


def test_channels_with_few_large_weights_are_scaled_down() -> None:
    """The mean of a channel's sizes does not show them, but they set the steps of their groups."""
    n = 128
    x, weight = tokens(n, 4, outliers=0), weights(64, n, 5)
    heavy = np.arange(n) % 4 == 1
    weight[::16, heavy] *= 8
    scales = search_scales(weight, statistics(x), norm_migration(n), SIZE)
    assert scales[heavy].mean() < 0.8 * scales[~heavy].mean()
    assert scaled_loss(x, weight, scales) < 0.9 * loss(x, rounded(weight), weight)


def test_scales_never_make_the_calibration_text_worse() -> None:
    for seed in range(6):
        x, weight = tokens(64, seed, outliers=0, count=80), weights(8, 64, seed)
        found = search_scales(weight, statistics(x), norm_migration(64), SIZE)
        assert scaled_loss(x, weight, found) <= loss(x, rounded(weight), weight) * 1.0001


def test_dead_channels_keep_their_weights() -> None:
    """Other text may use a channel that this one does not."""
    x, weight = tokens(64, 3), weights(16, 64, 4)
    x[:, [5, 40]] = 0
    found = search_scales(weight, statistics(x), norm_migration(64), SIZE)
    assert (found[[5, 40]] == 1).all() and np.isfinite(found).all() and (found > 0).all()
    nothing = search_scales(weight, statistics(0 * x), norm_migration(64), SIZE)
    assert (nothing == 1).all()


def test_query_heads_that_share_values_share_scales() -> None:
    rows = np.repeat(np.arange(32).reshape(2, 16), 2, axis=0).reshape(-1)  # 2 heads, 2 copies
    x, weight = tokens(64, 5), weights(16, 64, 6)
    migration = Migration("g", ("v",), ("o",), rows)
    found = search_scales(weight, statistics(x), migration, SIZE)
    assert found.shape == (32,)
    assert scaled_loss(x, weight, found[rows]) < 0.9 * loss(x, rounded(weight), weight)


BOUNDS = [1 - step / 20 for step in range(10)]


def clipped(values: Floats, part: float) -> Floats:
    bound = np.abs(values).max(axis=-1, keepdims=True) * np.float32(part)
    return np.clip(values, -bound, bound)


def test_the_last_group_is_clipped_to_its_best_bound_beside_the_others() -> None:
    x, weight = tokens(64, 8) + 1, weights(20, 64, 9)
    found = clip_groups(weight, statistics(x).hessian, SIZE)
    for row in range(20):
        span, own = slice(SIZE, 64), weight[row : row + 1]

        def lost(last: Floats, row: int = row, own: Floats = own) -> float:
            return loss(x, rounded(np.concatenate([found[row : row + 1, :SIZE], last], 1)), own)

        best = min(lost(clipped(own[:, span], part)) for part in BOUNDS)
        assert lost(found[row : row + 1, span]) == pytest.approx(best, rel=1e-3)
    assert (np.abs(found).max(axis=1) < np.abs(weight).max(axis=1)).sum() > 3  # tails are heavy


def test_groups_that_are_clipped_beside_each_other_lose_less_than_alone() -> None:
    """Here and on tokens that were not seen: where all channels are large in the same tokens,
    weights that are all too small add up.
    """
    rng = np.random.default_rng(3)
    weight = weights(40, 256, 1)
    seen, other = (
        (rng.normal(size=(600, 256)) + rng.normal(size=(600, 1))).astype(np.float32)
        for _ in range(2)
    )
    together = clip_groups(weight, statistics(seen).hessian, SIZE)
    alone = weight.copy()
    for start in range(0, 256, SIZE):
        span = slice(start, start + SIZE)
        alone[:, span] = clip_groups(weight[:, span], statistics(seen[:, span]).hessian, SIZE)
    for x, most in ((seen, 0.8), (other, 0.85)):
        assert loss(x, rounded(together), weight) < most * loss(x, rounded(alone), weight)
        assert loss(x, rounded(together), weight) < most * loss(x, rounded(weight), weight)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([32, 64]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
)
def test_any_shape_and_size(rows: int, groups: int, size: int, seed: int, unit: float) -> None:
    n = groups * size
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(7, n)) * (rng.random(n) > 0.3)).astype(np.float32)
    weight = (rng.normal(size=(rows, n)) * unit).astype(np.float32)
    found = search_scales(weight, statistics(x), norm_migration(n), size)
    assert np.isfinite(found).all() and (found > 0).all()
    clipped = clip_groups(weight * found, statistics(x / found).hessian, size)
    assert (np.abs(clipped) <= np.abs(weight * found)).all()
    assert np.isfinite(awq._round(clipped, size).values()).all()
