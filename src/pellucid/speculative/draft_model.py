"""`DraftModelProposer`: a smaller model with the same vocabulary guesses the next tokens (Leviathan
et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318).

The draft model keeps its own keys and values, in the same blocks as the model's. It may be behind:
tokens of a prompt, and tokens that came while it was not asked. So a draft begins with the known
tokens that it has not computed, as many as one pass may have. A request that is then still behind
gets no draft in this step. The others are drafted together, one token of each in a pass.

A draft token is drawn as the model would draw it: by the same parameters, and with the noise of the
same seed and position. So where the two models agree on the probabilities, they draw the same token
(arXiv:2408.07978). The evidence of a token is its probability under the draft model.

This module has no arrays. `DraftRunner` computes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

from ..constraint import Constraint
from ..errors import RequestError
from ..request import Request
from .proposer import Draft

__all__ = ["DraftModelProposer", "DraftRunner", "DraftSpan", "Guess"]

_CHANCE_STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_NUM_CHANCES = len(_CHANCE_STEPS) + 1
_CATCH_UP = 32  # known tokens of a pass: it then takes longer than one that drafts


class Guess(NamedTuple):
    """A token that the draft model drew."""

    token_id: int
    probability: float  # under the draft model, at the request's temperature


@dataclass(slots=True)
class DraftSpan:
    """Tokens of one request that one pass of the draft model computes."""

    request: Request
    start: int  # the position of the first
    token_ids: list[int]
    drafts: Sequence[int] = ()  # the draft so far: token_ids are known tokens, or its last token
    constraint: Constraint | None = None  # behind the draft so far
    is_guessed: bool = True  # the token behind the last is drawn


class DraftRunner(Protocol):
    """Runs the draft model on the blocks of running requests."""

    max_tokens: int  # of one pass
    context: int  # tokens of a request that the draft model can see

    def num_missing(self, request: Request) -> int:
        """How many of the known tokens the draft model has not computed: the last ones."""
        ...

    def reserve(self, request: Request, count: int) -> int:
        """Allocate slots for the known tokens and `count` drafts. Returns for how many drafts there
        are slots; below 0: not even for the known tokens.
        """
        ...

    def compute(self, spans: Sequence[DraftSpan]) -> list[Guess | None]:
        """Compute the tokens of all spans in one pass. Returns the guesses; None where nothing was
        to be guessed, or nothing can be drawn.
        """
        ...

    def finish(self, request: Request) -> None:
        """The request has ended."""
        ...


@dataclass(slots=True)
class _Drafting:
    """One request's draft while it is made."""

    request: Request
    num_missing: int
    room: int  # tokens that its draft may have
    constraint: Constraint | None
    draft: Draft = field(default_factory=Draft)

    def take(self, guess: Guess | None) -> bool:
        """Add a guess. True if another may follow."""
        if guess is None:
            return False
        self.draft.token_ids.append(guess.token_id)
        chance = bisect_right(_CHANCE_STEPS, guess.probability)
        is_drawn = self.request.params.temperature > 0
        self.draft.evidence.append(chance + is_drawn * _NUM_CHANCES)
        if guess.token_id in self.request.stopping_token_ids:
            return False
        is_complete = self.constraint is not None and self.constraint.advance(guess.token_id)
        return not is_complete and len(self.draft.token_ids) < self.room


class DraftModelProposer:
    """Drafts with a model. Its time is measured, and the governor asks it only if it pays."""

    name = "draft"
    is_free = False
    # greedy, then drawn: a token is accepted about as often as the draft model believes in it
    priors = tuple((a + b) / 2 for a, b in pairwise((0.0, *_CHANCE_STEPS, 1.0))) * 2

    def __init__(self, runner: DraftRunner) -> None:
        self._runner = runner
        # (request_id, its draft so far) -> whether another token is worth its time
        self.goes_on: Callable[[str, Draft], bool] = lambda *_: True
        self.num_caught_up = 0  # known tokens that `propose` computed, if they were many

    def num_missed(self, request: Request) -> int:
        """How many of the known tokens the draft model has not computed."""
        return self._runner.num_missing(request)

    def propose(self, requests: Sequence[Request], limit: int) -> dict[str, Draft]:
        """See Proposer."""
        # Compute the known tokens that are missing: those of requests that miss few first.
        pending = self._begin(requests, limit)
        self.num_caught_up = 0
        left, spans, behind = self._runner.max_tokens, [], []
        for d in pending:
            # the last token is computed again if nothing is missing: the guess is drawn behind it
            start = d.request.num_tokens - max(1, d.num_missing)
            stop = min(d.request.num_tokens, start + left)
            if stop == start:
                break
            left -= stop - start
            is_guessed = stop == d.request.num_tokens
            spans.append(
                DraftSpan(
                    d.request,
                    start,
                    d.request.token_ids(start, stop),
                    constraint=d.constraint,
                    is_guessed=is_guessed,
                )
            )
            behind.append(d)
        num_known = self._runner.max_tokens - left
        if num_known >= _CATCH_UP + len(spans):
            self.num_caught_up = num_known
        drafting = self._pass(behind, spans)
        # Draft the other tokens, one of each request in a pass.
        for _ in range(1, limit):
            if not drafting:
                break
            spans = [
                DraftSpan(
                    d.request,
                    d.request.num_tokens + len(d.draft.token_ids) - 1,
                    d.draft.token_ids[-1:],
                    d.draft.token_ids,
                    d.constraint,
                )
                for d in drafting
            ]
            drafting = self._pass(drafting, spans)
        return {d.request.request_id: d.draft for d in pending if d.draft.token_ids}

    def _begin(self, requests: Sequence[Request], limit: int) -> list[_Drafting]:
        """The requests that may have a draft, with slots for it; those that miss least first."""
        found = []
        for request in requests:
            room = min(
                limit,
                request.max_tokens - len(request.output_token_ids) - 1,
                self._runner.context - request.num_tokens,
            )
            if room < 1:
                continue
            room = self._runner.reserve(request, room)
            if room < 1:
                continue
            constraint = None if request.constraint is None else request.constraint.copy()
            missing = self._runner.num_missing(request)
            found.append(_Drafting(request, missing, room, constraint))
        found.sort(key=lambda d: d.num_missing)
        return found

    def _pass(self, drafting: Sequence[_Drafting], spans: Sequence[DraftSpan]) -> list[_Drafting]:
        """Compute the spans, which are those of `drafting`. Returns the requests that go on."""
        if not spans:
            return []
        guesses = self._runner.compute(spans)
        going_on = []
        for d, guess in zip(drafting, guesses, strict=True):
            try:
                if d.take(guess) and self.goes_on(d.request.request_id, d.draft):
                    going_on.append(d)
            except RequestError:  # its constraint cannot be computed: the model will say so
                continue
        return going_on

    def finish(self, request: Request) -> None:
        """See Proposer."""
        self._runner.finish(request)
