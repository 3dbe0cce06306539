"""The state of an engine and its step times, as plain data.

Times are seconds of the core's clock. `EngineStats` counts from the engine's start, so a rate is
the difference of two of them.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ..outputs import SpeculationReceipt
from ..scheduler import Scheduler
from ..speculative import Speculation
from .model_runner import ModelRunner

__all__ = [
    "NUM_RECENT_STEPS",
    "STEP_SECONDS",
    "Counts",
    "EngineStats",
    "RequestStats",
    "StepRecord",
    "StepTimes",
    "build_stats",
    "list_requests",
]

NUM_RECENT_STEPS = 128  # how many of the last steps are kept one by one

# Upper bounds of the histogram's buckets; the last bucket has all longer steps.
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step, or the sums over many."""

    schedule: float = 0.0  # to plan
    execute: float = 0.0  # to compute and to sample; includes `forward`
    forward: float = 0.0  # in the model
    update: float = 0.0  # to record tokens, to detokenize, to build outputs

    @property
    def total(self) -> float:
        return self.schedule + self.execute + self.update


class StepRecord(NamedTuple):
    """One of the last steps."""

    step: int  # its number, from 1
    seconds: float
    forward_seconds: float  # of them in the model
    num_tokens: int  # that it computed
    num_requests: int  # that they belong to


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot between two steps."""

    # requests
    num_running: int
    num_waiting: int  # how many of them were preempted
    num_preempted: int
    # KV blocks by state: total = free + cached + held
    num_kv_blocks: int
    num_free_blocks: int
    num_cached_blocks: int  # held by the prefix tree alone: evicted when memory is needed
    num_held_blocks: int  # held by running requests
    num_saved_blocks: int  # evicted, and saved in the file of the second memory
    swap_file_bytes: int  # the size of that file; 0 while there is none
    # counts since the start
    num_prompt_tokens: int  # of requests that were admitted
    num_cached_tokens: int  # how many of them hit the prefix cache
    num_computed_tokens: int  # positions that went through the model
    num_output_tokens: int  # tokens given to requests
    speculation: SpeculationReceipt | None  # of all requests; None: the engine does not speculate
    num_preemptions: int
    num_loaded_blocks: int  # brought back from the second memory
    # steps
    num_steps: int
    last_step: StepTimes
    all_steps: StepTimes
    # CPU time of the engine's thread in steps, but for the model and for moving KV blocks
    python_cpu_seconds: float
    step_histogram: tuple[int, ...]  # steps by their total, in the buckets of STEP_SECONDS
    recent_steps: tuple[StepRecord, ...]  # the last NUM_RECENT_STEPS, the oldest first

    @property
    def draft_seconds(self) -> float:
        """Seconds of steps in a draft model, since the start."""
        return 0.0 if self.speculation is None else self.speculation.draft_seconds

    @property
    def num_drafts(self) -> int:
        """Steps of requests that had draft tokens, since the start."""
        return 0 if self.speculation is None else self.speculation.num_drafts

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens that went through the model since the start."""
        return 0 if self.speculation is None else self.speculation.num_draft_tokens

    @property
    def num_accepted_tokens(self) -> int:
        """How many of them were accepted."""
        return 0 if self.speculation is None else self.speculation.num_accepted_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One request that runs or waits."""

    request_id: str
    status: str  # running, waiting, preempted
    priority: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_blocks: int  # of the KV cache, over all layer groups
    waits_for: str | None  # None while it runs


@dataclass(slots=True)
class Counts:
    """Sums that the core updates with each step; the names are those of EngineStats."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    last_step: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # the fields of StepTimes
    all_steps: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    python_cpu_seconds: float = 0.0
    step_histogram: list[int] = field(default_factory=lambda: [0] * (len(STEP_SECONDS) + 1))
    recent_steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_STEPS))


def build_stats(
    scheduler: Scheduler, runner: ModelRunner, counts: Counts, speculation: Speculation | None
) -> EngineStats:
    """The snapshot of an engine between two steps."""
    kv = scheduler.kv
    return EngineStats(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_preempted=scheduler.waiting.num_preempted,
        num_kv_blocks=kv.num_blocks,
        num_free_blocks=kv.num_free_blocks,
        num_cached_blocks=kv.num_cached_blocks,
        num_held_blocks=kv.num_blocks - kv.num_available_blocks,
        num_saved_blocks=kv.num_saved_blocks,
        swap_file_bytes=runner.swap_file_bytes,
        num_prompt_tokens=scheduler.num_prompt_tokens,
        num_cached_tokens=scheduler.num_cached_tokens,
        num_computed_tokens=counts.num_computed_tokens,
        num_output_tokens=counts.num_output_tokens,
        speculation=None if speculation is None else speculation.receipt(),
        num_preemptions=scheduler.num_preemptions,
        num_loaded_blocks=kv.num_loaded_blocks,
        num_steps=counts.num_steps,
        last_step=StepTimes(*counts.last_step),
        all_steps=StepTimes(*counts.all_steps),
        python_cpu_seconds=counts.python_cpu_seconds,
        step_histogram=tuple(counts.step_histogram),
        recent_steps=tuple(counts.recent_steps),
    )


def list_requests(scheduler: Scheduler) -> list[RequestStats]:
    """All requests that have not ended: those that run by rank, then those that wait in order."""
    running, waiting = scheduler.running, scheduler.waiting.requests()
    place = None
    if len(running) >= scheduler.max_num_seqs:
        place = f"a place: all {scheduler.max_num_seqs} sequences run"
    found = []
    for i, request in enumerate([*running, *waiting]):
        before = i - len(running)
        waits_for = None
        if before >= 0:
            waits_for = place or "KV blocks, tokens of a step, or a prefix that is being computed"
            if before:
                waits_for += f"; {before} wait before it"
        found.append(
            RequestStats(
                request_id=request.request_id,
                status=request.status.value,
                priority=request.priority,
                num_prompt_tokens=request.num_prompt_tokens,
                num_cached_tokens=request.num_cached_tokens,
                num_computed_tokens=request.num_computed_tokens,
                num_output_tokens=len(request.output_token_ids),
                max_tokens=request.max_tokens,
                num_blocks=sum(map(len, request.block_tables)),
                waits_for=waits_for,
            )
        )
    return found
