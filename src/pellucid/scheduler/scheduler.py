"""First come, first served, one request at a time: the smallest scheduler that has the final shape.

One idea: a step computes some of `num_tokens - num_computed_tokens` of a request. A prompt longer than the step's budget is computed in
chunks and a decode step computes one token, by the same subtraction. `schedule()` plans, the model runner computes, `update()` books.

One request runs at a time because the reference backend computes with BLAS, whose sums depend on the shape of the batch: so a request's
tokens depend on nothing but itself. The scheduler sees no arrays and no clock.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import RequestError
from ..kv.manager import KVCacheManager
from ..request import FinishReason, Request, RequestStatus

__all__ = ["ScheduledRequest", "ScheduledStep", "Scheduler"]


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """What one request does in one step."""

    request: Request
    num_scheduled_tokens: int  # positions num_computed_tokens … num_computed_tokens + num_scheduled_tokens - 1
    block_table: list[int]

    @property
    def samples(self) -> bool:
        """True where the step reaches the last known token, so that the next one can be drawn."""
        return self.request.num_computed_tokens + self.num_scheduled_tokens == self.request.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The plan of one step: what the model runner executes."""

    requests: list[ScheduledRequest]


class Scheduler:
    """Owns the queue and each request's status."""

    def __init__(self, kv: KVCacheManager, *, max_model_len: int, max_num_batched_tokens: int) -> None:
        if max_model_len > kv.capacity:
            raise AssertionError(f"max_model_len {max_model_len} exceeds the {kv.capacity} tokens that the KV cache holds")
        self.kv = kv
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + (self._running is not None)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError where it could never run."""
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty; it must hold at least one token")
        if request.num_tokens >= self.max_model_len:
            raise RequestError(
                f"the prompt has {request.num_tokens} tokens; with room for one more it must be at most {self.max_model_len - 1} "
                f"(max_model_len is {self.max_model_len})"
            )
        self._waiting.append(request)

    def schedule(self) -> ScheduledStep:
        """Plan the next step; empty where nothing is left to do."""
        if self._running is None:
            if not self._waiting:
                return ScheduledStep([])
            self._running = self._waiting.popleft()
            self._running.status = RequestStatus.RUNNING
        request = self._running
        num_scheduled = min(request.num_tokens - request.num_computed_tokens, self.max_num_batched_tokens)
        if not self.kv.allocate_slots(request, num_scheduled):
            raise AssertionError("one request of at most max_model_len tokens must fit in the KV cache")
        return ScheduledStep([ScheduledRequest(request, num_scheduled, self.kv.block_table(request))])

    def update(self, step: ScheduledStep, sampled: Mapping[str, int]) -> None:
        """Book a step: `sampled` has the new token of each request that sampled. Ends requests at a stop token or at their length."""
        for scheduled in step.requests:
            request = scheduled.request
            if request.is_finished:  # it failed, or was aborted, while the step ran
                continue
            request.num_computed_tokens += scheduled.num_scheduled_tokens
            token_id = sampled.get(request.request_id)
            if token_id is None:
                continue
            request.output_token_ids.append(token_id)
            self._check_stop(request, token_id)

    def _check_stop(self, request: Request, token_id: int) -> None:
        params = request.params
        if len(request.output_token_ids) >= params.min_tokens:
            if token_id in request.eos_token_ids and not params.ignore_eos:
                return self.finish(request, "stop")
            if token_id in (params.stop_token_ids or ()):
                request.stop_reason = token_id
                return self.finish(request, "stop")
        if len(request.output_token_ids) >= request.max_tokens:
            self.finish(request, "length")

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it is, and free its blocks. A finished request stays as it is."""
        if request.is_finished:
            return
        if request is self._running:
            self._running = None
        else:
            self._waiting.remove(request)
        self.kv.free(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
