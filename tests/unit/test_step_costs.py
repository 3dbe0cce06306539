"""The costs of steps: learned from noisy times, for any number of requests and drafts."""

import random

import pytest

from pellucid.speculative.costs import MAX_ROWS, StepCosts

V = {0: 1.0, 1: 1.1, 3: 1.25, 7: 1.8, 15: 2.6}


def test_nothing_is_known_before_a_step_ran() -> None:
    costs = StepCosts()
    assert costs.ratios(1) is None and costs.plain_seconds(1) is None
    costs.record(1, 0, 0.0)  # a clock that stood still
    assert costs.ratios(1) is None
    costs.record(1, 0, 1.0)
    assert costs.plain_seconds(1) == 1.0 and costs.ratios(2) is None


def test_costs_are_learned_under_noise() -> None:
    """Every tenth step is disturbed, and takes up to ten times as long."""
    rng, costs = random.Random(0), StepCosts()
    for _ in range(400):
        drafts = rng.choice(list(V))
        disturbed = rng.uniform(1, 10) if rng.random() < 0.1 else 1.0
        costs.record(1, drafts, 0.02 * V[drafts] * rng.uniform(0.95, 1.05) * disturbed)
    ratios = costs.ratios(1)
    assert ratios is not None and costs.plain_seconds(1) == pytest.approx(0.02, rel=0.15)
    for drafts, ratio in V.items():
        assert ratios[drafts] == pytest.approx(ratio, rel=0.1)
    # what lies between is interpolated, and what lies behind goes on
    assert ratios[11] == pytest.approx((ratios[7] + ratios[15]) / 2)
    assert ratios[31] > ratios[15]


@pytest.mark.parametrize("drafts", [0, 7])
def test_all_costs_follow_a_context_that_grows(drafts: int) -> None:
    costs = StepCosts()
    for _ in range(50):
        for k in (0, 7):
            costs.record(1, k, 0.02 * V[k])
    for i in range(400):
        costs.record(1, drafts, 0.02 * V[drafts] * (1 + i / 400))
    plain, ratios = costs.plain_seconds(1), costs.ratios(1)
    assert plain is not None and ratios is not None
    assert plain * ratios[drafts] == pytest.approx(0.04 * V[drafts], rel=0.05)
    assert plain == pytest.approx(0.04, rel=0.2)


def test_another_number_of_requests_begins_with_what_is_known() -> None:
    """A further row takes as many seconds as before."""
    costs = StepCosts()
    for _ in range(100):
        costs.record(1, 0, 1.0)
        costs.record(1, 4, 1.8)
    costs.record(4, 0, 1.6)
    ratios = costs.ratios(4)
    assert ratios is not None and ratios[4] == pytest.approx(1 + 0.8 / 1.6, rel=0.02)


def test_a_row_that_seemed_free_has_no_negative_cost_elsewhere() -> None:
    """By noise a step with drafts was faster than one without. Other steps are far shorter."""
    costs = StepCosts()
    costs.record(8, 0, 10.0)
    costs.record(8, 2, 5.0)
    costs.record(1, 0, 0.1)
    for drafts in range(8):
        costs.record(1, drafts, 0.1)
    ratios = costs.ratios(1)
    assert ratios is not None and min(ratios) > 0.3


def test_every_number_of_rows_up_to_the_limit_has_a_cost() -> None:
    for requests in (1, 2, 16, MAX_ROWS - 1, MAX_ROWS):
        costs = StepCosts()
        for drafts in (0, 1, MAX_ROWS - requests):
            costs.record(requests, drafts, 1.0 + 0.1 * drafts)
        ratios = costs.ratios(requests)
        assert ratios is not None and len(ratios) >= MAX_ROWS - requests + 1
        assert min(ratios) > 0.9
    costs.record(MAX_ROWS, 1, 1.0)
    costs.record(MAX_ROWS + 1, 0, 1.0)
    assert costs.ratios(MAX_ROWS + 1) is None  # so many are never helped


def test_a_row_that_seemed_free_is_found_out_while_drafts_are_verified() -> None:
    """The first steps with drafts were measured in a fast moment of the machine. One step in eight
    has no drafts.
    """
    costs = StepCosts()
    for _ in range(20):
        costs.record(32, 0, 0.030)
    for _ in range(3):
        costs.record(32, 2, 0.028)
    for i in range(240):
        costs.record(32, 2 if i % 8 else 0, 0.032 if i % 8 else 0.030)
    ratios, plain = costs.ratios(32), costs.plain_seconds(32)
    assert ratios is not None and ratios[2] == pytest.approx(0.032 / 0.030, rel=0.01)
    assert plain == pytest.approx(0.030, rel=0.01)
    assert min(ratios) >= 1
