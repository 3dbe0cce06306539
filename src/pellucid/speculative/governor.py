"""The governor: decides before each step how many draft tokens to verify, so that drafts never cost
more than they give.

A step that computes b rows (one per request, and one per draft) takes t(b) seconds and gives

    E(b) = n + Σ s        n requests; s: the chance that this draft and all before it are accepted

tokens. The governor takes the drafts in the order of their s, and stops where E(b) / t(b) is
largest. With one request, k drafts and the same chance α for each this is the known speed-up
(1 - α^(k+1)) / ((1 - α) · v(k+1)), v(b) = t(b) / t(1) (Leviathan et al., arXiv:2211.17192, theorem
3.8; there all v are 1).

t is learned from the steps that run (`StepCosts`), and s from what the proposers guessed
(`Acceptance`). A guess that was not verified teaches as well: the next token is compared with it.
So only t needs an attempt now and then.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from .proposer import Draft

__all__ = ["Acceptance", "Governor", "StepCosts", "VerifyAll"]

_MAX_ROWS = 128  # of a step that is measured
_SAMPLES = 5  # the last steps of one number of rows; their median counts
_ROW_COST = 0.08  # of a step of one row: what a further row costs, until it is measured
_MIN_GAIN = 1.01  # drafts are verified if they promise this much
_ATTEMPT_STEPS = 64  # after so many plain steps that could have paid, one with drafts is tried
_COMPARE_STEPS = 16  # one step in so many with drafts measures another number of rows


_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0  # of a token's chance, before anything was observed
_KEEP = 0.99  # of an observation, when the next comes
_RATE_OF_REQUEST = 0.3  # how fast a request's own log-odds follow its observations
_MOST_BETTER = 6.0  # log-odds
_LEAST_CHANCE = 0.005


class StepCosts:
    """Seconds of steps in which all requests decode, by their number of rows.

    Contexts grow, so a cost that was measured long ago is too small. So when one cost changes, the
    others follow half of the way.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}  # in units of _drift
        self._drift: dict[int, float] = {}

    def record(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so many seconds."""
        if rows > _MAX_ROWS or seconds <= 0:
            return
        if rows not in self._samples:
            self._samples[rows], self._drift[rows] = deque([seconds], _SAMPLES), 1.0
            return
        before = self.seconds(rows)
        self._samples[rows].append(seconds / self._drift[rows])
        change = self.seconds(rows) / before
        for other in self._drift:
            if other != rows:
                self._drift[other] *= math.sqrt(change)

    def seconds(self, rows: int) -> float:
        """What a step of so many rows takes. Between measured numbers it is interpolated; above
        them a row is assumed to cost `_ROW_COST`. Needs one measurement.
        """
        if rows in self._samples:
            return median(self._samples[rows]) * self._drift[rows]
        below = max((r for r in self._samples if r < rows), default=None)
        above = min((r for r in self._samples if r > rows), default=None)
        if below is None and above is None:
            raise ValueError("no step was measured yet")
        if below is None or above is None:
            known = below if below is not None else above
            assert known is not None
            one_row = self.seconds(known) / (1 + _ROW_COST * (known - 1))
            return one_row * (1 + _ROW_COST * (rows - 1))
        low, high = self.seconds(below), self.seconds(above)
        return low + (high - low) * (rows - below) / (above - below)

    def num_samples(self, rows: int) -> int:
        """How many steps of so many rows were measured, at most _SAMPLES."""
        return len(self._samples.get(rows, ()))

    @property
    def is_known(self) -> bool:
        """True after the first step."""
        return bool(self._samples)


class Acceptance:
    """How often the tokens of one proposer are right, by their evidence, with slow forgetting."""

    def __init__(self, num_evidence: int) -> None:
        self._right = [_PRIOR_WEIGHT * _PRIOR] * num_evidence
        self._tried = [_PRIOR_WEIGHT] * num_evidence

    def chance(self, evidence: int) -> float:
        """The chance that such a token is accepted if all before it are."""
        return self._right[evidence] / self._tried[evidence]

    def record(self, evidence: int, is_right: bool) -> None:
        """The token behind all those before it was, or would have been, accepted or rejected."""
        self._right[evidence] = self._right[evidence] * _KEEP + is_right
        self._tried[evidence] = self._tried[evidence] * _KEEP + 1


class Governor:
    """Learns from steps, and chooses the drafts of the next."""

    def __init__(self, num_evidence: Mapping[str, int]) -> None:
        """`num_evidence`: of each proposer, by its name."""
        self.costs = StepCosts()
        self._acceptance = {name: Acceptance(n) for name, n in num_evidence.items()}
        # (request_id, proposer) -> how much better its drafts are than their evidence: log-odds
        self._better: dict[tuple[str, str], float] = {}
        self._steps_off = 0  # plain steps in a row though drafts might have paid
        self._steps_on = 0

    def may_pay(self, num_requests: int) -> bool:
        """False if even drafts that are all accepted would not pay, so that none need be made."""
        if not self.costs.is_known:
            return False
        plain = num_requests / self.costs.seconds(num_requests)
        return any(
            rows / self.costs.seconds(rows) > _MIN_GAIN * plain
            for rows in (num_requests + 1, num_requests + 3, num_requests + 7)
        )

    def chances(self, request_id: str, proposer: str, draft: Draft) -> list[float]:
        """For each token, the chance that it and all before it are accepted."""
        found, chance = [], 1.0
        for evidence in draft.evidence:
            chance *= self._chance(request_id, proposer, evidence)
            found.append(chance)
        return found

    def _chance(self, request_id: str, proposer: str, evidence: int) -> float:
        """The chance of a token behind accepted ones: the evidence's, moved by the request's."""
        chance = _bounded(self._acceptance[proposer].chance(evidence))
        odds = chance / (1 - chance) * math.exp(self._better.get((request_id, proposer), 0.0))
        return _bounded(odds / (1 + odds))

    def choose(self, chances: Mapping[str, Sequence[float]], num_requests: int) -> dict[str, int]:
        """How many draft tokens of each request to verify, from the chances of its draft."""
        ranked = sorted(
            ((chance, name) for name, of_draft in chances.items() for chance in of_draft),
            key=lambda pair: -pair[0],
        )
        if not ranked or not self.costs.is_known:
            return {}
        # Find the number of rows with the most tokens per second.
        tokens = [float(num_requests)]
        for chance, _ in ranked:
            tokens.append(tokens[-1] + chance)
        rates = [t / self.costs.seconds(num_requests + i) for i, t in enumerate(tokens)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] < _MIN_GAIN * rates[0]:
            best = 0
        best = self._explore(best, rates, num_requests)
        # Take the first drafts; those of one request are ranked in their order.
        chosen: dict[str, int] = {}
        for _, name in ranked[:best]:
            chosen[name] = chosen.get(name, 0) + 1
        return chosen

    def _explore(self, best: int, rates: Sequence[float], num_requests: int) -> int:
        """`best`, or now and then a number of drafts whose cost is known less well."""
        seconds = self.costs.seconds
        if best:
            self._steps_off = 0
            self._steps_on += 1
            if self._steps_on % _COMPARE_STEPS:
                return best
            others = [i for i, rate in enumerate(rates) if rate > 0.9 * rates[best]]
            return min(others, key=lambda i: self.costs.num_samples(num_requests + i))
        # Would anything pay if rows cost what is assumed before they are measured?
        plain = seconds(num_requests)
        assumed = [
            rate * seconds(num_requests + i) / (plain * (1 + _ROW_COST * i))
            for i, rate in enumerate(rates)
        ]
        promising = max(range(len(rates)), key=assumed.__getitem__)
        self._steps_off += assumed[promising] > _MIN_GAIN * assumed[0]
        if self._steps_off < _ATTEMPT_STEPS:
            return 0
        self._steps_off = 0
        return promising

    def observe(self, request_id: str, proposer: str, draft: Draft, sampled: Sequence[int]) -> None:
        """Learn from the tokens that a step gave: each tells whether a draft token is right, up to
        the first that is wrong. It need not have been verified.
        """
        key = request_id, proposer
        pairs = zip(draft.token_ids, draft.evidence, sampled, strict=False)
        for token_id, evidence, given in pairs:
            is_right = token_id == given
            error = is_right - self._chance(*key, evidence)
            better = self._better.get(key, 0.0) + _RATE_OF_REQUEST * error
            self._better[key] = min(max(better, -_MOST_BETTER), _MOST_BETTER)
            self._acceptance[proposer].record(evidence, is_right)
            if not is_right:
                break

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        for proposer in self._acceptance:
            self._better.pop((request_id, proposer), None)


class VerifyAll(Governor):
    """Verifies every draft, for proofs that drafts change no answer."""

    def __init__(self) -> None:
        super().__init__({})

    def may_pay(self, num_requests: int) -> bool:
        """Drafts are always made."""
        return True

    def chances(self, request_id: str, proposer: str, draft: Draft) -> list[float]:
        """All the same, so the longest draft is taken."""
        return [1.0] * len(draft.token_ids)

    def choose(self, chances: Mapping[str, Sequence[float]], num_requests: int) -> dict[str, int]:
        """All tokens of each draft."""
        return {name: len(of_draft) for name, of_draft in chances.items()}

    def observe(self, request_id: str, proposer: str, draft: Draft, sampled: Sequence[int]) -> None:
        """Nothing is learned."""


def _bounded(chance: float) -> float:
    return min(max(chance, _LEAST_CHANCE), 1 - _LEAST_CHANCE)
