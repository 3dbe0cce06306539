"""The receipt on numbers: seconds saved or lost against plain decoding, for one request and many,
beside prefill, and with a draft model's time.
"""

from collections.abc import Sequence

import pytest

from pellucid.request import Request
from pellucid.sampling_params import SamplingParams
from pellucid.speculative import Speculation
from pellucid.speculative.governor import VerifyAll
from pellucid.speculative.proposer import Draft

ROW = 0.25  # seconds of a draft token in a step
DRAFTING = 0.125  # seconds


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Guessing:
    """Drafts three tokens for some requests."""

    name, priors = "guesses", (0.5,)

    def __init__(self, clock: Clock, is_free: bool, left_out: str = "") -> None:
        self._clock, self.is_free, self._left_out = clock, is_free, left_out

    def propose(self, requests: Sequence[Request], limit: int) -> dict[str, Draft]:
        self._clock.now += DRAFTING
        return {
            r.request_id: Draft([1, 2, 3], [0, 0, 0])
            for r in requests
            if r.request_id != self._left_out
        }

    def finish(self, request: Request) -> None:
        """Nothing is kept."""


class Steps:
    """Runs the steps of requests that decode: a plain step of n requests takes n seconds."""

    def __init__(self, names: str, *, is_free: bool = True, left_out: str = "") -> None:
        self.clock = Clock()
        self.proposer = Guessing(self.clock, is_free, left_out)
        self.speculation = Speculation([self.proposer], 10, governor=VerifyAll())
        self.requests = [
            Request(
                request_id=name,
                prompt_token_ids=[5],
                params=SamplingParams(),
                seed=0,
                max_tokens=10_000,
            )
            for name in names
        ]
        for request in self.requests:
            request.output_token_ids, request.num_computed_tokens = [6], 1
            request.is_decoding = True
        self.others: list[Request] = []  # whose prompts are computed in the same steps

    def run(self, accepted: dict[str, int], *, extra: float = 0.0, plain: bool = False) -> None:
        self.speculation.propose(self.requests, self.clock)
        rows, sampled = 0, {}
        for request in self.requests:
            if plain:
                request.draft_token_ids = []
            request.num_scheduled_tokens = 1 + len(request.draft_token_ids)
            rows += len(request.draft_token_ids)
            right = min(accepted[request.request_id], len(request.draft_token_ids))
            sampled[request.request_id] = [*range(1, 1 + right), 9 if right < 3 else 4]
        seconds = len(self.requests) + ROW * rows + extra
        self.speculation.observe([*self.requests, *self.others], sampled, seconds)
        for request in self.requests:
            request.output_token_ids += sampled[request.request_id]
            request.num_computed_tokens = request.num_tokens - 1
            request.draft_token_ids = []

    def saved(self, name: str | None = None) -> float:
        one = None if name is None else [r for r in self.requests if r.request_id == name]
        return self.speculation.receipt(one).seconds_saved


def test_one_request_saves_its_accepted_tokens_less_their_rows() -> None:
    steps = Steps("a")
    steps.run({"a": 0}, plain=True)
    steps.run({"a": 2})
    # three tokens in 1.75 s instead of 3 s
    assert steps.saved("a") == pytest.approx(1.25)
    steps.run({"a": 0})
    assert steps.saved("a") == steps.saved() == pytest.approx(1.25 - 0.75)
    assert steps.speculation.receipt().reason.startswith("on: ")


def test_in_a_batch_each_waits_for_the_rows_of_all() -> None:
    steps = Steps("abcd", left_out="d")
    steps.run(dict.fromkeys("abcd", 0), plain=True)
    steps.run({"a": 3, "b": 1, "c": 0, "d": 0})
    # a plain step takes 4 s; nine draft tokens cost 2.25 s more, for all
    saved = [steps.saved(name) for name in "abcd"]
    assert saved == pytest.approx([3 * 4 - 2.25, 1 * 4 - 2.25, -2.25, -2.25])
    # the engine gave 8 tokens in 6.25 s, which would have taken two plain steps
    assert steps.saved() == pytest.approx(2 * 4 - 6.25) == sum(saved) / 4
    receipt = steps.speculation.receipt(steps.requests)
    assert receipt.num_accepted_tokens == 4 and receipt.num_draft_tokens == 9


def test_beside_a_prompt_the_rows_are_counted_and_the_prompt_is_not() -> None:
    steps = Steps("a")
    for _ in range(200):
        steps.run({"a": 0}, plain=True)
        steps.run({"a": 0})
    before = steps.saved()
    steps.others = [
        Request(request_id="p", prompt_token_ids=[1] * 9, params=SamplingParams(), seed=0)
    ]
    steps.run({"a": 2}, extra=7.0)
    assert steps.saved() - before == pytest.approx(2 * 1 - 0.75, rel=0.05)


def test_the_time_of_a_draft_model_is_lost_first() -> None:
    free, paid = Steps("a"), Steps("a", is_free=False)
    for steps in (free, paid):
        steps.run({"a": 0}, plain=True)
        before = steps.saved()
        steps.run({"a": 2})
        steps.gain = steps.saved() - before  # type: ignore[attr-defined]
    assert free.gain - paid.gain == pytest.approx(DRAFTING)  # type: ignore[attr-defined]


def count_asked(asking: float, accepted: int) -> tuple[int, Steps]:
    """How often a free proposer is asked in 400 steps, if asking takes so many seconds."""
    steps = Steps("a")
    asked = 0

    def propose(requests: Sequence[Request], limit: int) -> dict[str, Draft]:
        nonlocal asked
        asked += 1
        steps.clock.now += asking
        return {r.request_id: Draft([1, 2, 3], [0, 0, 0]) for r in requests}

    steps.speculation = Speculation([steps.proposer], 10)
    steps.proposer.propose = propose  # type: ignore[method-assign]
    for _ in range(400):
        steps.run({"a": accepted})
    return asked, steps


def test_a_lookup_that_gains_nothing_takes_a_small_share_of_the_time() -> None:
    """A plain step takes a second."""
    asked, _ = count_asked(0.02, accepted=0)
    assert asked < 400 / 8 + 20
    asked, _ = count_asked(0.002, accepted=0)
    assert asked > 390  # it takes less than that share anyway


def test_a_lookup_that_pays_is_asked_before_every_step() -> None:
    asked, steps = count_asked(0.02, accepted=3)
    assert asked > 380 and steps.saved() > 100
