"""The governor: decides before each step how many draft tokens to verify, so that drafts never cost
more than they give.

A step of n requests and k draft tokens takes t(n, k) seconds and gives

    E(n, k) = n + Σ s        s: the chance that this draft token and all before it are accepted

tokens. The governor takes the draft tokens in the order of their s, and stops where E / t is
largest. With one request and the same chance α for each of k draft tokens this is the known
speed-up (1 - α^(k+1)) / ((1 - α) · v(k)), v(k) = t(1, k) / t(1, 0) (Leviathan et al.,
arXiv:2211.17192, theorem 3.8; there all v are 1).

t is learned from the steps that run (`StepCosts`), and s from what the proposers guessed
(`Acceptance`). A guess that was not verified teaches as well: the next token is compared with it.
So only t needs an attempt now and then.

A draft of a model costs time before its chances are known. So whether it is asked for, and for how
many tokens at most, is decided by the chances and the seconds of its last drafts (`plan`). It ends
before that where a further token is not worth its time (`goes_on`). A draft model that is behind
must first compute what it missed, which the rest of the answer must be worth (`is_worth`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter

from .costs import StepCosts
from .proposer import Draft

__all__ = ["Acceptance", "Governor", "VerifyAll"]

_MIN_GAIN = 1.01  # drafts are verified if they promise this much
_ATTEMPT_STEPS = 64  # after so many plain steps that could have paid, one with drafts is tried
_MOST_ATTEMPT_STEPS = 1024  # attempts that change nothing become this rare
_MOST_ATTEMPT = 1.6  # plain steps: what an attempt may take
_ENOUGH_STEPS = 8  # measure the cost of a number of drafts
_COMPARE_STEPS = 16  # one step in so many with drafts measures another number of them
_PLAIN_STEPS = 8  # one step in so many has none where they give little
_LITTLE = 0.85  # of the tokens per second with drafts
_ASKING_SHARE = 0.005  # of the time of plain steps: what asking may take where it is not worth it
_MOST_REST = 31  # steps without asking
_MOST_RISE = 1.5  # of the time that asking takes: one slow time must not count much
_FOLLOW_WORTH = 0.1  # how much the mean worth of asking follows the last
_HOPE = 0.08  # what a draft token may cost, in plain steps of one request, if rows are cheap

_PRIOR_WEIGHT = 4.0  # tokens that a prior counts for
_KEEP = 0.99  # of an observation, when the next comes
_RATE_OF_REQUEST = 0.3  # how fast a request's own log-odds follow its observations
_MOST_BETTER = 6.0  # log-odds
_LEAST_CHANCE = 0.005
_DRAFT_COST = 0.3  # of a token of a draft model, in plain steps, until it is measured
_DRAFT_PRIOR = 0.8  # of its token's chance, before it drafted
_CATCH_UP_COST = 0.08  # plain steps: what a token that it missed costs, until it is measured
_FOLLOW_RATE = 0.1  # how much the mean rate without it follows the next
_FEW = 16  # tokens that it missed: they cost about what one costs
_EXPECTED_TOKENS = 256  # of the rest of an answer, at most
_ATTEMPT_CHANCE = 0.3  # an attempt ends before a token that is less likely
# plain steps that catching up for attempts may take: at most, and for each step without drafts
_MOST_CREDIT, _CREDIT_OF_STEP = 8.0, 0.02
_FOLLOW_DRAFTS = 0.2  # how much the mean of drafts follows the next
_MOST_ATTEMPT_DRAFT = 0.6  # plain steps: what a draft that is tried may take
_NEGLIGIBLE = 0.03  # a draft ends before a token whose chance with all before it is smaller


class Acceptance:
    """How often the tokens of one proposer are right, by their evidence, with slow forgetting."""

    def __init__(self, priors: Sequence[float]) -> None:
        """`priors`: the chance of each kind of evidence, before anything was observed."""
        self._right = [_PRIOR_WEIGHT * prior for prior in priors]
        self._tried = [_PRIOR_WEIGHT for _ in priors]

    def chance(self, evidence: int) -> float:
        """The chance that such a token is accepted if all before it are."""
        return self._right[evidence] / self._tried[evidence]

    def record(self, evidence: int, is_right: bool) -> None:
        """The token behind all those before it was, or would have been, accepted or rejected."""
        self._right[evidence] = self._right[evidence] * _KEEP + is_right
        self._tried[evidence] = self._tried[evidence] * _KEEP + 1


class _Drafting:
    """What the drafts of a proposer that is not free have cost and promised."""

    def __init__(self) -> None:
        self.token_cost = _DRAFT_COST  # of a token for each request, in plain steps
        self.catch_up_cost = _CATCH_UP_COST  # of a token that it missed
        self.survival: list[float] = []  # by the place in the draft: the mean chance
        self.rate = 1.0  # tokens per plain step and request without it: the mean of the last steps
        self.gain = 1.0  # the same with the planned drafts; 1: an attempt
        self.least_chance = 0.0  # with which a further token is worth its time
        self.steps_off = 0
        self.credit = _MOST_CREDIT  # plain steps that attempts may take to catch up

    def record(self, cost: float, drafts: Sequence[Sequence[float]]) -> None:
        """Drafts with these chances were made; a token for each cost so many plain steps."""
        self.token_cost += _FOLLOW_DRAFTS * (cost - self.token_cost)
        del self.survival[max(map(len, drafts)) :]  # it may be old
        for chances in drafts:
            for i, chance in enumerate(chances):
                if i == len(self.survival):
                    self.survival.append(chance)
                self.survival[i] += _FOLLOW_DRAFTS * (chance - self.survival[i])

    def mean_chances(self, count: int) -> list[float]:
        """Of the first `count` tokens. What was not drafted yet goes on as what was."""
        found = self.survival[:count] or [_DRAFT_PRIOR]
        last = found[-1] / found[-2] if len(found) > 1 else found[0]
        while len(found) < count:
            found.append(found[-1] * last)
        return found


class Governor:
    """Learns from steps, and chooses the drafts of the next."""

    def __init__(self, priors: Mapping[str, Sequence[float]]) -> None:
        """`priors`: of each proposer, by its name."""
        self.costs = StepCosts()
        self._acceptance = {name: Acceptance(own) for name, own in priors.items()}
        # (request_id, proposer) -> how much better its drafts are than their evidence: log-odds
        self._better: dict[tuple[str, str], float] = {}
        self._drafting: dict[str, _Drafting] = {}  # of proposers that are not free
        self._steps_off = 0  # plain steps in a row though drafts might have paid
        self._steps_on = 0
        self._attempt_steps = _ATTEMPT_STEPS
        # plain steps that the last choice promises to save, by request
        self._promises: dict[str, float] = {}
        # what asking takes for a request; the first time its prompt is indexed too
        self._ask_seconds = math.inf
        # by request: seconds that asking saved on average, less what it took
        self._worth: dict[str, float] = {}
        self._rest: dict[str, int] = {}  # by request: steps until it is asked again

    def may_pay(self, num_requests: int) -> bool:
        """False if even drafts that are all accepted would not pay, so that none need be made."""
        ratios = self.costs.ratios(num_requests)
        if ratios is None:
            return False
        return any(
            num_requests + k > _MIN_GAIN * num_requests * ratios[k]
            for k in (1, 3, 7, num_requests, 3 * num_requests)
            if k < len(ratios)
        )

    def chances(self, request_id: str, proposer: str, draft: Draft) -> list[float]:
        """For each token, the chance that it and all before it are accepted, up to where this
        chance is negligible.
        """
        found, chance = [], 1.0
        known: dict[int, float] = {}  # neighbours mostly have the same evidence
        for evidence in draft.evidence:
            own = known.get(evidence)
            if own is None:
                own = known[evidence] = self._chance(request_id, proposer, evidence)
            chance *= own
            if chance < _NEGLIGIBLE:
                break
            found.append(chance)
        return found

    def _chance(self, request_id: str, proposer: str, evidence: int) -> float:
        """The chance of a token behind accepted ones: the evidence's, moved by the request's."""
        chance = self._acceptance[proposer].chance(evidence)
        better = self._better.get((request_id, proposer))
        if better is not None:
            chance = _bounded(chance)
            odds = chance / (1 - chance) * math.exp(better)
            chance = odds / (1 + odds)
        return _bounded(chance)

    def plan(
        self, proposer: str, chances: Mapping[str, Sequence[float]], num_requests: int, limit: int
    ) -> int:
        """How many tokens a proposer that is not free should draft for each request; 0: none.
        `chances`: of the drafts that are there already.
        """
        ratios = self.costs.ratios(num_requests)
        if ratios is None:
            return 0
        drafting = self._drafting.setdefault(proposer, _Drafting())
        # Find the length that promises most, by the mean chances of the last drafts.
        tokens, gains, hopes = 1.0, [0.0], [0.0]  # hopes: if all tokens were right
        longest = min(limit, (len(ratios) - 1) // num_requests)
        for k, chance in enumerate(drafting.mean_chances(longest)[:longest], 1):
            tokens += chance
            cost = ratios[k * num_requests] + k * drafting.token_cost
            gains.append(tokens / cost)
            hopes.append((1 + k) / cost)
        best = max(range(len(gains)), key=gains.__getitem__)
        # Is it better than what is there, or nothing?
        rates = _rates(_ranked(chances), num_requests, ratios)
        rate = max(rates) / num_requests
        drafting.rate += _FOLLOW_RATE * (rate - drafting.rate)
        needed = _MIN_GAIN * rate
        if gains[best] > needed:
            drafting.steps_off = 0
            drafting.gain = gains[best]
            rows = min(len(ratios) - 1, max(best, 3) * num_requests)
            row_cost = (ratios[rows] - 1) / rows * num_requests
            drafting.least_chance = gains[best] * (drafting.token_cost + row_cost)
            return best
        # Try a short draft now and then, where one could be better.
        drafting.steps_off += 1
        drafting.credit = min(_MOST_CREDIT, drafting.credit + _CREDIT_OF_STEP)
        if drafting.steps_off < _ATTEMPT_STEPS or max(hopes) < needed:
            return 0
        drafting.steps_off, drafting.gain, drafting.least_chance = 0, 1.0, _ATTEMPT_CHANCE
        return min(longest, max(1, int(_MOST_ATTEMPT_DRAFT / drafting.token_cost)))

    def record_drafting(
        self, proposer: str, chances: Sequence[Sequence[float]], num_requests: int, seconds: float
    ) -> None:
        """A proposer that is not free took so many seconds for drafts with these chances."""
        plain = self.costs.plain_seconds(num_requests)
        longest = max(map(len, chances), default=0)
        if plain is not None and longest:
            self._drafting[proposer].record(seconds / plain / longest, chances)

    def is_worth(self, proposer: str, num_missed: int, num_left: int) -> bool:
        """Whether a draft model should draft for a request. It must first compute the tokens that
        it missed; the answer may have `num_left` more tokens.
        """
        if num_missed <= _FEW:
            return True
        drafting = self._drafting[proposer]
        saved = drafting.credit
        if drafting.gain > 1:
            saved = min(num_left, _EXPECTED_TOKENS) * (1 / drafting.rate - 1 / drafting.gain)
        return num_missed * drafting.catch_up_cost < saved

    def goes_on(self, proposer: str, request_id: str, draft: Draft) -> bool:
        """Whether a draft should have another token: it is worth its time if the last one was."""
        chance = 1.0
        for evidence in draft.evidence:
            chance *= self._chance(request_id, proposer, evidence)
        return chance > self._drafting[proposer].least_chance

    def record_catch_up(
        self, proposer: str, num_missed: int, num_requests: int, seconds: float
    ) -> None:
        """A draft model took so many seconds for tokens that it had missed."""
        plain = self.costs.plain_seconds(num_requests)
        if plain is not None:
            drafting, cost = self._drafting[proposer], seconds / plain
            drafting.catch_up_cost += _FOLLOW_DRAFTS * (cost / num_missed - drafting.catch_up_cost)
            if drafting.gain == 1:
                drafting.credit -= cost

    def choose(self, chances: Mapping[str, Sequence[float]], num_requests: int) -> dict[str, int]:
        """How many draft tokens of each request to verify, from the chances of its draft."""
        ratios = self.costs.ratios(num_requests)
        if ratios is None:
            return {}
        # Find the number of rows with the most tokens per second.
        ranked = _ranked(chances)[: self.costs.most_trusted(num_requests)]
        rates = _rates(ranked, num_requests, ratios)
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] < _MIN_GAIN * rates[0]:
            best = 0
        sums: dict[str, float] = {}
        for chance, name in ranked[:best]:
            sums[name] = sums.get(name, 0.0) + chance
        share = (rates[best] / rates[0] - 1) / sum(sums.values()) if sums else 0.0
        self._promises = {name: share * chance for name, chance in sums.items()}
        best = self._explore(best, rates, num_requests, ratios)
        # Take the first drafts; those of one request are ranked in their order.
        chosen: dict[str, int] = {}
        for _, name in ranked[:best]:
            chosen[name] = chosen.get(name, 0) + 1
        return chosen

    def _explore(
        self, best: int, rates: Sequence[float], num_requests: int, ratios: Sequence[float]
    ) -> int:
        """`best`, or now and then a number of drafts whose cost is known less well."""
        if best:
            self._steps_off, self._attempt_steps = 0, _ATTEMPT_STEPS
            self._steps_on += 1
            # Where little is gained, steps without drafts tell whether anything is.
            if rates[0] > _LITTLE * rates[best] and self._steps_on % _PLAIN_STEPS == 0:
                return 0
            if self._steps_on % _COMPARE_STEPS != _COMPARE_STEPS // 4:
                return best
            others = [i for i, rate in enumerate(rates) if i and rate > 0.9 * rates[best]]
            return min(others, key=lambda i: self.costs.num_measured(num_requests, i))
        # Would anything pay if rows were cheap?
        slope = _HOPE / (1 + _HOPE * (num_requests - 1))
        hoped = [rate * ratios[i] / (1 + slope * i) for i, rate in enumerate(rates)]
        affordable = [i for i in range(len(rates)) if ratios[i] <= _MOST_ATTEMPT]
        promising = max(affordable, key=hoped.__getitem__)
        self._steps_off += hoped[promising] > _MIN_GAIN * hoped[0]
        if self._steps_off < self._attempt_steps:
            return 0
        self._steps_off = 0
        self._attempt_steps = min(2 * self._attempt_steps, _MOST_ATTEMPT_STEPS)
        return promising

    def is_due(self, request_id: str) -> bool:
        """Whether proposers should be asked about a request in this step, in which it decodes."""
        rest = self._rest.get(request_id, 0)
        if rest:
            self._rest[request_id] = rest - 1
        return not rest

    def record_asking(
        self, asked: Sequence[str], drafted: Collection[str], num_requests: int, seconds: float
    ) -> None:
        """Proposers were asked about some of the requests, which took so many seconds; drafts of
        `drafted` are verified. A request for which asking is not worth its time rests, until that
        is a small share of the time of the steps.
        """
        plain = self.costs.plain_seconds(num_requests)
        if plain is None:
            return
        self._ask_seconds = min(_MOST_RISE * self._ask_seconds, seconds / len(asked))
        spent = 2 * self._ask_seconds  # to learn from the guesses takes about as long
        rest = min(_MOST_REST, int(spent * num_requests / (_ASKING_SHARE * plain)))
        for request_id in asked:
            saved = self._promises.get(request_id, 0.0) * plain if request_id in drafted else 0.0
            worth = self._worth.get(request_id, 0.0)
            worth += _FOLLOW_WORTH * (saved - spent - worth)
            self._worth[request_id] = worth
            self._rest[request_id] = 0 if worth > 0 else rest

    def observe(self, request_id: str, proposer: str, draft: Draft, sampled: Sequence[int]) -> None:
        """Learn from the tokens that a step gave: each tells whether a draft token is right, up to
        the first that is wrong. It need not have been verified.
        """
        key = request_id, proposer
        better, acceptance = self._better.get(key, 0.0), self._acceptance[proposer]
        for token_id, evidence, given in zip(
            draft.token_ids, draft.evidence, sampled, strict=False
        ):
            is_right = token_id == given
            error = is_right - self._chance(*key, evidence)
            better = min(max(better + _RATE_OF_REQUEST * error, -_MOST_BETTER), _MOST_BETTER)
            self._better[key] = better
            acceptance.record(evidence, is_right)
            if not is_right:
                return
        # All that a model drafted was right: try it again.
        if proposer in self._drafting and draft.token_ids:
            self._drafting[proposer].steps_off = _ATTEMPT_STEPS

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        for proposer in self._acceptance:
            self._better.pop((request_id, proposer), None)
        self._worth.pop(request_id, None)
        self._rest.pop(request_id, None)


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

    def is_due(self, request_id: str) -> bool:
        """Proposers are asked before every step."""
        return True

    def record_asking(
        self, asked: Sequence[str], drafted: Collection[str], num_requests: int, seconds: float
    ) -> None:
        """Nothing is learned."""

    def plan(
        self, proposer: str, chances: Mapping[str, Sequence[float]], num_requests: int, limit: int
    ) -> int:
        """Every proposer drafts before every step."""
        return limit

    def is_worth(self, proposer: str, num_missed: int, num_left: int) -> bool:
        """Always."""
        return True

    def goes_on(self, proposer: str, request_id: str, draft: Draft) -> bool:
        """Drafts are as long as they may be."""
        return True

    def record_catch_up(
        self, proposer: str, num_missed: int, num_requests: int, seconds: float
    ) -> None:
        """Nothing is learned."""

    def record_drafting(
        self, proposer: str, chances: Sequence[Sequence[float]], num_requests: int, seconds: float
    ) -> None:
        """Nothing is learned."""

    def choose(self, chances: Mapping[str, Sequence[float]], num_requests: int) -> dict[str, int]:
        """All tokens of each draft."""
        return {name: len(of_draft) for name, of_draft in chances.items()}

    def observe(self, request_id: str, proposer: str, draft: Draft, sampled: Sequence[int]) -> None:
        """Nothing is learned."""


def _ranked(chances: Mapping[str, Sequence[float]]) -> list[tuple[float, str]]:
    """(chance, request_id) of all draft tokens, the best first."""
    ranked = [(chance, name) for name, of_draft in chances.items() for chance in of_draft]
    ranked.sort(key=itemgetter(0), reverse=True)
    return ranked


def _rates(
    ranked: Sequence[tuple[float, str]], num_requests: int, ratios: Sequence[float]
) -> list[float]:
    """Tokens per plain step, if the first 0, 1, … draft tokens are verified."""
    tokens = float(num_requests)
    rates = [tokens]
    for (chance, _), ratio in zip(ranked, ratios[1:], strict=False):
        tokens += chance
        rates.append(tokens / ratio)
    return rates


def _bounded(chance: float) -> float:
    return min(max(chance, _LEAST_CHANCE), 1 - _LEAST_CHANCE)
