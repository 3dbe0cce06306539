"""The noise is SplitMix64's, a function of (seed, position, token id) alone, and looks random along
each of the three.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pellucid.sampling import noise
from pellucid.sampling.noise import LARGEST_GUMBEL, SMALLEST_GUMBEL, noise_state

GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> Iterator[int]:
    """The generator as published, one number after another."""
    while True:
        state = (state + GAMMA) % 2**64
        x = state
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        yield x ^ (x >> 31)


def nth(state: int, n: int) -> int:
    """The n-th number of splitmix64(state), without the walk."""
    return next(splitmix64((state + n * GAMMA) % 2**64))


def states(seed: int, position: int) -> NDArray[np.uint64]:
    return np.array([noise_state(seed, position)], np.uint64)


def gumbel(seed: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    return noise.gumbel(states(seed, position), token_ids)


def random_bits(seed: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    return noise.random_bits(states(seed, position), token_ids)


def uniform(seed: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.exp(-np.exp(-gumbel(seed, position, token_ids)))


def assert_even(counts: NDArray[np.int64]) -> None:
    """Chi-square of counts against an even spread, within five standard deviations of its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert expected >= 20
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom), (chi_square, freedom)


def assert_independent(a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
    """Pairs of uniforms fill a 32 × 32 chessboard evenly."""
    counts = np.bincount((a * 32).astype(np.int64) * 32 + (b * 32).astype(np.int64), minlength=1024)
    assert_even(counts)


def test_the_reference_generator_gives_the_published_numbers() -> None:
    numbers = splitmix64(1234567)
    assert [next(numbers) for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(deadline=None)
@given(
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 2**24), max_size=5),
)
def test_bits_are_two_levels_of_splitmix64(seed: int, position: int, token_ids: list[int]) -> None:
    state = nth(nth(seed % 2**64, 0), position)
    bits = random_bits(seed, position, np.array(token_ids, dtype=np.int64))
    assert bits.tolist() == [nth(state, t) for t in token_ids]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(0, 2**24))
def test_gumbel_is_the_definition(seed: int, position: int, token_id: int) -> None:
    """The first of a group rings after E/64, and the others wait for an E of their own."""

    def exponential(bits: int) -> float:
        return -math.log(((bits >> 12) + 0.5) / 2**52)

    slab, row, column = token_id // 2**15, token_id // 2**9 % 64, token_id % 2**9
    of_token, of_group = random_bits(
        seed, position, np.array([token_id, 2**32 + slab * 512 + column])
    ).tolist()
    wait = exponential(of_group) / 64 + (0.0 if of_group % 64 == row else exponential(of_token))
    assert gumbel(seed, position, np.array([token_id]))[0] == pytest.approx(
        -math.log(wait), rel=1e-12, abs=1e-12
    )


@pytest.mark.parametrize("vocab_size", [1, 512, 513, 32_768, 70_000])
def test_leaders_have_the_largest_noise_of_their_groups(vocab_size: int) -> None:
    keys = np.concatenate([states(s, 9) for s in range(3)])
    largest, leader = noise.leaders(keys, vocab_size)
    groups = np.arange(leader.shape[1])
    token_ids = noise.members(groups)  # [G, 64]
    assert (
        np.array_equal(np.sort(token_ids.ravel()), np.arange(token_ids.size))
        and vocab_size <= token_ids.size < vocab_size + 32_768
    )
    for key, peak, who in zip(keys, largest, leader, strict=True):
        every = noise.gumbel(np.array([key]), token_ids.ravel()).reshape(token_ids.shape)
        assert np.array_equal(every.max(axis=1), peak)
        assert np.array_equal(token_ids[groups, every.argmax(axis=1)], who)
    logits = np.random.default_rng(0).standard_normal(vocab_size).astype(np.float32)
    padded = np.append(logits, np.full(token_ids.size - vocab_size, -np.inf, np.float32))
    assert np.array_equal(noise.group_maxima(logits), padded[token_ids].max(axis=1))


def test_members_of_a_group_are_independent_and_lead_equally_often() -> None:
    members = noise.members(np.array([5]))[0]
    # [n, 64], standard exponentials
    waits = np.exp(-np.array([gumbel(seed, 3, members) for seed in range(6000)]))
    assert_even(np.bincount(waits.argmin(axis=1), minlength=64))
    u = np.exp(-waits)
    for column in (1, 17, 63):
        counts = np.bincount(
            (u[:, 0] * 16).astype(np.int64) * 16 + (u[:, column] * 16).astype(np.int64),
            minlength=256,
        )
        assert_even(counts)
    assert_even(np.bincount((u * 256).astype(np.int64).ravel(), minlength=256))


def test_noise_of_a_token_is_the_same_whoever_else_is_asked_about() -> None:
    every = gumbel(7, 11, np.arange(50_000))
    some = np.random.default_rng(0).permutation(50_000)[:333]
    assert np.array_equal(gumbel(7, 11, some), every[some])
    assert np.array_equal(gumbel(7, 11, some[:1]), every[some[:1]])


def test_the_bounds_enclose_what_gumbel_can_give() -> None:
    longest, shortest = -math.log(2.0**-53), -math.log(1 - 2.0**-53)
    assert SMALLEST_GUMBEL <= -math.log(longest / 64 + longest) < SMALLEST_GUMBEL + 0.01
    assert LARGEST_GUMBEL - 0.01 < -math.log(shortest / 64) <= LARGEST_GUMBEL


def test_token_ids_are_not_changed() -> None:
    token_ids = np.arange(100)
    token_ids.flags.writeable = False
    gumbel(0, 0, token_ids)


def test_noise_has_the_moments_of_gumbel() -> None:
    g = gumbel(3, 5, np.arange(200_000))
    assert abs(g.mean() - np.euler_gamma) < 5 * math.pi / math.sqrt(6 * g.size)
    # a Gumbel's kurtosis is 5.4
    assert abs(g.var() - math.pi**2 / 6) < 5 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / g.size)


@pytest.mark.slow
def test_noise_is_uniform_along_tokens_positions_and_seeds() -> None:
    n = 21_000
    token = np.zeros(1, dtype=np.int64)
    along = {
        "tokens": uniform(0, 0, np.arange(n)),
        "positions": np.concatenate([uniform(0, p, token) for p in range(n)]),
        "seeds": np.concatenate([uniform(s, 0, token) for s in range(n)]),
        "high seeds": np.concatenate([uniform(s << 44, 0, token) for s in range(n)]),
    }
    for values in along.values():
        assert_even(np.bincount((values * 256).astype(np.int64), minlength=256))
        assert_independent(values[:-1], values[1:])  # neighbours along the axis


@pytest.mark.parametrize(
    ("seed", "position", "shift"),
    [
        (1, 0, 0),
        (0, 1, 0),
        (1, -1, 0),
        (0, 1, -1),
        (1, 0, 1),
        (1 << 32, 0, 0),
        (GAMMA, 0, 0),
        (GAMMA, -1, 0),
        (GAMMA, 0, -1),
    ],
)
def test_neighbouring_keys_have_unrelated_noise(seed: int, position: int, shift: int) -> None:
    tokens = np.arange(1, 40_001)
    assert_independent(
        uniform(1000, 50, tokens), uniform(1000 + seed, 50 + position, tokens + shift)
    )


def test_each_bit_of_the_key_turns_over_half_of_the_bits() -> None:
    tokens = np.arange(500)
    base = random_bits(12345, 678, tokens)
    for changed in [random_bits(12345 ^ (1 << b), 678, tokens) for b in range(64)] + [
        random_bits(12345, 678 ^ (1 << b), tokens) for b in range(30)
    ]:
        turned = np.unpackbits((base ^ changed).view(np.uint8)).mean()
        assert abs(turned - 0.5) < 5 * 0.5 / math.sqrt(tokens.size * 64)
