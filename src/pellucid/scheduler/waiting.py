"""The queue of requests that wait, and the policies that say who is next.

A policy is a sort key, the smallest first.

    fcfs      (arrival)
    priority  (priority, arrival)
    lpm       (-cached prefix - patience · steps waited, arrival)
    fair      (virtual tokens of the tenant, arrival)

priority: the smaller number is served first, as in vLLM. A request takes the place of one that runs
with a larger number, never of its equal (`scheduler.py`). A request with a large number may
therefore wait as long as smaller numbers keep coming: that is what a priority means.

lpm: longest prefix match (SGLang, arXiv:2312.07104) serves cached prefixes before they are evicted.
A request gains `_PATIENCE` tokens with every step that it waits, so none waits for ever. The key
costs a walk down the tree for each request that waits, so a long queue is served in order of
arrival.

fair: the virtual token counter (Sheng et al., arXiv:2401.00588). A tenant's counter grows by what
it is served; an output token counts twice a prompt token. A tenant that comes back after a pause
starts at the least counter of the active tenants, so an idle tenant saves nothing up.
"""

import bisect
from collections.abc import Callable, Collection

from ..engine_config import SchedulingPolicy
from ..errors import QueueFullError
from ..request import Request, RequestStatus

__all__ = ["WaitingQueue"]

# requests; beyond that, walking the tree for each would cost more than it saves
_LONGEST_LPM_QUEUE = 128
_PATIENCE = 16  # tokens of prefix that one step of waiting is worth
_PROMPT_WEIGHT, _OUTPUT_WEIGHT = 1, 2


class WaitingQueue:
    """Owns the requests that wait, in order of arrival (and priority), and the counters of
    tenants.
    """

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
        """Those that wait, by rank."""
        return list(self._queue)

    def rank(self, request: Request) -> tuple[int, int]:
        """The order that never changes: of those that wait under fcfs and priority, and of those
        that run under every policy.
        """
        return (request.priority if self.policy == "priority" else 0, request.arrival)

    def check_room(self, num_requests: int, num_tokens: int) -> None:
        """Raise QueueFullError where so much more would be too much."""
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
        """Let a request wait: one that is new, or that was preempted."""
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
        """Who is next, of those that are not passed over."""
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
        """Of those that wait, the one whose length is nearest."""
        waiting = (r for r in self._queue if r.request_id not in passed_over)
        return min(waiting, key=lambda r: (abs(r.num_tokens - length), r.arrival), default=None)

    def outranks(self, request: Request) -> bool:
        """True where one that waits has a higher priority than `request`, under `priority`."""
        return bool(self._queue) and self._queue[0].priority < request.priority

    # ---- the counters of tenants

    def enter(self, request: Request) -> None:
        """A new request of its tenant."""
        tenant = request.tenant
        if tenant not in self._active:
            self._active[tenant] = 0
            self._served[tenant] = min(self._served.values(), default=0)
        self._active[tenant] += 1

    def leave(self, request: Request) -> None:
        """A request ended; a tenant that has none left is forgotten."""
        self._active[request.tenant] -= 1
        if not self._active[request.tenant]:
            del self._active[request.tenant], self._served[request.tenant]

    def charge(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A tenant was served."""
        self._served[request.tenant] += (
            _PROMPT_WEIGHT * num_prompt_tokens + _OUTPUT_WEIGHT * num_output_tokens
        )
