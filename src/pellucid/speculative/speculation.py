"""One engine's speculation: asks the proposers, lets the governor choose, and keeps the receipts.

Before a step, `propose` sets the `draft_token_ids` of the requests that decode. The scheduler and
the model runner do the rest: they verify drafts like any other tokens (decision 34). After the
step, `observe` learns from what was sampled.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

from ..errors import EngineError
from ..outputs import SpeculationReceipt
from ..request import Request
from .draft_model import DraftModelProposer
from .governor import Governor
from .proposer import Draft, Proposer, check_drafts

__all__ = ["Speculation"]

_log = logging.getLogger(__name__)

_ON = "on: the drafts promise more than their verification costs"
_OFF = "off: the drafts promise less than their verification costs"
_NO_DRAFT = "off: nothing like its last tokens was seen before"
_NO_MODEL = "off: a draft of the model would take longer than it saves"
_UNKNOWN = "off: no step of so many requests was measured yet"
_FULL = "off: so many requests run together that a further row costs what it gives"

MAX_DRAFT_TOKENS = 15  # a step of one request then fills a tile of 16 rows


@dataclass(slots=True)
class _Receipt:
    """What speculation did for one request."""

    num_steps: int = 0  # in which it decoded
    num_drafts: int = 0  # steps with drafts
    drafted: list[int] = field(default_factory=list)  # tokens, by their place in the draft
    accepted: list[int] = field(default_factory=list)
    seconds_saved: float = 0.0
    draft_seconds: float = 0.0

    reason: str = ""  # why drafts were, or were not, verified in its last step

    def add(self, num_drafted: int, num_accepted: int) -> None:
        self.num_steps += 1
        if not num_drafted:
            return
        self.num_drafts += 1
        missing = num_drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for i in range(num_drafted):
            self.drafted[i] += 1
        for i in range(num_accepted):
            self.accepted[i] += 1

    def take_back(self, num_accepted: int, num_left_over: int, seconds: float) -> None:
        """The last of the tokens that the last step accepted came too late. Each would have saved
        `seconds`.
        """
        for i in range(num_accepted - num_left_over, num_accepted):
            self.accepted[i] -= 1
        self.seconds_saved -= seconds * num_left_over


class Speculation:
    """Drafts for the requests of one engine."""

    def __init__(
        self,
        proposers: Sequence[Proposer],
        vocab_size: int,
        *,
        num_speculative_tokens: int | None = None,
        governor: Governor | None = None,
    ) -> None:
        """At most `num_speculative_tokens` are drafted for a request and step; None: 15. Of several
        proposers' drafts, the one that promises most is taken.
        """
        self._proposers = {proposer.name: proposer for proposer in proposers}
        self._vocab_size = vocab_size
        self._limit = num_speculative_tokens or MAX_DRAFT_TOKENS
        self._governor = governor or Governor({p.name: p.priors for p in proposers})
        self._drafts: dict[str, dict[str, Draft]] = {}  # of this step: proposer -> request_id
        self._receipts: dict[str, _Receipt] = {}
        self._total = _Receipt()
        self._draft_seconds = 0.0  # in this step, of proposers that are not free
        # of the last step: what an accepted token saved its request, and all on average
        self._saved_seconds = 0.0, 0.0
        # who got drafts in it: the tokens they then have if they take all, and those accepted
        self._gains: list[tuple[Request, _Receipt, int, int]] = []

    @property
    def proposers(self) -> list[Proposer]:
        """The proposers that are asked."""
        return list(self._proposers.values())

    def propose(self, decoding: Sequence[Request], clock: Callable[[], float]) -> None:
        """Set the drafts of the requests that decode, for the next step. `clock` returns seconds;
        drafts that a model makes are timed.
        """
        self._drafts, self._draft_seconds = {}, 0.0
        for request in decoding:
            if request.draft_token_ids:
                request.draft_token_ids = []
        if not decoding:
            return
        num_requests, began = len(decoding), clock()
        if not self._governor.may_pay(num_requests):
            is_known = self._governor.costs.ratios(num_requests) is not None
            for request in decoding:
                self._set_reason(request, _FULL if is_known else _UNKNOWN)
            return
        due = [request for request in decoding if self._governor.is_due(request.request_id)]
        if not due:
            return
        # Ask the proposers that are free, then those that promise to be worth their time.
        best: dict[str, tuple[Draft, list[float]]] = {}
        for name, proposer in sorted(self._proposers.items(), key=lambda pair: not pair[1].is_free):
            if proposer.is_free:
                self._ask(name, due, self._limit, best)
                continue
            chances = {r: found for r, (_, found) in best.items()}
            limit = self._governor.plan(name, chances, num_requests, self._limit)
            try:
                asked = self._worth_asking(proposer, due) if limit else []
            except Exception as error:
                self._drop(name, error)
                continue
            if asked:
                if isinstance(proposer, DraftModelProposer):
                    limit = min(2 * limit, self._limit)  # it ends where it does not pay
                start = clock()
                made = self._ask(name, asked, limit, best)
                seconds = clock() - start
                self._draft_seconds += seconds
                self._record_drafting(proposer, made, num_requests, seconds)
        # Let the governor cut them.
        is_all_free = all(proposer.is_free for proposer in self._proposers.values())
        chances = {r: found for r, (_, found) in best.items()}
        counts = self._governor.choose(chances, num_requests) if best else {}
        asking = clock() - began - self._draft_seconds
        names = [request.request_id for request in due]
        self._governor.record_asking(names, counts, num_requests, asking)
        for request in due:
            name = request.request_id
            if name in counts:
                request.draft_token_ids = best[name][0].token_ids[: counts[name]]
                self._set_reason(request, _ON)
            else:
                no_draft = _NO_DRAFT if is_all_free else _NO_MODEL
                self._set_reason(request, _OFF if name in best else no_draft)

    def _worth_asking(self, proposer: Proposer, due: Sequence[Request]) -> Sequence[Request]:
        """The requests for which a proposer that is not free should draft."""
        if not isinstance(proposer, DraftModelProposer):
            return due
        proposer.goes_on = partial(self._governor.goes_on, proposer.name)
        return [
            request
            for request in due
            if self._governor.is_worth(
                proposer.name,
                proposer.num_missed(request),
                request.max_tokens - len(request.output_token_ids),
            )
        ]

    def _record_drafting(
        self, proposer: Proposer, made: Sequence[Sequence[float]], num_requests: int, seconds: float
    ) -> None:
        """Learn from the time of a proposer that is not free. Where a draft model caught up, that
        took most of it.
        """
        num_missed = proposer.num_caught_up if isinstance(proposer, DraftModelProposer) else 0
        if num_missed:
            self._governor.record_catch_up(proposer.name, num_missed, num_requests, seconds)
        else:
            self._governor.record_drafting(proposer.name, made, num_requests, seconds)

    def _set_reason(self, request: Request, reason: str) -> None:
        self._receipt_of(request).reason = self._total.reason = reason

    def _receipt_of(self, request: Request) -> _Receipt:
        receipt = self._receipts.get(request.request_id)
        if receipt is None:
            receipt = self._receipts[request.request_id] = _Receipt()
        return receipt

    def _ask(
        self,
        name: str,
        decoding: Sequence[Request],
        limit: int,
        best: dict[str, tuple[Draft, list[float]]],
    ) -> list[list[float]]:
        """Ask a proposer; put the drafts that promise more into `best`. Returns the chances of all
        its drafts.
        """
        proposer = self._proposers[name]
        try:
            drafts = check_drafts(
                proposer.propose(decoding, limit),
                decoding,
                self._vocab_size,
                len(proposer.priors),
                limit,
            )
        except Exception as error:
            self._drop(name, error)
            return []
        self._drafts[name] = drafts
        made = []
        for request_id, draft in drafts.items():
            chances = self._governor.chances(request_id, name, draft)
            made.append(chances)
            if request_id not in best or sum(chances) >= sum(best[request_id][1]):
                best[request_id] = draft, chances
        return made

    def _drop(self, name: str, error: Exception) -> None:
        """Ask a proposer no more. Only its drafts are lost."""
        what = str(error) if isinstance(error, EngineError) else f"it raised {error!r:.300}"
        _log.warning("%s drafts no more tokens, because it is wrong: %s", name, what)
        del self._proposers[name]

    def observe(
        self, requests: Sequence[Request], sampled: Mapping[str, Sequence[int]], seconds: float
    ) -> None:
        """A step of these requests took so many seconds and gave these tokens. Call it before the
        scheduler takes the tokens.
        """
        self._take_back()
        # Learn what rows cost. Only steps in which all requests decode tell.
        costs = self._governor.costs
        decoding = [request for request in requests if request.is_decoding]
        if not decoding:
            return
        num_requests = len(decoding)
        num_drafts = sum([request.num_scheduled_drafts for request in decoding])
        is_alone = num_requests == len(requests)
        if is_alone:
            costs.record(num_requests, num_drafts, seconds)
        # Most steps have nothing to learn from.
        if not (num_drafts or self._drafts or self._draft_seconds):
            for request in decoding:
                self._receipt_of(request).num_steps += 1
            self._total.num_steps += num_requests
            return
        # What did the drafts cost?
        plain, ratios = costs.plain_seconds(num_requests), costs.ratios(num_requests)
        spent = self._draft_seconds
        if plain is None or ratios is None:
            plain = 0.0
        elif num_drafts:
            last = min(num_drafts, len(ratios) - 1)
            spent += seconds - plain if is_alone else plain * (ratios[last] - 1)
        self._saved_seconds = plain, plain / num_requests
        # Learn from the guesses, and add to the receipts. A request would have waited a plain step
        # for each accepted token.
        sum_accepted = 0
        for request in decoding:
            given = sampled.get(request.request_id, ())
            for name, drafts in self._drafts.items():
                if request.request_id in drafts:
                    draft = drafts[request.request_id]
                    self._governor.observe(request.request_id, name, draft, given)
            num_accepted = max(0, len(given) - 1)
            sum_accepted += num_accepted
            receipt = self._receipt_of(request)
            receipt.seconds_saved += plain * num_accepted - spent
            receipt.draft_seconds += self._draft_seconds
            if num_accepted:
                num_tokens = len(request.output_token_ids) + len(given)
                self._gains.append((request, receipt, num_tokens, num_accepted))
            for sums in (receipt, self._total):
                sums.add(request.num_scheduled_drafts, num_accepted)
        self._total.draft_seconds += self._draft_seconds
        self._total.seconds_saved += plain * sum_accepted / num_requests - spent
        self._drafts = {}

    def _take_back(self) -> None:
        """Where a request ended before the last tokens of the last step, by a stop string or its
        constraint, they count as rejected.
        """
        for request, receipt, num_tokens, num_accepted in self._gains:
            left_over = min(num_tokens - len(request.output_token_ids), num_accepted)
            if request.is_finished and left_over > 0:
                for sums, seconds in zip((receipt, self._total), self._saved_seconds, strict=True):
                    sums.take_back(num_accepted, left_over, seconds)
        self._gains = []

    def receipt(self, requests: Sequence[Request] | None = None) -> SpeculationReceipt:
        """What speculation did for these requests; None: for all since the start."""
        self._take_back()
        if requests is None:
            return _sum([self._total])
        return _sum(
            [self._receipts[r.request_id] for r in requests if r.request_id in self._receipts]
        )

    def finish(self, request: Request) -> None:
        """The request has ended."""
        for name, proposer in list(self._proposers.items()):
            try:
                proposer.finish(request)
            except Exception as error:
                self._drop(name, error)
        self._governor.forget(request.request_id)
        self._receipts.pop(request.request_id, None)


def _sum(receipts: Sequence[_Receipt]) -> SpeculationReceipt:
    drafted = [sum(n) for n in zip_longest(*(r.drafted for r in receipts), fillvalue=0)]
    accepted = [sum(n) for n in zip_longest(*(r.accepted for r in receipts), fillvalue=0)]
    return SpeculationReceipt(
        num_steps=sum(r.num_steps for r in receipts),
        num_drafts=sum(r.num_drafts for r in receipts),
        num_draft_tokens_per_position=tuple(drafted),
        num_accepted_tokens_per_position=tuple(accepted),
        seconds_saved=sum(r.seconds_saved for r in receipts),
        draft_seconds=sum(r.draft_seconds for r in receipts),
        reason=receipts[0].reason if receipts else "",
    )
