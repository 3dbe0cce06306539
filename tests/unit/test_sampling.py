"""`sample` against a slow definition of one row, in plain Python; and rows do not touch each
other.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pellucid.errors import RequestError
from pellucid.sampling import SamplingRow, sample
from pellucid.sampling.noise import gumbel, noise_state
from pellucid.sampling.processors import keep_top_p
from pellucid.sampling.sampler import survivors
from pellucid.sampling_params import SamplingParams

# how far rounding may move the place where a sum of probabilities reaches its share: that of top_p
# is good to seven digits
EDGES = [sign * size for size in (1e-11, 1e-8, 3e-8, 1e-7, 3e-7) for sign in (-1, 1)]
# each filter rounds for itself
EDGES_OF_ALL = list(itertools.product(EDGES, EDGES, (-1e-11, 1e-11)))
PROMPT = (3, 3, 9, 1, 4)


def slow_adjust(logits: list[float], row: SamplingRow) -> list[float]:
    p, x = row.params, list(logits)
    history = [*row.prompt_token_ids, *row.output_token_ids]
    for token_id, bias in (p.logit_bias or {}).items():
        x[token_id] = float(np.float32(x[token_id] + bias))
    for t in range(len(x)):
        if p.allowed_token_ids is not None and t not in p.allowed_token_ids:
            x[t] = -math.inf
        ends = t in (p.stop_token_ids or ()) or (t in row.eos_token_ids and not p.ignore_eos)
        if ends and len(row.output_token_ids) < p.min_tokens:
            x[t] = -math.inf
        for banned in row.banned_sequences:
            if [*history, t][-len(banned) :] == list(banned):
                x[t] = -math.inf
        if t in history:
            x[t] = float(
                np.float32(x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty)
            )
        if count := list(row.output_token_ids).count(t):
            x[t] = float(np.float32(x[t] - (p.frequency_penalty * count + p.presence_penalty)))
    return x


def slow_first(
    tokens: list[int], rank: dict[int, float], z: dict[int, float], share: float
) -> list[int]:
    """The fewest tokens of lowest rank that hold `share` of the probability."""
    total = math.fsum(math.exp(z[t]) for t in tokens)
    kept: list[int] = []
    held = 0.0
    for t in sorted(tokens, key=lambda t: (rank[t], t)):
        if held >= share * total:
            break
        kept.append(t)
        held += math.exp(z[t])
    return kept


def slow_survivors(
    logits: list[float], p: SamplingParams, edges: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> list[int]:
    """`edges`: what is added to the shares of typical_p and top_p and to the logarithm of min_p."""
    largest = max(logits)
    tokens = [t for t, x in enumerate(logits) if x > -math.inf]
    z = {t: (logits[t] - largest) / p.temperature for t in tokens}
    if p.top_k > 0:
        tokens = sorted(tokens, key=lambda t: (-logits[t], t))[: p.top_k]
    if p.typical_p < 1:
        total = math.fsum(math.exp(z[t]) for t in tokens)
        # surprise is ln(total) - z and entropy ln(total) - mean
        mean = math.fsum(math.exp(z[t]) * z[t] for t in tokens) / total
        tokens = slow_first(
            tokens, {t: abs(z[t] - mean) for t in tokens}, z, p.typical_p + edges[0]
        )
    if p.top_p < 1:
        tokens = slow_first(tokens, {t: -z[t] for t in tokens}, z, p.top_p + edges[1])
    if p.min_p > 0:
        likeliest = max(z[t] for t in tokens)
        tokens = [t for t in tokens if z[t] - likeliest >= math.log(p.min_p) + edges[2]]
    return sorted(t for t in tokens if z[t] > -40)  # what is less likely is never drawn


def build_logits(
    seed: int, vocab_size: int, scale: float, grid: float, share_banned: float
) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(vocab_size) * scale
    if grid:
        logits = np.round(logits / grid) * grid  # ties
    logits[rng.random(vocab_size) < share_banned] = -np.inf
    logits[rng.integers(vocab_size)] = 0.5 * scale  # at least one is left
    row = logits.astype(np.float32)
    row.flags.writeable = False
    return row


def logits_rows(max_size: int) -> st.SearchStrategy[NDArray[np.float32]]:
    return st.builds(
        build_logits,
        seed=st.integers(0, 2**32),
        vocab_size=st.integers(1, max_size),
        scale=st.sampled_from([0.0, 0.01, 1.0, 3.0, 10.0, 100.0]),
        grid=st.sampled_from([0.0, 0.5]),
        share_banned=st.sampled_from([0.0, 0.1, 0.9]),
    )


shares = st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.5, 0.1, 1e-6])
filters: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.7, 2.0, 0.05, 100.0, 1e-300]),
        "top_k": st.sampled_from([0, -1, 1, 2, 7, 40, 10**9]),
        "typical_p": shares,
        "top_p": shares,
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    }
)


@settings(deadline=None)
@given(logits_rows(700), filters)
def test_survivors_are_those_of_the_definition(
    logits: NDArray[np.float32], fields: dict[str, Any]
) -> None:
    params = SamplingParams(**fields)
    token_ids, z = survivors(logits, params, float(logits.max()))
    kept = [t for t, value in zip(token_ids.tolist(), z.tolist(), strict=True) if value > -40]
    assert any(kept == slow_survivors(logits.tolist(), params, edges) for edges in EDGES_OF_ALL)
    assert np.array_equal(
        z, (logits[token_ids].astype(np.float64) - float(logits.max())) / params.temperature
    )


def test_the_likelier_of_two_nearly_equal_tokens_is_the_more_typical() -> None:
    """By 3e-11 of a nat, and it holds more than half: it alone is kept."""
    logits = build_logits(637, 156, 0.01, 0.0, 0.9)
    params = SamplingParams(temperature=100.0, top_k=2, typical_p=0.5)
    assert survivors(logits, params, float(logits.max()))[0].tolist() == [logits.argmax()]


@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0, 6.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9},
        {"typical_p": 0.9},
        {"top_k": 300},
        {"top_k": 30},
        {"min_p": 0.01},
        {"typical_p": 0.2},
    ],
)
def test_survivors_of_a_large_vocabulary_are_those_of_the_definition(
    scale: float, fields: dict[str, Any]
) -> None:
    params = SamplingParams(**fields)
    logits = build_logits(1, 30_000, scale, 0.0, 0.0)
    kept = survivors(logits, params, float(logits.max()))[0].tolist()
    assert any(kept == slow_survivors(logits.tolist(), params, edges) for edges in EDGES_OF_ALL)


corrections: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "logit_bias": st.dictionaries(st.integers(0, 19), st.floats(-100, 100), max_size=4),
        "allowed_token_ids": st.lists(st.integers(0, 19), min_size=1),
        "stop_token_ids": st.lists(st.integers(0, 19), max_size=3),
        "min_tokens": st.integers(0, 6),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.5, -2.0]),
    },
)


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    corrections,
    st.lists(st.integers(0, 19), max_size=8),
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=30),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0.0, 0.8, 5.0]),
    st.booleans(),
)
def test_the_token_is_that_of_the_definition(
    logits_seed: int,
    fields: dict[str, Any],
    output: list[int],
    banned: list[list[int]],
    seed: int,
    temperature: float,
    as_array: bool,
) -> None:
    logits = build_logits(logits_seed, 20, 2.0, 0.25, 0.0)
    row = SamplingRow(
        params=SamplingParams(temperature=temperature, **fields),
        seed=seed,
        position=len(PROMPT) + len(output),
        prompt_token_ids=np.array(PROMPT, dtype=np.int32) if as_array else PROMPT,
        output_token_ids=output,
        banned_sequences=banned,
        eos_token_ids=frozenset({0, 5}),
    )
    adjusted = slow_adjust(logits.tolist(), row)
    (token,) = sample(logits[None], [row])
    if max(adjusted) == -math.inf:
        assert isinstance(token, RequestError)
    elif temperature == 0:
        assert token == adjusted.index(max(adjusted))
    else:
        noise = gumbel(
            np.array([noise_state(seed, row.position)], np.uint64), np.arange(20)
        ).tolist()
        score = [x / temperature + g for x, g in zip(adjusted, noise, strict=True)]
        assert isinstance(token, int) and score[token] > max(score) - 1e-9


@pytest.mark.parametrize("vocab_size", [700, 32_768, 70_001])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 10.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 30.0])
def test_the_draw_from_a_large_vocabulary_is_the_argmax_over_all_of_it(
    vocab_size: int, scale: float, temperature: float
) -> None:
    """Though nearly all of it is never asked: several rows at once, ties and bans among them."""
    params = SamplingParams(temperature=temperature)
    rows = [SamplingRow(params=params, seed=seed, position=seed % 7) for seed in range(20)]
    logits = np.stack(
        [build_logits(i, vocab_size, scale, 0.5 * (i % 2), 0.3 * (i % 3)) for i in range(len(rows))]
    )
    for token, row, x in zip(sample(logits, rows), rows, logits, strict=True):
        state = np.array([noise_state(row.seed, row.position)], np.uint64)
        score = (x.astype(np.float64) - float(x.max())) / temperature + gumbel(
            state, np.arange(vocab_size)
        )
        assert token == score.argmax()


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.95},
        {"typical_p": 0.9},
        {"top_k": 20_000},
        {"min_p": 1e-4},
        {"top_k": 12_000, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.5])
def test_the_draw_from_many_that_filters_leave_is_the_argmax_over_them(
    fields: dict[str, Any], scale: float
) -> None:
    params = SamplingParams(temperature=1.5, **fields)
    rows = [SamplingRow(params=params, seed=seed, position=seed % 7) for seed in range(8)]
    logits = np.stack(
        [build_logits(i, 40_000, scale, 0.5 * (i % 2), 0.3 * (i % 3)) for i in range(len(rows))]
    )
    for token, row, x in zip(sample(logits, rows), rows, logits, strict=True):
        state = np.array([noise_state(row.seed, row.position)], np.uint64)
        token_ids, z = survivors(x, params, float(x.max()))
        assert token_ids.size > 4096
        assert token == token_ids[(z + gumbel(state, token_ids)).argmax()]


def test_a_nucleus_is_found_among_ranks_of_any_spread() -> None:
    """Equal, all but equal, and far apart: many tokens that few parts of the range hold."""
    for spread in (0.0, 1e-300, 5e-324, 1e-15, 1e-6, 1.0, 700.0):
        rng = np.random.default_rng(5)
        z = -np.concatenate(
            [np.abs(rng.normal(0, 1, 9000)) ** 9 * spread, rng.integers(0, 3, 9000) * spread]
        )
        z[7] = 0.0
        order = np.argsort(-z, kind="stable")
        reached = np.cumsum(np.exp(z[order]))
        for mass in (0.1, 0.5001, 0.99999):
            kept = keep_top_p(z, mass * reached[-1])
            count = int(np.searchsorted(reached, mass * reached[-1])) + 1
            assert kept.tolist() == sorted(order[:count].tolist()), (spread, mass)


MIX: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95},
    {"top_p": 0.9},
    {"min_p": 0.05, "temperature": 1.5},
    {"typical_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"presence_penalty": 1.0, "frequency_penalty": 0.3},
    {"logit_bias": {5: 3.0}, "typical_p": 0.5, "top_p": 0.5, "min_p": 0.1},
    {"allowed_token_ids": [1, 2, 30, 400]},
    {"min_tokens": 10, "stop_token_ids": [7]},
]


def build_mix(vocab_size: int) -> tuple[NDArray[np.float32], list[SamplingRow]]:
    rng = np.random.default_rng(5)
    params = [SamplingParams(**fields) for fields in MIX] * 3
    logits = (rng.standard_normal((len(params), vocab_size)) * 3).astype(np.float32)
    rows = [
        SamplingRow(
            params=p,
            seed=i // 2,
            position=7 + i // 3,
            prompt_token_ids=PROMPT,
            output_token_ids=rng.integers(0, vocab_size, 6).tolist(),
            banned_sequences=[[4, 4], [11]],
            eos_token_ids=frozenset({2}),
        )
        for i, p in enumerate(params)
    ]
    return logits, rows


@pytest.mark.parametrize("vocab_size", [401, 40_000])
def test_a_mixed_batch_gives_each_row_the_token_it_gets_alone(vocab_size: int) -> None:
    logits, rows = build_mix(vocab_size)
    tokens = sample(logits, rows)
    assert all(isinstance(t, int) for t in tokens)
    assert len(set(map(str, tokens))) > 15
    assert tokens == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    order = np.random.default_rng(0).permutation(len(rows))
    assert sample(logits[order], [rows[i] for i in order]) == [tokens[i] for i in order]
    wider = np.zeros((len(rows), vocab_size + 3), dtype=np.float32)
    wider[:, :vocab_size] = logits
    assert sample(wider[:, :vocab_size], rows) == tokens  # a view, whose rows are not aligned


def test_logits_are_not_changed() -> None:
    logits, rows = build_mix(401)
    logits.flags.writeable = False
    before = logits.copy()
    sample(logits, rows)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("index", range(len(MIX)))
def test_a_poisoned_row_fails_alone(poison: float, index: int) -> None:
    logits, rows = build_mix(401)
    sound = sample(logits, rows)
    logits[index, 7] = poison  # a token that some rows ban
    tokens = sample(logits, rows)
    assert isinstance(tokens[index], RequestError)
    assert str(poison) in str(tokens[index])
    tokens[index] = sound[index]
    assert tokens == sound


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_token_left_fails_alone_and_says_why(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, allowed_token_ids=[2], min_tokens=3)
    row = SamplingRow(params=params, seed=0, position=0, eos_token_ids=frozenset({2}))
    free = SamplingRow(params=SamplingParams(temperature=0), seed=0, position=0)
    failed, token = sample(np.array([[0, 1, 2], [0, 5, 2]], dtype=np.float32), [row, free])
    assert isinstance(failed, RequestError) and "no token is left to draw" in str(failed)
    assert token == 1


def test_a_penalty_that_overflows_fails_its_row_without_a_warning() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1e-300)
    row = SamplingRow(params=params, seed=0, position=1, prompt_token_ids=[0])
    (token,) = sample(np.ones((1, 3), dtype=np.float32), [row])
    assert isinstance(token, RequestError) and "repetition_penalty" in str(token)


def test_greedy_takes_the_first_of_the_largest() -> None:
    row = SamplingRow(params=SamplingParams(temperature=0, top_k=1), seed=0, position=0)
    assert sample(np.array([[1, 3, 3, 2]], dtype=np.float32), [row]) == [1]


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}, {"min_p": 0.3}]
)
def test_extreme_logits_give_no_warning(fields: dict[str, Any]) -> None:
    for temperature in (5e-324, 1e-5, 1.0, 1e6):
        for values in (
            [3e38, -3e38, 0, -np.inf],
            [1e-45, 0, -1e-45, -np.inf],
            [-3e38, -3.1e38, -np.inf, -np.inf],
        ):
            row = SamplingRow(
                params=SamplingParams(temperature=temperature, **fields), seed=1, position=2
            )
            (token,) = sample(np.array([values], dtype=np.float32), [row])
            assert isinstance(token, int) and values[token] > -np.inf


def test_a_seed_gives_the_same_tokens_again_and_others_give_others() -> None:
    logits = np.zeros((40, 1000), dtype=np.float32)

    def draw(seed: int) -> list[int | RequestError]:
        return sample(
            logits, [SamplingRow(params=SamplingParams(), seed=seed, position=i) for i in range(40)]
        )

    assert draw(1) == draw(1)
    assert draw(1) == draw(1 - 2**64)  # seeds count modulo 2⁶⁴
    same = sum(a == b for a, b in zip(draw(1), draw(2), strict=True))
    assert same < 5


def chi_square(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 10),
        ({"temperature": 0.5}, 10),
        ({"temperature": 3.0, "top_k": 6}, 6),
        ({"top_p": 0.8}, 5),
        ({"min_p": 0.2}, 5),
        ({"logit_bias": {9: 3.0}, "top_k": 3}, 3),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(fields: dict[str, Any], kept: int) -> None:
    n = 12_000
    logits = np.array([2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.0, -0.5, -1.0, -1.2], dtype=np.float32)
    params = SamplingParams(**fields)
    rows = [SamplingRow(params=params, seed=i % 100, position=i // 100) for i in range(n)]
    counts = np.bincount(
        np.array(sample(np.broadcast_to(logits, (n, 10)), rows), dtype=np.int64), minlength=10
    )

    z = slow_adjust(logits.tolist(), rows[0])
    tokens = slow_survivors(z, params)
    assert len(tokens) == kept
    assert counts.sum() == counts[tokens].sum()

    def law(temperature: float) -> NDArray[np.float64]:
        weights = np.exp(np.array([z[t] for t in tokens]) / temperature)
        return np.asarray(weights / weights.sum())

    limit = kept - 1 + 5 * math.sqrt(2 * (kept - 1))
    assert chi_square(counts[tokens], law(params.temperature)) < limit
    # the test can tell a law that is a little off
    assert chi_square(counts[tokens], law(params.temperature * 1.25)) > limit


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_filters_do_not_change_which_of_the_kept_is_drawn(seed: int) -> None:
    """One noise for all: a filter that keeps the token that would have been drawn does not change
    the draw.
    """
    logits = build_logits(seed, 300, 2.0, 0.0, 0.0)[None]
    row = SamplingRow(params=SamplingParams(), seed=seed, position=3)
    (free,) = sample(logits, [row])
    for fields in ({"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"typical_p": 0.8}):
        params = SamplingParams(**fields)
        (token,) = sample(logits, [SamplingRow(params=params, seed=seed, position=3)])
        if free in survivors(logits[0], params, float(logits.max()))[0]:
            assert token == free
