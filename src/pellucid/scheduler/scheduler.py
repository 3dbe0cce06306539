"""Chooses the requests of the next step: continuous batching over two counters, a token budget, and
preemption.

A step computes some of `num_tokens - num_computed_tokens` of each running request. This subtraction
covers a chunk of a long prompt, one token of an answer, and the tokens that remain after a prefix
hit or a preemption. So all of them can share a step (Orca, OSDI 2022; Sarathi-Serve,
arXiv:2403.02310). `schedule()` plans, the model runner computes, `update()` records. The scheduler
sees no arrays and no clock.

A step is planned in this order. First come the running requests, by rank. Each gets slots in the
cache, if necessary by preempting the last in rank, so the first in rank always advances. One token
of the budget is reserved for each request that decodes, so no prompt delays an answer. Then, if no
request was preempted, come the waiting requests, in the order of the policy, while there is room.

Under the policy `priority` a waiting request is planned before running requests with a larger
priority number. If `max_num_seqs` requests run already, or no blocks are left, it preempts the last
in rank. Equal priorities never preempt each other, and a preempted request comes back by rank, so
two requests never preempt each other in turns.

A request that decodes may have drafts (`draft_token_ids`), which are computed behind its last known
token. Drafts come last in the plan: they get the tokens and blocks that all others leave, so no
prompt waits for a draft and nobody is preempted for one. `update` takes the accepted tokens.
Rejected drafts need no rollback: the counter of computed tokens stops before them, and the blocks
behind it are given back.

`batching` says when waiting requests may join. continuous: at every step. static: when no request
runs; as many as fit form a batch, which runs until its last request has ended. dynamic: like
static, but the requests of a batch have similar lengths, so that they end together.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..batch import BlockOp
from ..engine_config import Batching, SchedulingPolicy
from ..errors import PromptTooLongError, RequestError
from ..kv.manager import Hit, KVCacheManager
from ..outputs import FinishReason
from ..request import Request, RequestStatus
from .events import MAX_EVENTS, Event, EventKind
from .waiting import WaitingQueue

__all__ = ["ScheduledStep", "Scheduler"]

# how many requests a step skips because another request is computing their prefix
_MOST_PASSED_OVER = 64


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The model runner's plan: block operations, in order, then the requests as one batch.

    Each request has its part of the plan: `num_scheduled_tokens`, and the `block_tables` of its
    keys and values. Both are valid until the next step is planned.
    """

    requests: list[Request]
    block_ops: list[BlockOp] = field(default_factory=list)


class Scheduler:
    """Owns the queue, the running requests, and each request's status."""

    def __init__(
        self,
        kv: KVCacheManager,
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        policy: SchedulingPolicy = "fcfs",
        batching: Batching = "continuous",
        max_num_scored: int | None = None,
        max_waiting_requests: int | None = None,
        max_waiting_tokens: int | None = None,
    ) -> None:
        if kv.capacity(max_num_batched_tokens, max_model_len) < max_model_len:
            raise AssertionError(
                f"a request of max_model_len, {max_model_len} tokens, does not fit in the KV cache"
            )
        self.kv = kv
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        # prompt tokens of a step whose logprobs are asked for: each takes a row of logits
        self.max_num_scored = max_num_scored or max_num_batched_tokens
        self.batching = batching
        self.waiting = WaitingQueue(
            policy, lambda r: kv.lookup(r).num_tokens, max_waiting_requests, max_waiting_tokens
        )
        self.running: list[Request] = []  # by rank
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of requests that were admitted
        self.num_cached_tokens = 0  # how many of them hit the cache
        self._step = 0
        self._num_scored = 0  # prompt tokens whose logprobs this step computes
        self._arrivals = 0

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise RequestError for a request that could never run."""
        for request in requests:
            if not request.prompt_token_ids:
                raise RequestError("the prompt is empty; it must hold at least one token")
            most = self.max_model_len - (request.pooling is None)  # an output has a token or more
            if request.num_tokens > most:
                room = "with room for one more " if request.pooling is None else ""
                raise PromptTooLongError(
                    f"the prompt has {request.num_tokens} tokens; {room}it must be at most {most} "
                    f"(max_model_len is {self.max_model_len})"
                )

    def add(self, *requests: Request) -> None:
        """Queue all or none. RequestError: one could never run. QueueFullError: no room."""
        self.check(requests)
        self.waiting.check_room(len(requests), sum(r.num_tokens for r in requests))
        for request in requests:
            request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
            request.queued_step = self._step
            self.waiting.enter(request)
            self.waiting.push(request)
        self._log("add", requests, [r.num_tokens for r in requests])

    def schedule(self) -> ScheduledStep:
        """Plan the next step; empty if no requests are left."""
        self._step += 1
        self._num_scored = 0
        self.kv.begin_step()
        planned: list[Request] = []
        num_preemptions = self.num_preemptions
        left = self._plan_running(planned)
        if self.waiting.num_tokens and self.num_preemptions == num_preemptions:
            left = self._plan_waiting(planned, left)
        self._plan_drafts(planned, left)
        if planned:
            self._log("schedule", planned, [r.num_scheduled_tokens for r in planned])
        elif self.num_unfinished:
            raise AssertionError("requests are left, and none of them can run")
        return ScheduledStep(planned, self.kv.take_ops())

    def _plan_running(self, planned: list[Request]) -> int:
        """Schedule the tokens of the running requests. Returns the rest of the budget."""
        left = self.max_num_batched_tokens
        by_priority = self.waiting.policy == "priority" and self.batching == "continuous"
        # Preemption removes from the end of the list, so the loop's earlier entries stay in place.
        for i, request in enumerate(self.running):
            if not left:
                break
            if by_priority and self.waiting.outranks(request):
                urgent = self._admit_urgent(i, left, planned)
                if urgent is not None:
                    planned.append(urgent)
                    left -= urgent.num_scheduled_tokens
                    continue  # `request`, if it still runs, is now one place further down
                by_priority = False
                if request.status is not RequestStatus.RUNNING:
                    break
            # Count its tokens: one if it decodes, else what the budget allows.
            computed, count = request.num_computed_tokens, 1
            if not request.is_decoding:
                count = min(request.num_tokens - computed, left - self._num_decoding(i + 1))
                count = self._limit_scored(request, computed, count)
                if count < 1:
                    continue
            # Allocate their slots.
            if computed + count > request.next_kv_event:
                while not self._allocate_slots(request, count, planned):
                    victim = self.running[-1]
                    self._preempt(victim)
                    if victim is request:
                        return left
            self._set_scheduled(request, count)
            planned.append(request)
            left -= count
        return left

    def _limit_scored(self, request: Request, computed: int, count: int) -> int:
        """`count`, or fewer tokens, so that this step has rows of logits for those it scores."""
        excess = self._num_scored + len(request.scored(computed, computed + count))
        excess -= self.max_num_scored
        if excess <= 0:
            return count
        return min(count, request.num_prompt_tokens - 1 - computed) - excess

    def _set_scheduled(self, request: Request, count: int) -> None:
        request.num_scheduled_tokens = count
        if request.params.prompt_logprobs is not None:
            computed = request.num_computed_tokens
            self._num_scored += len(request.scored(computed, computed + count))

    def _num_decoding(self, first: int) -> int:
        """How many requests decode, from rank `first` on: each needs one token."""
        return sum(r.is_decoding for r in self.running[first:])

    def _allocate_slots(self, request: Request, count: int, planned: Sequence[Request]) -> bool:
        """Allocate slots for known tokens, if necessary those that drafts have."""
        return self.kv.allocate_slots(request, count) or (
            self._take_from_drafts(planned) and self.kv.allocate_slots(request, count)
        )

    def _admit(self, request: Request, hit: Hit, count: int, planned: Sequence[Request]) -> bool:
        """Give a waiting request its blocks, if necessary those that drafts have."""
        return self.kv.admit(request, hit, count) or (
            self._take_from_drafts(planned) and self.kv.admit(request, hit, count)
        )

    def _take_from_drafts(self, planned: Sequence[Request]) -> bool:
        """Give back blocks that a draft model took before this step. False if there are none."""
        needed = {r.request_id: r.num_computed_tokens for r in self.running}
        for request in planned:
            needed[request.request_id] += request.num_scheduled_tokens
        return any([self.kv.give_back_slots(r, needed[r.request_id]) for r in self.running])

    def _plan_drafts(self, planned: list[Request], left: int) -> None:
        """Add drafts to the requests of this step that decode, while tokens and blocks are left."""
        for request in planned:
            if not left:
                return
            if not request.draft_token_ids:
                continue
            # The last token of an answer is sampled, never computed.
            room = request.max_tokens - len(request.output_token_ids) - 1
            count = min(len(request.draft_token_ids), room, left)
            stop = request.num_computed_tokens + 1 + count
            if stop <= request.next_kv_event or self.kv.allocate_slots(request, 1 + count):
                request.num_scheduled_tokens = 1 + count
                left -= count

    def _admit_urgent(self, place: int, left: int, planned: Sequence[Request]) -> Request | None:
        """Admit the first waiting request before the running ones from `place` on, which have a
        lower priority; preempt the last in rank until it fits. None if it cannot start.
        """
        urgent = self.waiting.requests()[0]
        while True:
            hit = self.kv.lookup(urgent)
            count = min(urgent.num_tokens - hit.num_tokens, left - self._num_decoding(place))
            count = self._limit_scored(urgent, hit.num_tokens, count)
            if count < 1 or self._is_being_computed(urgent, hit):
                return None
            if len(self.running) < self.max_num_seqs and self._admit(urgent, hit, count, planned):
                break
            if len(self.running) == place:
                return None
            self._preempt(self.running[-1])
        self._start(urgent)
        self._set_scheduled(urgent, count)
        return urgent

    def _plan_waiting(self, planned: list[Request], left: int) -> int:
        """Admit waiting requests while tokens, `max_num_seqs` and blocks allow it. Returns the rest
        of the budget.
        """
        if self.batching != "continuous" and self.running:
            return left
        passed_over: set[str] = set()
        first: Request | None = None
        while (
            left and len(self.running) < self.max_num_seqs and len(passed_over) < _MOST_PASSED_OVER
        ):
            # Choose the next request by the policy.
            if first is not None and self.batching == "dynamic":
                request = self.waiting.nearest(first.num_tokens, passed_over)
            else:
                request = self.waiting.first(self._step, passed_over)
            if request is None:
                break
            # Skip it if a running request computes its prefix: it will hit that prefix later.
            hit = self.kv.lookup(request)
            if self._is_being_computed(request, hit):
                passed_over.add(request.request_id)
                continue
            # Start it with the rest of the budget.
            count = min(request.num_tokens - hit.num_tokens, left)
            count = self._limit_scored(request, hit.num_tokens, count)
            if count < 1 or not self._admit(request, hit, count, planned):
                break
            first = first or request
            self._start(request)
            self._set_scheduled(request, count)
            planned.append(request)
            left -= count
        return left

    def _is_being_computed(self, request: Request, hit: Hit) -> bool:
        """True if a running request is computing the first block that this one did not hit."""
        stop = (hit.num_tokens // self.kv.layout.block_size + 1) * self.kv.layout.block_size
        if not self.kv.enable_prefix_caching or stop > request.num_reusable:
            return False
        beginning: list[int] | None = None
        for other in self.running:
            if (
                other.num_computed_tokens < stop <= other.num_prompt_tokens
                and other.cache_salt == request.cache_salt
            ):
                beginning = beginning or request.token_ids(0, stop)
                if other.prompt_token_ids[:stop] == beginning:
                    return True
        return False

    def _start(self, request: Request) -> None:
        is_new = request.status is RequestStatus.WAITING
        self._log("admit" if is_new else "resume", [request], [request.num_computed_tokens])
        self.waiting.remove(request)
        if is_new:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_tokens += request.num_cached_tokens
            self.waiting.charge(request, request.num_prompt_tokens, 0)
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self.running.sort(key=self.waiting.rank)

    def retry(self, step: ScheduledStep) -> None:
        """Undo a step whose blocks could not be loaded, so that it computed nothing. The blocks'
        content may be wrong: its requests start again, and all published prefixes are dropped.
        """
        self.kv.forget()
        for request in reversed(step.requests):
            self._preempt(request, publish=False)

    def _preempt(self, request: Request, *, publish: bool = True) -> None:
        """Put a running request back into the queue. Its published blocks can still be hit."""
        self._log("preempt", [request], [request.num_computed_tokens])
        self.running.remove(request)
        self.kv.release(request, publish=publish)
        request.num_computed_tokens = 0
        self.num_preemptions += 1
        request.is_decoding, request.draft_token_ids = False, []
        request.status = RequestStatus.PREEMPTED
        request.queued_step = self._step
        self.waiting.push(request)

    def update(
        self,
        step: ScheduledStep,
        sampled: Mapping[str, Sequence[int]],
        read: Callable[[Request, int, FinishReason | None], bool] | None = None,
    ) -> None:
        """Record a step's results. `sampled` has the new tokens of each request that sampled: the
        accepted drafts and one more. A request takes them one by one, until a stop token, its
        length or `read` ends it. `read(request, token_id, finish_reason)` returns True if the text
        now holds a stop string. A request for an embedding ends when its prompt is computed.
        """
        finished, is_fair = RequestStatus.FINISHED, self.waiting.policy == "fair"
        for request in step.requests:
            if request.status is finished:  # it failed, or was aborted, while the step ran
                continue
            request.num_computed_tokens += request.num_scheduled_tokens
            reason: FinishReason | None = None
            token_ids = sampled.get(request.request_id)
            if token_ids is not None:
                # Take the tokens.
                output = request.output_token_ids
                for token_id in token_ids:
                    output.append(token_id)
                    if is_fair:
                        self.waiting.charge(request, 0, 1)
                    if (
                        token_id in request.stopping_token_ids
                        and len(output) >= request.params.min_tokens
                    ):
                        if token_id not in request.eos_token_ids or request.params.ignore_eos:
                            request.stop_reason = token_id
                        reason = "stop"
                    elif len(output) >= request.max_tokens:
                        reason = "length"
                    if read is not None and read(request, token_id, reason):
                        reason = reason or "stop"
                    if reason is not None:
                        break
                # All known tokens but the last are computed. Slots of rejected drafts lie behind
                # the counter: they are never published, and will be overwritten.
                if request.draft_token_ids:
                    request.num_computed_tokens = request.num_tokens - 1
                    request.draft_token_ids = []
                    self.kv.give_back_slots(request, request.num_computed_tokens)
                request.is_decoding = True
            elif request.pooling is not None and request.num_computed_tokens == request.num_tokens:
                reason = "stop"
            if request.num_computed_tokens >= request.next_kv_event:
                self.kv.publish(request)
            if reason is not None:
                self.finish(request, reason)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a running or waiting request and free its blocks. Does nothing if it is finished."""
        if request.is_finished:
            return
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        self.kv.release(request, publish=reason != "error")
        self.waiting.leave(request)
        self._log("finish", [request], [request.num_tokens])

    def _log(self, kind: EventKind, requests: Sequence[Request], num_tokens: Sequence[int]) -> None:
        self.events.append(
            Event(self._step, kind, tuple([r.request_id for r in requests]), tuple(num_tokens))
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if requests, blocks and counts are inconsistent."""
        self.kv.check_integrity()
        if len(self.running) > self.max_num_seqs:
            raise AssertionError(f"{len(self.running)} run, and at most {self.max_num_seqs} may")
        if {r.request_id for r in self.running} != self.kv.holders():
            raise AssertionError("other requests hold blocks than those that run")
        if any(r.is_decoding and r.num_tokens - r.num_computed_tokens != 1 for r in self.running):
            raise AssertionError("a request that decodes has more to compute than its last token")
        if any(r not in self.waiting for r in self.waiting.requests()):
            raise AssertionError("the waiting queue is not in order")
        waiting = self.waiting.requests()
        if self.waiting.num_tokens != sum(r.num_tokens for r in waiting):
            raise AssertionError("the waiting queue counts its tokens wrongly")
        if self.waiting.num_preempted != sum(r.status is RequestStatus.PREEMPTED for r in waiting):
            raise AssertionError("the waiting queue counts the preempted wrongly")
