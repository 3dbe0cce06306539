"""Who runs in the next step: continuous batching over two counters, a token budget, and preemption.

One idea: a step computes some of `num_tokens - num_computed_tokens` of each running request. A
chunk of a long prompt, one token of an answer and what is left after a prefix hit or a preemption
are the same subtraction, so they share a step (Orca, OSDI 2022; Sarathi-Serve, arXiv:2403.02310).
`schedule()` plans, the model runner computes, `update()` books.

A step in order: those that run, by rank, each getting room in the cache, if need be by preempting
the last in rank; so whoever is first in rank always advances. One token is set aside for each that
decodes, so that no prompt delays an answer. Then, where nobody was preempted, those that wait, in
the order of the policy, while there is room.

`batching` says when those that wait may join. continuous: at every step. static: when nobody runs,
as many as fit, and the batch is held until its last has ended. dynamic: the same, but of lengths
that are alike, so that they end together: the ways of the textbook, to be measured beside each
other.

The scheduler sees no arrays and no clock.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..batch import BlockOp
from ..config import Batching, SchedulingPolicy
from ..errors import RequestError
from ..kv.manager import Hit, KVCacheManager
from ..request import FinishReason, Request, RequestStatus
from .events import MAX_EVENTS, Event, EventKind
from .waiting import WaitingQueue

__all__ = ["ScheduledStep", "Scheduler"]

# of those that wait for a prefix which somebody computes: looked at in one step
_MOST_PASSED_OVER = 64


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The plan of one step: what the model runner executes. First the ops on blocks, in order, then
    all requests as one batch.

    What each computes is its `num_scheduled_tokens`, and where its keys and values lie its
    `block_tables`, until the next step is planned.
    """

    requests: list[Request]
    block_ops: list[BlockOp] = field(default_factory=list)


class Scheduler:
    """Owns the queue, those that run, and each request's status."""

    def __init__(
        self,
        kv: KVCacheManager,
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        policy: SchedulingPolicy = "fcfs",
        batching: Batching = "continuous",
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
        self.batching = batching
        self.waiting = WaitingQueue(
            policy, lambda r: kv.lookup(r).num_tokens, max_waiting_requests, max_waiting_tokens
        )
        self.running: list[Request] = []  # by rank
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of requests that were admitted
        self.num_cached_tokens = 0  # of those, how many the cache had
        self._step = 0
        self._arrivals = 0

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, *requests: Request) -> None:
        """Queue requests: all of them, or none. Raises RequestError where one could never run,
        QueueFullError where the queue is full.
        """
        for request in requests:
            if not request.prompt_token_ids:
                raise RequestError("the prompt is empty; it must hold at least one token")
            if request.num_tokens >= self.max_model_len:
                raise RequestError(
                    f"the prompt has {request.num_tokens} tokens; with room for one more it must "
                    f"be at most {self.max_model_len - 1} "
                    f"(max_model_len is {self.max_model_len})"
                )
        self.waiting.check_room(len(requests), sum(r.num_tokens for r in requests))
        for request in requests:
            request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
            request.queued_step = self._step
            self.waiting.enter(request)
            self.waiting.push(request)
        self._log("add", requests, [r.num_tokens for r in requests])

    def schedule(self) -> ScheduledStep:
        """Plan the next step; empty where nothing is left to do."""
        self._step += 1
        self.kv.begin_step()
        planned: list[Request] = []
        left, preempted = self._plan_running(planned)
        if not preempted:
            self._plan_waiting(planned, left)
        if planned:
            self._log("schedule", planned, [r.num_scheduled_tokens for r in planned])
        elif self.num_unfinished:
            raise AssertionError("requests are left, and none of them can run")
        return ScheduledStep(planned, self.kv.take_ops())

    def _plan_running(self, planned: list[Request]) -> tuple[int, bool]:
        """Give each of those that run its tokens; the budget that is left, and whether somebody was
        preempted for it.
        """
        left, preempted = self.max_num_batched_tokens, False
        # preemption takes from the end of the list, so those that come first stay in place
        for i, request in enumerate(self.running):
            if not left:
                break
            computed = request.num_computed_tokens
            count = request.num_tokens - computed
            if count > 1:
                count = min(count, left - self._num_decoding(i + 1))
                if count < 1:
                    continue
            if computed + count > request.kv_border:
                while not self.kv.allocate_slots(request, count):
                    victim = self.running[-1]
                    self._preempt(victim)
                    preempted = True
                    if victim is request:
                        return left, preempted
            request.num_scheduled_tokens = count
            planned.append(request)
            left -= count
        return left, preempted

    def _num_decoding(self, first: int) -> int:
        """How many of those that run decode, from the `first` in rank: each will want one token of
        the budget.
        """
        return sum(r.num_tokens - r.num_computed_tokens == 1 for r in self.running[first:])

    def _plan_waiting(self, planned: list[Request], left: int) -> None:
        """Admit those that wait, while there are tokens, sequences and blocks left."""
        if self.batching != "continuous" and self.running:
            return
        passed_over: set[str] = set()
        first: Request | None = None
        while (
            left and len(self.running) < self.max_num_seqs and len(passed_over) < _MOST_PASSED_OVER
        ):
            if first is not None and self.batching == "dynamic":
                request = self.waiting.nearest(first.num_tokens, passed_over)
            else:
                request = self.waiting.first(self._step, passed_over)
            if request is None:
                return
            hit = self.kv.lookup(request)
            if self._is_being_computed(request, hit):
                passed_over.add(request.request_id)
                continue
            count = min(request.num_tokens - hit.num_tokens, left)
            if not self.kv.admit(request, hit, count):
                return
            first = first or request
            self._start(request)
            request.num_scheduled_tokens = count
            planned.append(request)
            left -= count

    def _is_being_computed(self, request: Request, hit: Hit) -> bool:
        """True where somebody computes, and will publish, the next block that this request lacks:
        it waits for it instead.
        """
        stop = (hit.num_tokens // self.kv.layout.block_size + 1) * self.kv.layout.block_size
        if not self.kv.enable_prefix_caching or stop >= request.num_tokens:
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
        self._log(
            "resume" if request.status is RequestStatus.PREEMPTED else "admit",
            [request],
            [request.num_computed_tokens],
        )
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_tokens += request.num_cached_tokens
        self.waiting.remove(request)
        self.waiting.charge(
            request, request.num_prompt_tokens if request.status is RequestStatus.WAITING else 0, 0
        )
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self.running.sort(key=self.waiting.rank)

    def retry(self, step: ScheduledStep) -> None:
        """Take back a step that computed nothing, because its blocks could not be loaded. Nobody
        knows what they hold: its requests begin again, and nothing published before is hit.
        """
        self.kv.forget()
        for request in reversed(step.requests):
            self._preempt(request, publish=False)

    def _preempt(self, request: Request, *, publish: bool = True) -> None:
        """Send a running request back to wait. What it published stays in the tree until its
        blocks are needed: resuming begins with a hit.
        """
        self._log("preempt", [request], [request.num_computed_tokens])
        self.running.remove(request)
        self.kv.release(request, publish=publish)
        request.num_computed_tokens = 0
        self.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        request.queued_step = self._step
        self.waiting.push(request)

    def update(self, step: ScheduledStep, sampled: Mapping[str, int]) -> None:
        """Book a step: `sampled` has the new token of each request that sampled. Ends requests at a
        stop token or at their length.
        """
        finished, is_fair = RequestStatus.FINISHED, self.waiting.policy == "fair"
        for request in step.requests:
            if request.status is finished:  # it failed, or was aborted, while the step ran
                continue
            request.num_computed_tokens += request.num_scheduled_tokens
            if request.num_computed_tokens >= request.kv_border:
                self.kv.publish(request)
            token_id = sampled.get(request.request_id)
            if token_id is None:
                continue
            output = request.output_token_ids
            output.append(token_id)
            if is_fair:
                self.waiting.charge(request, 0, 1)
            if token_id in request.stopping_token_ids and len(output) >= request.params.min_tokens:
                if token_id not in request.eos_token_ids or request.params.ignore_eos:
                    request.stop_reason = token_id
                self.finish(request, "stop")
            elif len(output) >= request.max_tokens:
                self.finish(request, "length")

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it is, and free its blocks. A finished request stays as it is."""
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
        """Raise AssertionError where requests, blocks and budgets do not add up."""
        self.kv.check_integrity()
        if len(self.running) > self.max_num_seqs:
            raise AssertionError(
                f"{len(self.running)} requests run, and max_num_seqs is {self.max_num_seqs}"
            )
        if {r.request_id for r in self.running} != self.kv.holders():
            raise AssertionError("other requests hold blocks than those that run")
        if any(r not in self.waiting for r in self.waiting.requests()):
            raise AssertionError("the waiting queue is not in order")
        waiting = self.waiting.requests()
        if self.waiting.num_tokens != sum(r.num_tokens for r in waiting):
            raise AssertionError("the waiting queue counts its tokens wrongly")
        if self.waiting.num_preempted != sum(r.status is RequestStatus.PREEMPTED for r in waiting):
            raise AssertionError("the waiting queue counts the preempted wrongly")
