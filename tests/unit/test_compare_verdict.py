"""Which models dominate others, and the sentence that says which to take."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.measure.compare_verdict import Candidate, find_dominators, recommend

SIZES, LOSSES, SPEEDS = st.integers(1, 5), st.integers(0, 6), st.integers(90, 110)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """Rows with few values, so that many are equal in some respect."""
    count = draw(st.integers(1, 8))
    return [
        Candidate(
            name=str(i),
            file_bytes=draw(SIZES),
            kv_bytes=draw(st.integers(1, 2)),
            kl=draw(LOSSES) / 50,
            same_top=0.9,
            prefill=draw(SPEEDS),
            decode=draw(SPEEDS),
        )
        for i in range(count)
    ]


def by_more_than(rows: Sequence[Candidate], least: float) -> Callable[[int, int], bool]:
    """`loses_less` if differences of up to `least` are noise."""
    return lambda i, j: rows[j].kl - rows[i].kl > least


@given(candidates(), st.sampled_from([0.0, 0.015, 0.05]))
def test_some_row_is_free_and_no_chain_of_dominators_is_a_circle(
    rows: list[Candidate], noise: float
) -> None:
    above = find_dominators(rows, by_more_than(rows, noise))
    assert None in above
    for start in range(len(rows)):
        seen, row = set(), start
        while (dominator := above[row]) is not None:
            assert row not in seen
            seen.add(row)
            row = dominator


@given(candidates())
def test_a_dominator_is_as_good_in_all_and_better_in_one(rows: list[Candidate]) -> None:
    for row, above in zip(rows, find_dominators(rows, by_more_than(rows, 0)), strict=True):
        if above is not None:
            best = rows[above]
            assert best.file_bytes <= row.file_bytes and best.kv_bytes <= row.kv_bytes
            assert best.kl <= row.kl
            assert best.prefill >= 0.95 * row.prefill and best.decode >= 0.95 * row.decode  # type: ignore[operator]
            sizes = (best.file_bytes, best.kv_bytes, best.kl)
            assert sizes != (row.file_bytes, row.kv_bytes, row.kl)


@given(candidates())
def test_a_row_that_is_best_in_all_dominates_all_others(rows: list[Candidate]) -> None:
    best = Candidate("best", 0, 0, -1.0, 1.0, 200, 200)
    all_rows = [*rows, best]
    above = find_dominators(all_rows, by_more_than(all_rows, 0))
    assert above == [len(rows)] * len(rows) + [None]


@given(candidates(), st.randoms())
def test_the_order_of_the_rows_does_not_matter(rows: list[Candidate], dice: object) -> None:
    def free(order: list[Candidate]) -> set[str]:
        above = find_dominators(order, by_more_than(order, 0.015))
        return {row.name for row, found in zip(order, above, strict=True) if found is None}

    mixed = list(rows)
    dice.shuffle(mixed)  # type: ignore[attr-defined]
    assert free(mixed) == free(rows)


A = Candidate("A", 100, 10, 0.02, 0.95, 300.0, 30.0)


@pytest.mark.parametrize(
    ("changes", "is_dominated"),
    [
        ({"file_bytes": 101}, True),  # larger
        ({"kv_bytes": 11}, True),  # a larger KV cache
        ({"kl": 0.03}, True),  # it loses measurably more
        ({"kl": 0.021}, False),  # it loses more by less than the error, and nothing else differs
        ({"file_bytes": 101, "kl": 0.019}, True),  # larger, and no better than the error
        ({"file_bytes": 101, "kl": 0.01}, False),  # larger and better
        ({"file_bytes": 101, "decode": 40.0}, False),  # larger and faster
        ({"file_bytes": 101, "decode": 31.0}, True),  # faster by less than 5 %
        ({"file_bytes": 101, "prefill": None, "decode": None}, True),  # no speed is known
    ],
)
def test_what_dominates(changes: dict[str, object], is_dominated: bool) -> None:
    rows = [A, replace(A, name="B", **changes)]  # type: ignore[arg-type]
    found = find_dominators(rows, by_more_than(rows, 0.005))
    assert found == [None, 0 if is_dominated else None]


def test_the_sentence_names_the_smallest_that_loses_little() -> None:
    base = Candidate("F16", 200_000_000, 10, 0.0, 1.0, 300.0, 15.0)
    q8 = replace(A, name="Q8_0", file_bytes=110_000_000, kl=0.001)
    q4 = replace(A, name="Q4_K_M", file_bytes=60_000_000, kl=0.03, decode=33.0)
    q2 = replace(A, name="Q2_K", file_bytes=40_000_000, kl=0.4)
    nothing: list[int | None] = [None, None, None, None]
    found = recommend([base, q8, q4, q2], nothing, 1e-6)
    assert found.name == "Q4_K_M"
    assert found.sentence == (
        "Take Q4_K_M: the smallest of 3 that loses at most 0.05 nats (KL 0.0300; the base's "
        "likeliest token 95.0% of the time; 60.0 MB, 30% of the base; decode 2.20 times as fast "
        "as the base)."
    )
    # a dominated row is not taken, however small its loss
    assert recommend([base, q8, q4, q2], [None, None, 1, None], 1e-6).name == "Q8_0"
    # all lose much; one row alone; a row within the noise floor
    worse = replace(q2, name="worse", kl=0.5)
    found = recommend([base, worse, q2], [None] * 3, None)
    assert found.name == "Q2_K" and "it loses least, though more than 0.05 nats" in found.sentence
    assert (
        "Take Q2_K: it loses more than 0.05 nats" in recommend([base, q2], [None] * 2, 0).sentence
    )
    assert "Take Q8_0: it loses at most 0.05" in recommend([base, q8], [None] * 2, 0).sentence
    assert "KL 0.001, within the noise floor" in recommend([base, q8], [None] * 2, 0.01).sentence
    # nothing is worth taking
    found = recommend([base, q8, q4], [None, 0, 0], 0)
    assert found.sentence == "Take F16: the base dominates all others."
    without = replace(q8, decode=None)
    assert "decode" not in recommend([base, without], [None] * 2, 0).sentence
