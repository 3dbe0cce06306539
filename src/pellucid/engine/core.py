"""The engine's one loop: a step is schedule → execute → update, and returns outputs.

The core owns every request from `add_requests` to its last output. Its caller (`core_thread`) calls
`step()` and handles threads and waiting. The core sees text only through the detokenizer, which
finds stop strings.
"""

import random
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import add

from ..config import ModelConfig
from ..errors import EngineError, PellucidError, RequestError, named_errors
from ..kv.storage import LostBlocksError
from ..outputs import Explanation, FinishReason, RequestMetrics, RequestOutput
from ..request import Request
from ..scheduler import ScheduledStep, Scheduler
from ..speculative import Speculation
from ..tokenizer import Tokenizer
from .admission import Submission, build_requests
from .draft_runner import DraftRunner
from .model_runner import ModelRunner, StepResult
from .output import OutputGroup
from .pooling import build_group
from .stats import STEP_SECONDS, Counts, EngineStats, StepRecord, build_stats

__all__ = ["EngineCore"]


class EngineCore:
    """Runs requests to their ends. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        seed: int | None,
        clock: Callable[[], float] = time.monotonic,
        speculation: Speculation | None = None,
        draft_runner: DraftRunner | None = None,
        explain: Callable[[RequestMetrics], Explanation] | None = None,
    ) -> None:
        """`seed` gives seeds to requests that have none; None: new ones at every start. `clock`
        returns seconds. `speculation` drafts tokens; drafts change no answer, only the number of
        steps. `draft_runner` runs its model, if it has one. `explain` tells why a request took as
        long as it did, when a reader of its outputs asks.
        """
        self.scheduler = scheduler
        self._model = model
        self._tokenizer = tokenizer
        self.runner = runner
        self._clock = clock
        self._now = 0.0  # when the step in `_update` was computed
        self.speculation = speculation
        self._draft_runner = draft_runner
        self.explain = explain
        self._counts = Counts()
        self._seeds = random.Random(seed)  # for requests that have none
        # by the submission's id: one group has n requests
        self._groups: dict[str, OutputGroup] = {}
        self._group_of: dict[str, OutputGroup] = {}  # the same groups, by the id of each request

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.num_unfinished > 0

    def add_requests(self, submissions: Sequence[Submission]) -> None:
        """Queue all or nothing. Raises RequestError, ConfigError or QueueFullError."""
        groups: dict[str, OutputGroup] = {}
        group_of: dict[str, OutputGroup] = {}
        scheduler = self.scheduler
        # Build all requests before any is queued.
        for submission in submissions:
            with named_errors(submission.name):
                requests = build_requests(
                    submission, self._tokenizer, self._model, scheduler.max_model_len, self._seeds
                )
                scheduler.check(requests)
            name = submission.request_id
            members = [request.request_id for request in requests]
            is_used = name in self._groups or name in groups
            if is_used or any(m in self._group_of or m in group_of for m in members):
                raise RequestError(f"request_id {name!r} is in use")
            groups[name] = group = build_group(
                submission, requests, self._tokenizer, self._clock(), self.explain
            )
            group_of.update(dict.fromkeys(members, group))
        # Queue all or nothing, and only then keep their groups.
        scheduler.add(*(request for group in groups.values() for request in group.requests))
        self._groups |= groups
        self._group_of |= group_of

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a submission and return its last output; None where the id is unknown or finished."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        now = self._clock()
        for request in group.requests:
            self.scheduler.finish(request, "abort")
            group.finish(request, now)
        return self._output(group)

    def step(self) -> list[RequestOutput]:
        """Run one step and return the outputs so far of the requests that it computed.

        Raises EngineError if the step crashed: its requests are lost, the others can go on.
        """
        start, cpu = self._clock(), time.thread_time()
        if self.speculation is not None:
            decoding = [r for r in self.scheduler.running if r.is_decoding]
            self.speculation.propose(decoding, self._clock)
        step = self.scheduler.schedule()
        if not step.requests:
            return []
        planned = self._clock()
        for request in step.requests:
            self._group_of[request.request_id].schedule(
                start, request.num_scheduled_tokens, self._counts.num_computed_tokens
            )
        try:
            result = self.runner.execute(step)
        except LostBlocksError:
            self.scheduler.retry(step)
            return []
        except Exception as error:
            raise self._fail(step, error) from error
        self._now = now = self._clock()
        # Count the step's work before `update` moves the requests' counters.
        counts = self._counts
        num_tokens = sum([r.num_scheduled_tokens for r in step.requests])
        counts.num_computed_tokens += num_tokens
        if self.speculation is not None:
            self.speculation.observe(step.requests, result.sampled, now - planned)
        outputs = self._update(step, result, now)
        # Count the step's time.
        end = self._clock()
        times = (planned - start, now - planned, result.forward_seconds, end - now)
        counts.python_cpu_seconds += time.thread_time() - cpu - result.kernel_cpu_seconds
        if self._draft_runner is not None:
            counts.python_cpu_seconds -= self._draft_runner.take_cpu_seconds()
        counts.num_steps += 1
        counts.last_step = times
        counts.all_steps = tuple(map(add, counts.all_steps, times))
        counts.step_histogram[bisect_left(STEP_SECONDS, end - start)] += 1
        sizes = num_tokens, len(step.requests)
        counts.recent_steps.append(StepRecord(counts.num_steps, end - start, times[2], *sizes))
        return outputs

    def stats(self) -> EngineStats:
        """The state of the engine, and its counts since its start."""
        return build_stats(self.scheduler, self.runner, self._counts, self.speculation)

    def _update(self, step: ScheduledStep, result: StepResult, now: float) -> list[RequestOutput]:
        """Record a step's tokens. Returns the outputs that readers want."""
        # End each request that got no token, before this step's blocks are published.
        for request_id, refusal in result.errors.items():
            if request_id not in result.sampled:
                self._refuse(request_id, refusal)
        self.scheduler.update(step, result.sampled, self._read)
        # A request whose sampling failed at a draft keeps the tokens before it, and ends here.
        for request_id, refusal in result.errors.items():
            self._refuse(request_id, refusal)
        # Build the outputs.
        touched: dict[str, OutputGroup] = {}
        for request in step.requests:
            group = self._group_of[request.request_id]
            touched[group.request_id] = group
            self._name_logprobs(group, request, result)
            if request.is_finished:
                group.finish(request, now)
        return [self._output(group) for group in touched.values() if group.is_wanted]

    def _refuse(self, request_id: str, refusal: PellucidError) -> None:
        """End a request with an error message, unless it has ended already."""
        request = self._group_of[request_id].request(request_id)
        if not request.is_finished:
            request.stop_reason = str(refusal)
            self.scheduler.finish(request, "error")

    def _read(self, request: Request, token_id: int, reason: FinishReason | None) -> bool:
        """Add a token to its text. True if the text is then complete: by a stop string or its
        constraint.
        """
        self._counts.num_output_tokens += 1
        group = self._group_of[request.request_id]
        is_stopped = group.advance(request, token_id, reason, self._now)
        # A token that ends the request by its id is not part of what the constraint reads.
        if request.constraint is not None and reason != "stop":
            is_stopped |= request.constraint.advance(token_id)
        return is_stopped

    @staticmethod
    def _name_logprobs(group: OutputGroup, request: Request, result: StepResult) -> None:
        """Store a step's logprobs, with the tokens' texts, for the tokens that were taken."""
        scored = result.prompt_logprobs.get(request.request_id)
        if scored is not None:
            request.prompt_logprobs += map(group.named, scored)
        rows = result.logprobs.get(request.request_id)
        if rows is not None:
            num_new = len(request.output_token_ids) - len(request.logprobs)
            request.logprobs += map(group.named, rows[:num_new])

    def _fail(self, step: ScheduledStep, error: Exception) -> EngineError:
        """End a crashed step's requests and drop all prefixes: the cache may be half written."""
        failed = list(dict.fromkeys(self._group_of[r.request_id].request_id for r in step.requests))
        for request_id in failed:
            for request in self._groups[request_id].requests:
                self.scheduler.finish(request, "error")
            self._forget(self._groups[request_id])
        self.scheduler.kv.forget()
        return EngineError(
            f"a step of the engine crashed ({type(error).__name__}: {error}); the requests that "
            "it computed are lost",
            failed,
        )

    def _output(self, group: OutputGroup) -> RequestOutput:
        output = group.output(self._counts.num_computed_tokens)
        if output.finished:
            if self.speculation is not None:
                receipt = output.speculation = self.speculation.receipt(group.requests)
                output.metrics.num_decode_steps = receipt.num_steps
                output.metrics.num_draft_tokens = receipt.num_draft_tokens
            self._forget(group)
        return output

    def _forget(self, group: OutputGroup) -> None:
        self._groups.pop(group.request_id, None)
        for request in group.requests:
            self._group_of.pop(request.request_id, None)
            if self.speculation is not None:
                self.speculation.finish(request)
