"""FlashAttention in tiles is attention: within twice the error of the naive float32 evaluation,
however it is tiled, split and merged.
"""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.backends.reference import ops
from pellucid.backends.reference.attention import Array, attend
from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.backends.reference.flash_attention import flash_attention, merge_states
from pellucid.kv_spec import KVSpec
from pellucid.ops.budget import check_dense
from pellucid.ops.case_inputs import build_attention_batch
from pellucid.ops.protocol import KVLayer

from .oracle import attention


@dataclass(frozen=True)
class Problem:
    """One request's attention, and its masks."""

    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    magnitude: float
    seed: int

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def arrays(self) -> tuple[Array, Array, Array]:
        rng = np.random.default_rng(self.seed)
        shapes = ((self.tokens, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
        q, k, v = (rng.normal(size=(*shape, self.head_dim)).astype(np.float32) for shape in shapes)
        return q * np.float32(self.magnitude), k, v


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    keys = draw(st.integers(1, 40))
    kv_heads = draw(st.integers(1, 3))
    return Problem(
        tokens=draw(st.integers(1, keys)),
        keys=keys,
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 5, 16])),
        window=draw(st.none() | st.integers(1, 45)),
        softcap=draw(st.none() | st.sampled_from([2.0, 50.0])),
        magnitude=draw(st.sampled_from([0.0, 1.0, 40.0])),
        seed=draw(st.integers(0, 1 << 16)),
    )


def assert_is_attention(p: Problem, out: Array, lse: Array, *, merges: int = 1) -> None:
    """Within the budget, once for each time that partial results were joined."""
    q, k, v = p.arrays()
    options: dict[str, Any] = {"scale": p.scale, "window": p.window, "softcap": p.softcap}
    exact_out, exact_lse = attention(
        q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), **options
    )
    naive_out, naive_lse = attention(q, k, v, **options)
    for actual, exact, naive in ((out, exact_out, naive_out), (lse, exact_lse, naive_lse)):
        verdict = check_dense(actual, exact, naive, condition=max(1.0, p.magnitude))
        assert verdict.error <= merges * verdict.limit, str(verdict)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 45), st.integers(1, 45))
def test_any_tiling_is_within_the_budget(p: Problem, tile_q: int, tile_k: int) -> None:
    q, k, v = p.arrays()
    out, lse = flash_attention(
        q, k, v, scale=p.scale, window=p.window, softcap=p.softcap, tile_q=tile_q, tile_k=tile_k
    )
    assert_is_attention(p, out, lse)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.lists(st.integers(0, 40), max_size=4), st.randoms(use_true_random=False))
def test_keys_split_anywhere_and_merged_in_any_order_are_the_whole(
    p: Problem, cuts: list[int], order: random.Random
) -> None:
    q, k, v = p.arrays()
    borders = sorted({0, p.keys, *(min(c, p.keys) for c in cuts)})
    q_start = p.keys - p.tokens
    parts = [
        flash_attention(
            q,
            k[a:b],
            v[a:b],
            scale=p.scale,
            q_start=q_start - a,
            window=p.window,
            softcap=p.softcap,
            tile_k=7,
        )
        for a, b in itertools.pairwise(borders)
    ]
    order.shuffle(parts)
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_states(out, lse, *part)
    assert_is_attention(p, out, lse, merges=len(parts))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 6])
@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_every_small_tiling_sees_exactly_what_the_mask_shows(
    tokens: int, window: int | None
) -> None:
    q, k, v = Problem(tokens, 6, 1, 1, 2, window, None, 1.0, seed=5).arrays()
    expected, _ = attention(
        q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), scale=1.0, window=window
    )
    np.testing.assert_allclose(
        attend(q, k, v, scale=1.0, window=window), expected, rtol=0, atol=1e-6
    )
    for tile_q, tile_k in itertools.product((1, 2, 3), (1, 2, 3, 4)):
        out, _ = flash_attention(q, k, v, scale=1.0, window=window, tile_q=tile_q, tile_k=tile_k)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problems())
def test_exact_attention_is_within_the_budget(p: Problem) -> None:
    q, k, v = p.arrays()
    _, lse = flash_attention(q, k, v, scale=p.scale, window=p.window, softcap=p.softcap)
    assert_is_attention(p, attend(q, k, v, scale=p.scale, window=p.window, softcap=p.softcap), lse)


def random_states(seed: int, tokens: int = 6, heads: int = 3, dim: int = 8) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    out = rng.normal(size=(tokens, heads, dim)).astype(np.float32)
    lse = (rng.normal(size=(tokens, heads)) * 30).astype(np.float32)
    lse[0] = -np.inf  # a query that saw nothing
    out[0] = 0
    return out, lse


def test_merge_is_associative_and_commutative_to_rounding() -> None:
    a, b, c = (random_states(seed) for seed in range(3))
    left = merge_states(*merge_states(*a, *b), *c)
    right = merge_states(*a, *merge_states(*b, *c))
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    for x, y in zip(merge_states(*a, *b), merge_states(*b, *a), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_part_that_saw_nothing_changes_nothing() -> None:
    out, lse = random_states(1)
    nothing = np.zeros_like(out), np.full_like(lse, -np.inf)
    for merged in (merge_states(out, lse, *nothing), merge_states(*nothing, out, lse)):
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)


def test_queries_that_see_no_key_give_zero_and_minus_infinity() -> None:
    q, k, v = (
        np.ones((3, 2, 4), np.float32),
        np.ones((5, 1, 4), np.float32),
        np.ones((5, 1, 4), np.float32),
    )
    out, lse = flash_attention(q, k, v, scale=0.5, q_start=-2)
    assert np.array_equal(out[:, 0, 0], [0, 0, 1])
    assert np.array_equal(np.isneginf(lse[:, 0]), [True, True, False])
    # the keys are all too long ago
    out, lse = flash_attention(q, k, v, scale=0.5, q_start=6, window=2)
    assert not out.any() and np.isneginf(lse).all()


def test_lse_of_equal_scores_is_score_plus_log_of_their_number() -> None:
    q, k, v = (
        np.ones((1, 1, 4), np.float32),
        np.ones((10, 1, 4), np.float32),
        np.ones((10, 1, 4), np.float32),
    )
    _, lse = flash_attention(q, k, v, scale=0.25, tile_k=3)
    assert lse[0, 0] == pytest.approx(1 + np.log(10))


def test_the_op_tiles_a_long_prompt_and_its_result_is_exact_attention() -> None:
    tokens, heads, dim, block_size = 1100, 4, 8, 16
    assert heads * tokens * tokens * 4 > ops.MAX_SCORE_BYTES
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(tokens, n, dim)).astype(np.float32) for n in (heads, 1, 1))
    kv = KVLayer(ReferenceBackend().new_kv_store(70, block_size, KVSpec(1, dim, dim, "f32", "f32")))
    tables = rng.permutation(70).astype(np.int32)[None, :69]
    metadata = build_attention_batch([tokens], [tokens], tables, block_size).attention
    ops.kv_write(kv, k, v, metadata.slot_mapping)
    tiled = ops.attention(q, kv, metadata, scale=0.3).reshape(q.shape)
    # not attend's bits: the tiles were used
    assert np.array_equal(tiled, flash_attention(q, k, v, scale=0.3)[0])
    np.testing.assert_allclose(tiled, attend(q, k, v, scale=0.3), rtol=0, atol=2e-6)
