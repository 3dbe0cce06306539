"""The governor: most tokens per second, learned from steps, without loss where nothing pays."""

import itertools
import random

import pytest

from pellucid.speculative.governor import Governor, StepCosts
from pellucid.speculative.proposer import Draft


def governor(seconds: dict[int, float]) -> Governor:
    made = Governor({"p": 4})
    for rows, each in seconds.items():
        made.costs.record(rows, each)
    return made


def test_costs_are_medians_and_are_interpolated() -> None:
    costs = StepCosts()
    for seconds in (1.0, 1.0, 9.0, 1.0, 1.0):  # one step was disturbed
        costs.record(1, seconds)
    assert costs.seconds(1) == pytest.approx(1.0, rel=0.2)
    costs.record(5, 2 * costs.seconds(1))
    ratio = costs.seconds(3) / costs.seconds(1)
    assert ratio == pytest.approx(1.5)
    assert costs.seconds(5) < costs.seconds(6) < costs.seconds(9)
    with pytest.raises(ValueError, match="no step was measured"):
        StepCosts().seconds(1)


def test_all_costs_follow_a_context_that_grows() -> None:
    costs = StepCosts()
    for rows in (1, 4):
        costs.record(rows, 1.0 + 0.1 * rows)
    for _ in range(100):
        costs.record(1, 2.2)
    assert costs.seconds(1) == pytest.approx(2.2)
    assert 1.4 * 1.4 < costs.seconds(4) < 1.4 * 2


def test_the_formula_of_one_request() -> None:
    """Σ α^i / v(k + 1), as in Leviathan et al. with a measured v: the best k is chosen."""
    v = {1: 1.0, 2: 1.5, 3: 1.55, 4: 1.6, 5: 2.4, 6: 2.5, 7: 2.6, 8: 2.7}
    for alpha in (0.05, 0.3, 0.5, 0.7, 0.9, 0.99):
        made = governor(v)
        chances = [alpha ** (i + 1) for i in range(7)]
        speed_ups = [(1 - alpha ** (k + 1)) / ((1 - alpha) * v[k + 1]) for k in range(8)]
        best = max(range(8), key=speed_ups.__getitem__)
        if speed_ups[best] < 1.01:
            best = 0
        assert made.choose({"a": chances}, 1).get("a", 0) == best


def test_the_rows_of_a_batch_go_to_the_best_drafts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        seconds = list(itertools.accumulate(rng.choice((0.0, 0.1, 0.4)) for _ in range(10)))
        made = governor({i + 1: 1 + s for i, s in enumerate(seconds)})
        chances = {}
        for name in "abc":
            c = 1.0
            chances[name] = [c := c * rng.random() for _ in range(rng.randint(0, 2))]
        # all ways to cut the drafts
        best = max(
            (
                (3 + sum(sum(chances[n][:k]) for n, k in zip("abc", cut, strict=True)))
                / made.costs.seconds(3 + sum(cut))
            )
            for cut in itertools.product(*(range(len(c) + 1) for c in chances.values()))
        )
        chosen = made.choose(chances, 3)
        rows = 3 + sum(chosen.values())
        gained = 3 + sum(sum(chances[n][:k]) for n, k in chosen.items())
        assert gained / made.costs.seconds(rows) >= best / 1.01


def test_acceptance_is_learned_by_evidence_and_by_request() -> None:
    made = governor({1: 1.0})
    good, bad = Draft([7], [3]), Draft([7], [0])
    for _ in range(200):
        made.observe("a", "p", good, [7])
        made.observe("b", "p", bad, [8])
    assert made.chances("c", "p", good)[0] > 0.9
    assert made.chances("c", "p", bad)[0] < 0.1
    # a request in which good evidence fails
    for _ in range(8):
        made.observe("d", "p", good, [8])
    assert made.chances("d", "p", good)[0] < 0.6 < made.chances("c", "p", good)[0]
    made.forget("d")
    assert made.chances("d", "p", good) == made.chances("c", "p", good)


def test_a_draft_teaches_up_to_its_first_mistake() -> None:
    made = governor({1: 1.0})
    before = made.chances("x", "p", Draft([0], [3]))
    made.observe("a", "p", Draft([1, 2, 3], [0, 1, 3]), [1, 9, 3])
    assert made.chances("x", "p", Draft([0], [3])) == before
    assert made.chances("x", "p", Draft([0], [0])) > made.chances("x", "p", Draft([0], [1]))


class Simulation:
    """One request whose drafts are right with a chance that changes, on a machine with given v."""

    def __init__(self, row_cost: float) -> None:
        self.rng = random.Random(1)
        self.governor = Governor({"p": 1})
        self.row_cost = row_cost
        self.history: list[tuple[int, float, int]] = []  # drafts, seconds, tokens

    def run(self, alpha: float, tokens: int) -> None:
        while tokens > 0:
            draft, count = Draft([1] * 15, [0] * 15), 0
            if self.governor.may_pay(1):
                chances = self.governor.chances("a", "p", draft)
                count = self.governor.choose({"a": chances}, 1).get("a", 0)
            right = 0
            while right < 15 and self.rng.random() < alpha:
                right += 1
            given = [1] * min(right, count) + ([1] if right > count else [0])
            seconds = (1 + self.row_cost * count) * self.rng.uniform(0.97, 1.03)
            self.governor.costs.record(1 + count, seconds)
            self.governor.observe("a", "p", draft, given)
            self.history.append((count, seconds, len(given)))
            tokens -= len(given)


def test_what_cannot_pay_costs_next_to_nothing() -> None:
    """No draft is ever right, or a row costs as much as a step."""
    for alpha, row_cost in ((0.0, 0.1), (0.1, 0.3), (0.9, 1.0)):
        simulation = Simulation(row_cost)
        simulation.run(alpha, 2000)
        seconds = sum(s for _, s, _ in simulation.history)
        tokens = sum(t for _, _, t in simulation.history)
        assert seconds < 1.02 * tokens


def test_what_pays_is_found() -> None:
    simulation = Simulation(0.08)
    simulation.run(0.9, 1000)
    seconds = sum(s for _, s, _ in simulation.history)
    best = max((1 - 0.9 ** (k + 1)) / (0.1 * (1 + 0.08 * k)) for k in range(16))
    assert 1000 / seconds > 0.9 * best


def test_it_turns_off_and_on_within_64_tokens() -> None:
    simulation = Simulation(0.15)
    for alpha in (0.9, 0.02, 0.9, 0.02, 0.9):
        simulation.run(alpha, 64)
        start = len(simulation.history)
        simulation.run(alpha, 300)
        drafts = [count for count, _, _ in simulation.history[start:]]
        on = sum(count > 0 for count in drafts) / len(drafts)
        assert on > 0.9 if alpha > 0.5 else on < 0.1
