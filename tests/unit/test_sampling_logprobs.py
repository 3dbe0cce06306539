"""top_logprobs against a slow definition in exact sums."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import RequestError
from pellucid.outputs import Logprob
from pellucid.sampling import top_logprobs


def slow_logprobs(logits: list[float], chosen: int, k: int) -> dict[int, Logprob]:
    largest = max(logits)
    log_sum = largest + math.log(math.fsum(math.exp(x - largest) for x in logits))
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    wanted = [chosen] + [t for t in order[: len(order) if k == -1 else k] if t != chosen]
    return {t: Logprob(logits[t] - log_sum, 1 + sum(x > logits[t] for x in logits)) for t in wanted}


def assert_same(found: object, expected: dict[int, Logprob]) -> None:
    assert isinstance(found, dict)
    assert list(found) == list(expected)  # the order too
    for token_id, logprob in expected.items():
        assert found[token_id].rank == logprob.rank
        assert found[token_id].decoded_token is None
        assert found[token_id].logprob == pytest.approx(logprob.logprob, rel=1e-7, abs=5e-7)


@settings(deadline=None)
@given(st.data(), st.integers(0, 2**32), st.integers(1, 400), st.sampled_from([0.0, 0.25, 1e-6]))
def test_each_row_equals_the_definition(
    data: st.DataObject, seed: int, vocab_size: int, grid: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((3, vocab_size)) * 5).astype(np.float32)
    if grid:
        logits = (np.round(logits / grid) * grid).astype(np.float32)  # ties
    logits.flags.writeable = False
    chosen = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=3, max_size=3))
    k = data.draw(st.lists(st.sampled_from([None, -1, 0, 1, 5, 20, 1000]), min_size=3, max_size=3))
    found = top_logprobs(logits, chosen, k)
    for row, c, n, result in zip(logits.tolist(), chosen, k, found, strict=True):
        if n is None:
            assert result is None
        else:
            assert_same(result, slow_logprobs(row, c, n))


def test_a_large_vocabulary_equals_the_definition() -> None:
    logits = (np.random.default_rng(1).standard_normal((1, 50_000)) * 4).astype(np.float32)
    assert_same(top_logprobs(logits, [7], [20])[0], slow_logprobs(logits[0].tolist(), 7, 20))


def test_probabilities_of_the_whole_vocabulary_add_up_to_one() -> None:
    logits = (np.random.default_rng(1).standard_normal((1, 20_000)) * 4).astype(np.float32)
    (row,) = top_logprobs(logits, [3], [-1])
    assert isinstance(row, dict) and len(row) == 20_000
    assert math.fsum(math.exp(x.logprob) for x in row.values()) == pytest.approx(1, abs=5e-7)


def test_the_chosen_token_comes_first_and_is_not_told_twice() -> None:
    logits = np.array([[0.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    likely, unlikely = top_logprobs(np.repeat(logits, 2, axis=0), [2, 0], [2, 2])
    assert isinstance(likely, dict) and list(likely) == [2, 1]
    assert isinstance(unlikely, dict) and list(unlikely) == [0, 1, 2]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = (np.random.default_rng(2).standard_normal((9, 5000)) * 4).astype(np.float32)
    k: list[int | None] = [0, 1, 5, None, -1, 20, 3, 0, 7]
    together = top_logprobs(logits, list(range(9)), k)
    assert together == [top_logprobs(logits[i : i + 1], [i], [k[i]])[0] for i in range(9)]


def test_extreme_logits_give_no_warning_and_finite_sums() -> None:
    logits = np.array([[3e38, -3e38, 0.0, -np.inf]], dtype=np.float32)
    (row,) = top_logprobs(logits, [1], [-1])
    assert isinstance(row, dict)
    assert row[0].logprob == 0 and row[3] == Logprob(-math.inf, 4)


@pytest.mark.parametrize("poison", [[0.0, np.nan], [0.0, np.inf], [-np.inf, -np.inf]])
def test_a_poisoned_row_fails_alone(poison: list[float]) -> None:
    logits = np.array([[0.0, 1.0], poison, [0.0, 1.0]], dtype=np.float32)
    first, second, third = top_logprobs(logits, [0, 0, 0], [1, 1, 1])
    assert isinstance(second, RequestError)
    assert isinstance(first, dict) and first == third
