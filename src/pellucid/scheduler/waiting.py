"""The queue of waiting requests, and the policies that order it.

A policy is a sort key, the smallest first.

    fcfs      (arrival)
    priority  (priority, arrival)
    lpm       (-cached prefix - patience · steps waited, arrival)
    fair      (virtual tokens of the tenant, arrival)

priority: the smaller number is served first, as in vLLM. A request may preempt a running one with a
larger number, never one with an equal number (`scheduler.py`). So a request with a large number may
wait as long as requests with smaller numbers arrive.

lpm: longest prefix match (SGLang, arXiv:2312.07104) serves cached prefixes before they are evicted.
A request's key improves by `_PATIENCE` tokens with every step of waiting, so none waits forever.
The key costs a walk down the tree for each waiting request, so a long queue is served in order of
arrival.

fair: the virtual token counter (Sheng et al., arXiv:2401.00588). A tenant's counter grows with the
tokens that it is served; an output token counts as two prompt tokens. A tenant that comes back
after a pause starts at the smallest counter of the active tenants, so an idle tenant collects no
credit.
"""

import bisect
from collections.abc import Callable, Collection

from ..engine_config import SchedulingPolicy
from ..errors import QueueFullError, RequestError
from ..request import Request, RequestStatus

__all__ = ["WaitingQueue"]

# requests; in a longer queue, walking the tree for each costs more than it saves
_LONGEST_LPM_QUEUE = 128
_PATIENCE = 16  # tokens of cached prefix that one step of waiting counts as
_PROMPT_WEIGHT, _OUTPUT_WEIGHT = 1, 2


class WaitingQueue:
    """Owns the waiting requests, in order of arrival (and priority), and the tenants' counters."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        cached_tokens: Callable[[Request], int],
        max_requests: int | None,
        max_tokens: int | None,
    ) -> None:
        self.policy = policy
        self.num_tokens = 0
        self.num_preempted = 0  # of those that wait
        self._cached_tokens = cached_tokens
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._queue: list[Request] = []  # sorted by rank
        self._served: dict[str, int] = {}  # tenant -> virtual tokens, of tenants that wait or run
        self._active: dict[str, int] = {}  # tenant -> requests that wait or run

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, request: Request) -> bool:
        i = bisect.bisect_left(self._queue, self.rank(request), key=self.rank)
        return i < len(self._queue) and self._queue[i] is request

    def requests(self) -> list[Request]:
        """The waiting requests, by rank."""
        return list(self._queue)

    def rank(self, request: Request) -> tuple[int, int]:
        """A fixed sort key. It orders the queue under fcfs and priority, and running requests under
        every policy.
        """
        return (request.priority if self.policy == "priority" else 0, request.arrival)

    def check_room(self, num_requests: int, num_tokens: int) -> None:
        """Raise QueueFullError if the queue has no room for this many more, and RequestError if an
        empty queue has none either.
        """
        for what, count, name, most in (
            ("requests", num_requests, "max_waiting_requests", self._max_requests),
            ("prompt tokens", num_tokens, "max_waiting_tokens", self._max_tokens),
        ):
            if most is not None and count > most:
                raise RequestError(
                    f"{count} {what} were submitted together; {name} allows at most {most} to wait"
                )
        if self._max_requests is not None and len(self._queue) + num_requests > self._max_requests:
            raise QueueFullError(
                f"{len(self._queue)} requests wait, and max_waiting_requests is "
                f"{self._max_requests}; try again later"
            )
        if self._max_tokens is not None and self.num_tokens + num_tokens > self._max_tokens:
            raise QueueFullError(
                f"{self.num_tokens} tokens wait, and with {num_tokens} more they would exceed "
                f"max_waiting_tokens, {self._max_tokens}; "
                "try again later"
            )

    def push(self, request: Request) -> None:
        """Add a new or preempted request."""
        bisect.insort(self._queue, request, key=self.rank)
        self.num_tokens += request.num_tokens
        self.num_preempted += request.status is RequestStatus.PREEMPTED

    def remove(self, request: Request) -> None:
        """Take a request out of the queue."""
        i = bisect.bisect_left(self._queue, self.rank(request), key=self.rank)
        if i == len(self._queue) or self._queue[i] is not request:
            raise AssertionError(f"request {request.request_id} does not wait")
        del self._queue[i]
        self.num_tokens -= request.num_tokens
        self.num_preempted -= request.status is RequestStatus.PREEMPTED

    def first(self, step: int, passed_over: Collection[str]) -> Request | None:
        """The next request by the policy, without those in `passed_over`."""
        waiting = (r for r in self._queue if r.request_id not in passed_over)
        if self.policy == "lpm" and len(self._queue) <= _LONGEST_LPM_QUEUE:
            return min(
                waiting,
                key=lambda r: (
                    -self._cached_tokens(r) - _PATIENCE * (step - r.queued_step),
                    r.arrival,
                ),
                default=None,
            )
        if self.policy == "fair":
            return min(waiting, key=lambda r: (self._served[r.tenant], r.arrival), default=None)
        return next(waiting, None)

    def nearest(self, length: int, passed_over: Collection[str]) -> Request | None:
        """The waiting request whose length is nearest."""
        waiting = (r for r in self._queue if r.request_id not in passed_over)
        return min(waiting, key=lambda r: (abs(r.num_tokens - length), r.arrival), default=None)

    def outranks(self, request: Request) -> bool:
        """Under `priority`: True if a waiting request has a higher priority than `request`."""
        return bool(self._queue) and self._queue[0].priority < request.priority

    # ---- the counters of tenants

    def enter(self, request: Request) -> None:
        """Count a new request of its tenant."""
        tenant = request.tenant
        if tenant not in self._active:
            self._active[tenant] = 0
            self._served[tenant] = min(self._served.values(), default=0)
        self._active[tenant] += 1

    def leave(self, request: Request) -> None:
        """Count an ended request; forget a tenant that has none left."""
        self._active[request.tenant] -= 1
        if not self._active[request.tenant]:
            del self._active[request.tenant], self._served[request.tenant]

    def charge(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Add served tokens to the tenant's counter."""
        self._served[request.tenant] += (
            _PROMPT_WEIGHT * num_prompt_tokens + _OUTPUT_WEIGHT * num_output_tokens
        )
