"""Formats within a budget: against all choices on small cases, and never above the budget."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.errors import ConfigError
from pellucid.quant import allocate as module
from pellucid.quant.allocate import Option, allocate

OPTIONS = st.lists(
    st.builds(Option, st.integers(0, 60), st.floats(0, 10) | st.just(float("inf"))),
    min_size=1,
    max_size=4,
)
TENSORS = st.lists(OPTIONS, min_size=1, max_size=5)


def cost(tensors: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    options = [options[i] for options, i in zip(tensors, chosen, strict=True)]
    return sum(o.num_bytes for o in options), sum(o.damage for o in options)


def best(tensors: list[list[Option]], budget: int) -> float:
    every = itertools.product(*(range(len(options)) for options in tensors))
    costs = [cost(tensors, chosen) for chosen in every]
    return min(damage for size, damage in costs if size <= budget)


def least(tensors: list[list[Option]]) -> int:
    return sum(min(o.num_bytes for o in options) for options in tensors)


@given(TENSORS, st.integers(0, 300))
def test_nothing_within_the_budget_does_less_damage(tensors: list[list[Option]], more: int) -> None:
    budget = least(tensors) + more
    chosen = allocate(tensors, budget)
    size, damage = cost(tensors, chosen)
    assert size <= budget
    assert damage == pytest.approx(best(tensors, budget), rel=1e-9)
    assert chosen == allocate(tensors, budget)


@given(TENSORS, st.integers(0, 300))
def test_a_coarse_unit_stays_within_the_budget(tensors: list[list[Option]], more: int) -> None:
    budget = least(tensors) + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_UNITS", 7)
        chosen = allocate(tensors, budget)
    size, damage = cost(tensors, chosen)
    assert size <= budget
    # nothing more can be had for the bytes that are left
    for row, options in enumerate(tensors):
        for i, option in enumerate(options):
            others = [*chosen[:row], i, *chosen[row + 1 :]]
            if cost(tensors, others)[0] <= budget and damage < float("inf"):
                assert option.damage >= options[chosen[row]].damage


def test_a_large_budget_gives_each_tensor_its_best() -> None:
    tensors = [[Option(1 << 40, 0.0), Option(3, 1.0)], [Option(5, 2.0), Option(7, 2.0)]]
    assert allocate(tensors, 1 << 50) == [0, 0]
    assert allocate(tensors, 1 << 30) == [1, 0]


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget is 7 bytes; the least that is possible is 8"):
        allocate([[Option(3, 0.0)], [Option(5, 0.0), Option(6, 0.0)]], 7)
