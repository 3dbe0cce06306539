"""The governor: most tokens per second, learned from steps, without loss where nothing pays."""

import itertools
import random

import pytest

from pellucid.speculative.governor import Governor
from pellucid.speculative.proposer import Draft


def governor(seconds: dict[int, float], num_requests: int = 1) -> Governor:
    """`seconds`: of a step, by its number of rows. All were measured often."""
    made = Governor({"p": [0.5] * 4})
    for _ in range(200):
        for rows, each in sorted(seconds.items()):
            made.costs.record(num_requests, rows - num_requests, each)
    return made


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
        seconds = list(itertools.accumulate(rng.choice((0.0, 0.1, 0.4)) for _ in range(8)))
        steps = {i + 3: 1 + s for i, s in enumerate(seconds)}
        made = governor(steps, 3)
        chances = {}
        for name in "abc":
            c = 1.0
            chances[name] = [c := c * rng.random() for _ in range(rng.randint(0, 2))]
        # all ways to cut the drafts
        best = max(
            (
                (3 + sum(sum(chances[n][:k]) for n, k in zip("abc", cut, strict=True)))
                / steps[3 + sum(cut)]
            )
            for cut in itertools.product(*(range(len(c) + 1) for c in chances.values()))
        )
        chosen = made.choose(chances, 3)
        rows = 3 + sum(chosen.values())
        gained = 3 + sum(sum(chances[n][:k]) for n, k in chosen.items())
        assert gained / steps[rows] >= best / 1.02


def test_acceptance_is_learned_by_evidence_and_by_request() -> None:
    made = governor({1: 1.0})
    good, bad = Draft([7], [3]), Draft([7], [0])
    for _ in range(200):
        made.observe("a", "p", good, [7])
        made.observe("b", "p", bad, [8])
    assert made.chances("c", "p", good)[0] > 0.9
    assert not made.chances("c", "p", bad)  # negligible
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
        self.governor = Governor({"p": [0.5]})
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
            self.governor.costs.record(1, count, seconds)
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


class Modelled:
    """A draft model whose tokens are right with a chance, and cost a share of a plain step."""

    def __init__(self, alpha: float, cost: float) -> None:
        self.rng, self.alpha, self.cost = random.Random(2), alpha, cost
        self.governor = Governor({"m": [0.5]})

    def run(self, steps: int) -> tuple[float, list[int]]:
        """(seconds for a token, lengths of the drafts)"""
        seconds, tokens, lengths = 0.0, 0, []
        for _ in range(steps):
            limit = self.governor.plan("m", {}, 1, 15)
            draft = Draft([1] * limit, [0] * limit)
            chances = self.governor.chances("a", "m", draft)
            if limit:
                self.governor.record_drafting("m", [chances], 1, self.cost * len(chances))
            count = self.governor.choose({"a": chances}, 1).get("a", 0) if chances else 0
            right = 0
            while right < limit and self.rng.random() < self.alpha:
                right += 1
            given = [1] * min(right, count) + ([1] if right > count else [0])
            step = 1 + 0.08 * count
            self.governor.costs.record(1, count, step)
            self.governor.observe("a", "m", draft, given)
            seconds += step + self.cost * limit
            tokens += len(given)
            lengths.append(limit)
        return seconds / tokens, lengths


def test_a_draft_model_is_asked_where_it_pays() -> None:
    found, lengths = Modelled(0.9, 0.2).run(400)
    best = min((1 + 0.28 * k) / sum(0.9**i for i in range(k + 1)) for k in range(16))
    assert found < 1.1 * best and sum(n > 0 for n in lengths) > 360


@pytest.mark.parametrize(("alpha", "cost"), [(0.3, 0.3), (0.05, 0.1), (0.7, 0.8)])
def test_a_draft_model_that_cannot_pay_is_hardly_asked(alpha: float, cost: float) -> None:
    modelled = Modelled(alpha, cost)
    modelled.run(200)  # it learns
    found, _ = modelled.run(2000)
    assert found < 1.02


def test_a_draft_model_comes_back_when_it_pays() -> None:
    modelled = Modelled(0.1, 0.2)
    modelled.run(300)
    modelled.alpha = 0.95
    _, lengths = modelled.run(400)
    assert sum(n > 0 for n in lengths[-100:]) > 90


def test_a_draft_model_is_not_asked_beside_a_long_match() -> None:
    modelled = Modelled(0.9, 0.2)
    modelled.run(200)
    made = modelled.governor
    assert made.plan("m", {"a": [0.98**i for i in range(1, 16)]}, 1, 15) == 0
    assert made.plan("m", {"a": [0.3, 0.1]}, 1, 15) > 0


def test_a_request_for_which_asking_is_not_worth_its_time_rests() -> None:
    """Of 32 requests two copy a text. They are asked in each step, the others now and then."""
    made = governor({32: 0.030, 34: 0.031, 40: 0.034, 64: 0.05}, 32)
    names = [str(i) for i in range(32)]
    times = dict.fromkeys(names, 0)
    for _ in range(320):
        due = [name for name in names if made.is_due(name)]
        chances = {name: [0.95, 0.9] for name in due if int(name) < 2}
        counts = made.choose(chances, 32)
        if due:
            made.record_asking(due, counts, 32, 50e-6 * len(due))
        for name in due:
            times[name] += 1
    assert min(times["0"], times["1"]) > 300
    assert 5 < max(times[name] for name in names[2:]) < 20
    made.forget("0")
    assert made.is_due("0")


def _planned(alpha: float, limit: int = 15) -> Governor:
    """A governor after plain steps of a second, and drafts of a model with these chances."""
    governor = Governor({"m": [0.5]})
    for _ in range(20):
        governor.costs.record(1, 0, 1.0)
    for _ in range(40):
        governor.plan("m", {}, 1, limit)
        governor.record_drafting("m", [[alpha, alpha**2, alpha**3]], 1, 0.6)
        governor.record_catch_up("m", 100, 1, 8.0)
    return governor


def test_a_draft_model_catches_up_only_if_the_rest_of_the_answer_is_worth_it() -> None:
    governor = _planned(0.95)
    assert governor.plan("m", {}, 1, 15) > 1
    assert governor.is_worth("m", 10, 1)  # so few tokens cost next to nothing
    assert governor.is_worth("m", 200, 1000) and not governor.is_worth("m", 200, 20)
    assert not governor.is_worth("m", 100_000, 100_000)


def test_attempts_of_a_draft_model_catch_up_for_few_steps() -> None:
    governor, spent = _planned(0.1), 0.0
    for _ in range(1000):
        if governor.plan("m", {}, 1, 15) and governor.is_worth("m", 64, 1000):
            governor.record_catch_up("m", 64, 1, 5.0)
            spent += 5.0
    assert 0 < spent < 8 + 0.02 * 1000 + 5


def test_a_draft_ends_where_the_next_token_does_not_pay() -> None:
    governor = _planned(0.95)
    governor.plan("m", {}, 1, 15)
    for _ in range(50):
        governor.observe("r", "m", Draft([1], [0]), [1])
    assert governor.goes_on("m", "r", Draft([1], [0]))
    for _ in range(50):
        governor.observe("r", "m", Draft([1], [0]), [2])
    assert not governor.goes_on("m", "r", Draft([1], [0]))
